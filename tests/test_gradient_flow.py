"""Norms of gradients over time are those of autograd through a loop written out; nothing of the model is changed."""

import copy
import math

import pytest
import torch
from torch import nn

import seqcore
from seqcore import InvalidInput
from seqcore.diagnostics import Flow, gradient_flow
from seqcore.reference.recurrence import Weights, advance, group
from seqcore.testing.budget import assert_within_budget

from .comparisons import assert_equal_in_float64, cotangents
from .recurrence_twins import CELLS, mapped, masks, ours, problem, tensors, torch_module

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DOUBLE = {"dtype": torch.float64}
WHOSE = ["torch's", "aten", "reference"]


def belonging_to(whose, twin):
    return twin if whose == "torch's" else ours(twin, whose)


def norms(states):
    """[T]: of the gradients that ``states`` retained."""
    return torch.stack([torch.zeros(()).to(s) if s.grad is None else s.grad.norm() for s in states]).detach()


def kept(states):
    """Copies that retain their gradients; no c that is kept has a part in the h kept beside it."""
    states = tuple(None if s is None else s.clone() for s in states)
    for state in (s for s in states if s is not None):
        state.retain_grad()
    return states


def plain_loop(module, x, hx, loss):
    """The norms, by name, from autograd through two bidirectional layers of cells, with no seqcore module."""
    cell, directions = module.mode.lower(), 2
    x = (x.transpose(0, 1) if module.batch_first else x).clone().requires_grad_()
    x.retain_grad()
    initial, input, every = tensors(hx), x, {}
    for layer, names in enumerate(zip(*[iter(module._all_weights)] * directions, strict=True)):
        flat = [getattr(module, name) for of_direction in names for name in of_direction]
        outputs = []
        for d, weights in enumerate(group(flat, directions, module.bias)):
            h, c = (*(s[directions * layer + d] for s in initial), None)[:2]
            steps = {}
            for t in reversed(range(len(x))) if d else range(len(x)):
                gates = input[t] @ weights.w_ih.T + weights.b_ih
                h, c = steps[t] = kept(advance(cell, gates, h, c, Weights(*weights)))
            in_order = [steps[t] for t in range(len(x))]
            for kind, states in zip("hc", zip(*in_order, strict=True), strict=True):
                every[f"{kind}.{layer}{'.reverse' * d}"] = states
            outputs.append(torch.stack([h for h, _ in in_order]))
        input = torch.cat(outputs, -1)
    loss((input.transpose(0, 1) if module.batch_first else input, None)).backward()
    found = {name: norms(states) for name, states in every.items() if states[0] is not None}
    return {"input": x.grad.flatten(1).norm(dim=1)} | found


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("cell", CELLS)
def test_norms_are_those_of_a_plain_loop(cell, whose):
    twin, x, hx = problem(cell, T=6, num_layers=2, bidirectional=True, batch_first=True, **DOUBLE)
    loss = lambda output: (output[0] * cotangents([output[0]])[0]).sum()
    flow = gradient_flow(belonging_to(whose, twin), x, hx, loss=loss)
    expected = plain_loop(copy.deepcopy(twin), x, hx, loss)
    assert_equal_in_float64({name: flow[name].norms for name in flow}, expected)
    assert list(flow)[:2] == ["input", "h.0"] and flow["h.0.reverse"].reverse and not flow["h.1"].reverse


FORMS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "dropout": {"num_layers": 3, "dropout": 0.5, "bidirectional": True},
    "no_bias": {"bias": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm_proj"])
def test_outputs_and_draws_are_those_of_the_module(cell, whose, form):
    twin, x, hx = problem(cell, T=4, **FORMS[form], **DOUBLE)
    assert_the_same_as_the_module(belonging_to(whose, twin), x, hx)


def test_blocks_and_clipped_gradients():
    twin, x, hx = problem("gru", T=4, H=6, **DOUBLE)
    assert_the_same_as_the_module(ours(twin, "reference", blocks=3, grad_clip=0.01), x, hx)


def test_locked_dropout_and_expected_zoneout():
    twin, x, hx = problem("lstm", T=4, num_layers=3, dropout=0.5, **DOUBLE)
    assert_the_same_as_the_module(ours(twin, None, locked=True), x, hx)
    assert_the_same_as_the_module(ours(twin, "reference", zoneout=(0.2, 0.4)).eval(), x, hx)


def test_zoneout_is_drawn_while_training():
    twin, x, hx = problem("gru", T=200, B=16, H=8, **DOUBLE)
    outputs = []
    loss = lambda output: outputs.append(output[0]) or output[0].sum()
    gradient_flow(ours(twin, None, zoneout=0.25), x, hx, loss=loss)
    kept = (outputs[0][1:] == outputs[0][:-1]).double().mean()
    assert 0.23 < kept < 0.27


def assert_the_same_as_the_module(module, x, hx):
    """With and without a state and a batch: outputs, what is drawn, the gradient of the input."""
    for given in ((x, hx), (x,), (x[0],)):
        found, drawn = {}, []

        def loss(output, found=found, drawn=drawn):
            found.update(enumerate(tensors(output)))
            drawn.append(torch.get_rng_state())
            return output[0].sum()

        torch.manual_seed(1)
        flow = gradient_flow(module, *given, loss=loss)
        torch.manual_seed(1)
        x = given[0].clone().requires_grad_()
        output = module(x, *given[1:])
        assert_equal_in_float64(found, dict(enumerate(tensors(output))))
        assert torch.equal(drawn[0], torch.get_rng_state())
        (gradient,) = torch.autograd.grad(output[0].sum(), x)
        gradient = gradient.movedim(1 if module.batch_first and x.dim() == 3 else 0, 0).flatten(1)
        assert_equal_in_float64({"input": flow["input"].norms}, {"input": gradient.norm(dim=1)})


@pytest.mark.parametrize("mask", ["lengths", "reset", "reset_hx", "both"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_ragged_batches_give_what_the_module_gives(cell, mask):
    twin, x, hx = problem(cell, T=4, num_layers=2, bidirectional=True, **DOUBLE)
    module, given = ours(twin, None), masks()
    given = given if mask == "both" else {name: given[name] for name in given if name == mask[:5] or name == mask}
    if mask == "reset_hx":
        given["reset_hx"] = mapped(torch.rand_like, hx)
    if cell == "lstm":
        given["return_cells"] = True
    outputs = []
    gradient_flow(module, x, hx, loss=lambda output: outputs.append(output) or output[0].sum(), **given)
    found, expected = (dict(enumerate(tensors(output))) for output in (outputs[0], module(x, hx, **given)))
    assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_does_not_count(bidirectional):
    twin, x, _ = problem("lstm", T=4, bidirectional=bidirectional, **DOUBLE)
    lengths = masks()["lengths"]
    together = gradient_flow(ours(twin, None), x, lengths=lengths)
    alone = [gradient_flow(twin, x[:n, [b]]) for b, n in enumerate(lengths.tolist()) if n]
    for name in together:
        squares = torch.zeros(4, dtype=torch.float64)
        for flow in alone:
            squares[: len(flow[name].norms)] += flow[name].norms.square()
        assert_equal_in_float64({name: together[name].norms}, {name: squares.sqrt()})


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_by_default_the_loss_is_the_last_step_of_each_direction(cell):
    twin, x, _ = problem(cell, T=4, num_layers=2, bidirectional=True, batch_first=True, **DOUBLE)
    y = twin(x)[0]
    assert gradient_flow(twin, x).loss == pytest.approx((y[:, -1, :31] + y[:, 0, 31:]).sum().item())


def test_a_reset_lets_nothing_through():
    twin, x, _ = problem("gru", T=6, **DOUBLE)
    reset = torch.zeros(6, 5, dtype=torch.bool)
    reset[3] = True
    flow = gradient_flow(ours(twin, None), x, reset=reset)["h"]
    assert (flow.norms > 0).tolist() == [False] * 3 + [True] * 3
    assert flow.verdict == "vanishing" and "exactly zero from lag 3 on" in flow.sentence


# --- gradients known beforehand ------------------------------------------------------------------------------------


def scaled_permutation(gain, nonlinearity="relu", dtype=torch.float64):
    """Over positive x h_t = gain P h_{t-1} + x_t, over zeros tanh of it: ∂h_t/∂h_{t-1} is gain P, P a permutation."""
    module = nn.RNN(4, 4, nonlinearity=nonlinearity, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4))
        module.weight_hh_l0.copy_(gain * torch.eye(4, dtype=dtype).roll(1, 0))
    return module


@pytest.mark.parametrize("gain, verdict", [(0.5, "vanishing"), (0.9, "vanishing"), (1.0, "steady"), (2.0, "exploding")])
def test_gain_decides_the_verdict(gain, verdict):
    flow = gradient_flow(scaled_permutation(gain), torch.ones(100, 3, 4, **DOUBLE))["h"]
    lags = torch.arange(99, -1, -1)
    found = {"norms": flow.norms, "rate and ratio": torch.tensor([flow.rate, flow.ratio], **DOUBLE)}
    expected = {"norms": 12**0.5 * gain ** lags.double(), "rate and ratio": torch.tensor([gain, gain**99], **DOUBLE)}
    assert_equal_in_float64(found, expected)
    assert torch.equal(flow.lags, lags)
    assert flow.verdict == verdict
    assert f"by {gain:.3g} a step" in flow.sentence and "99 steps" in flow.sentence


def test_small_gradients_are_not_zero_and_large_ones_not_infinite():
    small = gradient_flow(scaled_permutation(0.5, "tanh", torch.float32), torch.zeros(300, 1, 4))["h"]
    assert small.norms[300 - 1 - 120] == 2 * 0.5**120, "1e-36, whose square float32 does not hold"
    assert small.norms[0] == 0 and small.ratio == 0
    assert "shrinks by 0.5 a step: after 125 steps 2.4e-38 of it is left" in small.sentence
    assert "exactly zero from lag 150 on" in small.sentence, "float32 ends there"
    stuck = gradient_flow(scaled_permutation(0.7, "tanh", torch.float32), torch.zeros(999, 1, 4))["h"]
    assert stuck.norms[0] > 0, "the smallest number that there is times 0.7 is rounded to itself"
    assert stuck.rate == pytest.approx(0.7) and "from lag 245 on it is below the normal range" in stuck.sentence
    large = gradient_flow(scaled_permutation(2.0, "tanh", torch.float32), torch.zeros(300, 1, 4))["h"]
    assert large.norms[300 - 1 - 127] == 2 * 2.0**127, "1e38, whose square float32 does not hold"
    assert large.verdict == "exploding" and "became infinite at lag 128" in large.sentence
    broken = Flow(torch.tensor([1e-300, 1e300, math.nan], **DOUBLE))
    assert broken.verdict == "exploding" and broken.sentence == "∂L/∂h_t became NaN at lag 0"


def test_a_loss_of_few_steps():
    flow = gradient_flow(scaled_permutation(0.5), torch.ones(9, 1, 4, **DOUBLE), loss=lambda output: output[0][4].sum())
    assert flow["h"].lags.tolist() == [4, 3, 2, 1, 0, -1, -2, -3, -4] and flow["h"].verdict == "steady"
    nothing = gradient_flow(scaled_permutation(0.0), torch.ones(9, 1, 4, **DOUBLE), loss=lambda output: output[1].sum())
    assert "is 2 at the last step" in nothing["h"].sentence and nothing["h"].verdict == "vanishing"
    strict = gradient_flow(scaled_permutation(0.5), torch.ones(9, 1, 4, **DOUBLE), decades=1)
    assert strict["h"].verdict == "vanishing"


def test_the_reverse_direction_lags_along_time():
    there = Flow(torch.tensor([0.0, 0.1, 0.5, 2.0, 0.0], **DOUBLE))
    back = Flow(there.norms.flip(0), reverse=True)
    assert there.lags.tolist() == [3, 2, 1, 0, -1] and back.lags.tolist() == [-1, 0, 1, 2, 3]
    assert (back.sentence, back.rate, back.ratio) == (there.sentence, there.rate, there.ratio)
    assert there.ratio == 0 and "exactly zero from lag 3 on" in there.sentence


# --- what is left behind -------------------------------------------------------------------------------------------


class Counting(nn.BatchNorm1d):
    """BatchNorm over [T, B, E] that puts another tensor in the place of a buffer, too."""

    def forward(self, x):
        y = super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        self.num_batches_tracked = self.num_batches_tracked + 1
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_is_changed(fails):
    model = nn.ModuleDict({"rnn": nn.GRU(4, 4), "cell": nn.GRUCell(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["norm"] = Counting(4)
    model.forward = lambda x: model["attention"](*[model["rnn"](model["norm"](x))[0]] * 3)[0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model["rnn"].eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}

    def loss(output):
        if fails:
            raise KeyError("of the loss")
        return output.sum()

    try:
        gradient_flow(model, torch.randn(3, 2, 4), loss=loss, watch=["rnn", "cell"])
    except KeyError:
        assert fails
    for name, module in model.named_modules():
        assert vars(module) == before[name]
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]), name
    assert torch.backends.mha.get_fastpath_enabled()


def test_frozen_modules_without_gradients_all_the_same():
    twin, x, _ = problem("lstm", T=4, **DOUBLE)
    expected = gradient_flow(twin, x)
    with torch.inference_mode():
        found = gradient_flow(twin.requires_grad_(False).eval(), x)
    assert_equal_in_float64(*({name: flow[name].norms for name in flow} for flow in (found, expected)))


# Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model():
    twin, x, _ = problem("gru", T=4, **DOUBLE)
    model = nn.Sequential(ours(twin, None))
    loss = lambda output: output[0].sum()
    expected = gradient_flow(model, x, loss=loss)
    model[0] = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    model[0](x)
    found = gradient_flow(torch.compile(model, backend="aot_eager"), x, loss=loss)
    assert list(found) == ["input", "0.h"]
    assert_equal_in_float64(*({name: flow[name].norms for name in flow} for flow in (found, expected)))


@pytest.mark.kernels
def test_through_the_kernels(device):
    twin, x, hx = problem("lstm", T=3, B=2, H=5, device=device)
    exact = gradient_flow(ours(twin, "reference").double(), x.double(), mapped(torch.Tensor.double, hx))
    eager, found = (gradient_flow(ours(twin, backend), x, hx) for backend in ("reference", "triton"))
    for name in exact:
        assert_within_budget(found[name].norms.float(), exact[name].norms, eager[name].norms.float(), name)


# --- what cannot be followed ---------------------------------------------------------------------------------------


ERRORS = {
    "a function": (lambda: gradient_flow(len, torch.ones(1)), "must be a torch.nn.Module, got builtin"),
    "no loss": (lambda: gradient_flow(nn.Sequential(nn.GRU(4, 3)), torch.ones(2, 1, 4)), "Sequential needs loss="),
    "loss of numbers": (lambda: gradient_flow(nn.GRU(4, 3), torch.ones(2, 1, 4), loss=1.0), "a function from .* float"),
    "loss of vectors": (lambda: gradient_flow(nn.GRU(4, 3), torch.ones(2, 1, 4), loss=lambda o: o[0]), r"\[2, 1, 3\]"),
    "loss without a graph": (
        lambda: gradient_flow(nn.GRU(4, 3), torch.ones(2, 1, 4), loss=lambda o: o[0].detach().sum()),
        "without grad_fn",
    ),
    "unknown submodule": (
        lambda: gradient_flow(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4), loss=torch.sum, watch=["1"]),
        "got '1'; there are 0",
    ),
    "watched along no dimension": (
        lambda: gradient_flow(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4), loss=torch.sum, watch={"0": 2}),
        r"'0' puts out, got 2 for \[2, 3\]; allowed are -2 … 1",
    ),
    "watched along a name": (
        lambda: gradient_flow(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4), loss=torch.sum, watch={"0": "1"}),
        "the dimension of time, an int, got '1'",
    ),
    "nothing": (
        lambda: gradient_flow(nn.Embedding(4, 3), torch.ones(2).long(), loss=torch.sum),
        "found nothing to follow",
    ),
    "an input without time": (
        lambda: gradient_flow(nn.Linear(4, 3), torch.ones(2, 4), loss=torch.sum),
        "of an unknown dimension of time",
    ),
    "packed": (
        lambda: gradient_flow(
            torch_module("gru"), nn.utils.rnn.pack_padded_sequence(torch.ones(2, 1, 4), [2]), loss=torch.sum
        ),
        "pad_packed_sequence",
    ),
    "wrong width": (lambda: gradient_flow(seqcore.nn.GRU(4, 3), torch.ones(2, 1, 5)), "Expected 4, got 5"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    call, message = ERRORS[case]
    with pytest.raises(InvalidInput, match=message):
        call()
