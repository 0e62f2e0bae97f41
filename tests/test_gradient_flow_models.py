"""Norms of gradients inside models: recurrences among layers, attention, loops of Cells, modules of a user's own."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import seqcore
from seqcore.diagnostics import gradient_flow
from seqcore.diagnostics.magnitude import row_norms

from .comparisons import assert_equal_in_float64
from .recurrence_twins import tensors
from .transformer_twins import causal_mask, swapped

DOUBLE = {"dtype": torch.float64}
T, B, E = 5, 2, 4


def found(flow):
    return {name: flow[name].norms for name in flow}


def norms(gradient):
    """[T], of a gradient whose first dimension is time."""
    return gradient.flatten(1).norm(dim=1)


# --- recurrences among other layers ---------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, recurrence):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, E), nn.Linear(3, 7)
        self.encoder = nn.ModuleDict({"rnn": recurrence})

    def forward(self, tokens):
        return self.head(self.encoder["rnn"](self.embedding(tokens))[0])


@pytest.mark.parametrize("library", [nn, seqcore.nn])
def test_a_model_with_an_embedding_and_a_head(library):
    model, tokens = Tagger(library.LSTM(E, 3, 2)).double(), torch.randint(7, (T, B))
    loss = lambda logits: nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    flow = gradient_flow(model, tokens, loss=loss)
    assert list(flow) == [f"encoder.rnn.{kind}.{layer}" for layer in (0, 1) for kind in "hc"]
    assert str(flow).splitlines()[0].startswith("encoder.rnn.h.0  ∂L/∂h_t ")
    assert flow.loss == pytest.approx(loss(model(tokens)).item())

    y = model.encoder["rnn"](model.embedding(tokens))[0].detach().requires_grad_()
    loss(model.head(y)).backward()
    near = [torch.isclose(a, b) for a, b in zip(flow["encoder.rnn.h.1"].norms, norms(y.grad), strict=True)]
    assert near == [False] * (T - 1) + [True], "all but the last have later steps to go through, too"


class Generator(nn.Module):
    """A recurrence that is called a step at a time."""

    def __init__(self):
        super().__init__()
        self.rnn, self.calls = nn.GRU(E, E), []

    def forward(self, x, steps):
        hx, outputs = None, []
        for _ in range(steps):
            x, hx = self.rnn(x, hx)
            outputs.append(x)
        self.calls.append(torch.cat(outputs))
        return self.calls[-1]


def test_calls_that_carry_the_state_are_one_sequence_and_others_are_not():
    model, x = Generator().double(), torch.randn(1, B, E, **DOUBLE)
    flow = gradient_flow(model, x, T, loss=lambda y: y[-1].sum())
    assert flow["rnn.h"].norms.shape == (T,) and list(flow) == ["input", "rnn.h"]
    model = Tagger(nn.RNN(E, 3)).double()
    twice = lambda logits: (model(torch.ones(3, B, dtype=torch.int64)) - logits[:3]).square().sum()
    flow = gradient_flow(model, torch.zeros(T, B, dtype=torch.int64), loss=twice)
    assert {name: len(flow[name].norms) for name in flow} == {"encoder.rnn.h": T, "encoder.rnn.h#2": 3}


class Checkpointed(nn.Module):
    def __init__(self, recurrence):
        super().__init__()
        self.rnn = recurrence

    def forward(self, x):
        return checkpoint(self.rnn, x, use_reentrant=False)[0]


def test_what_checkpointing_runs_again_counts_once():
    model, x = Checkpointed(nn.GRU(E, 3)).double(), torch.randn(T, B, E, **DOUBLE)
    with set_checkpoint_early_stop(False):
        flow = gradient_flow(model, x, loss=lambda y: y[-1].sum())
    assert_equal_in_float64({"h": flow["rnn.h"].norms}, {"h": gradient_flow(model.rnn, x)["h"].norms})


class OwnForward(nn.LSTM):
    def forward(self, x):
        return super().forward(x.square())


def test_a_recurrence_with_a_forward_of_its_own_is_said_not_to_be_followed():
    model, x = nn.Sequential(OwnForward(E, 3)).double(), torch.randn(T, B, E, **DOUBLE)
    loss = lambda output: output[0][-1].sum()
    flow = gradient_flow(model, x, loss=loss)
    assert "0" in flow.skipped and "not followed: OwnForward has a forward of its own" in str(flow)
    flow = gradient_flow(model, x, loss=loss, watch=["0"])
    assert flow["0.h"].norms.shape == (T,) and not flow.skipped


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("library", [nn, seqcore.nn])
def test_attention_by_itself(library, batch_first):
    module = library.MultiheadAttention(E, 2, batch_first=batch_first).double()
    time = 1 if batch_first else 0
    q, k = (torch.randn((B, n, E) if batch_first else (n, B, E), **DOUBLE).requires_grad_() for n in (T, 3))
    for given in ((q, q, q), (q, k, k)):
        flow = gradient_flow(module, *given)
        q.grad = None
        module(*given)[0].select(time, -1).sum().backward()
        assert_equal_in_float64(found(flow), {"input": norms(q.grad.movedim(time, 0))})
        assert torch.equal(flow["input"].norms > 0, torch.tensor([given[1] is q] * (T - 1) + [True]))


def test_the_last_position_that_is_not_padding():
    module = nn.MultiheadAttention(E, 2, batch_first=True).double()
    x, padding = torch.randn(B, T, E, **DOUBLE), torch.arange(T).expand(B, T) >= torch.tensor([[3], [T]])
    flow = gradient_flow(module, x, x, x, key_padding_mask=padding)
    expected = module(x, x, x, key_padding_mask=padding)[0]
    assert flow.loss == pytest.approx((expected[0, 2] + expected[1, -1]).sum().item())
    additive = torch.zeros(B, T, **DOUBLE).masked_fill(padding, -torch.inf)
    assert gradient_flow(module, x, x, x, key_padding_mask=additive).loss == pytest.approx(flow.loss)


def test_attention_to_one_position_after_another_is_one_sequence():
    model, x = nn.ModuleDict({"attention": nn.MultiheadAttention(E, 2)}).double(), torch.randn(T, B, E, **DOUBLE)
    model.forward = lambda x: sum(model["attention"](x[[t]], x, x)[0] for t in range(T))
    flow = gradient_flow(model, x, loss=torch.sum)
    assert {name: len(flow[name].norms) for name in flow} == {"input": T, "attention.input": T}
    model.forward = lambda x: model["attention"](*[model["attention"](x, x, x)[0]] * 3)[0]
    assert list(gradient_flow(model, x, loss=torch.sum)) == ["input", "attention.input", "attention.input#2"]


class Reader(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(7, E), encoder

    def forward(self, tokens, **masks):
        return self.encoder(self.embedding(tokens), **masks)


# With nothing to train, torch's layers and encoder take another way when they evaluate, unless told not to.
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", ["causal", "padding"])
@pytest.mark.parametrize("whose", ["torch's", "aten", "reference"])
def test_inside_transformer_layers_that_evaluate(whose, masked, frozen):
    layer = nn.TransformerEncoderLayer(E, 2, 8, batch_first=True)
    model = Reader(nn.TransformerEncoder(layer, 1)).double().eval().requires_grad_(not frozen)
    if whose != "torch's":
        model = swapped(model, whose)
    tokens, loss = torch.randint(7, (B, T)), lambda y: y[:, 1].square().sum()
    mask = causal_mask(T).bool() if masked == "causal" else (torch.arange(T) > 2).expand(B, T)
    flow = gradient_flow(model, tokens, loss=loss, **{"mask" if masked == "causal" else "src_key_padding_mask": mask})

    # What goes into attention alone; the residual beside it is x itself.
    layer, x = model.encoder.layers[0], model.embedding(tokens).detach()
    q = x.clone().requires_grad_()
    attended = layer.self_attn(q, q, q, **{"attn_mask" if masked == "causal" else "key_padding_mask": mask})[0]
    inner = layer.norm1(x + attended)
    loss(layer.norm2(inner + layer.linear2(torch.relu(layer.linear1(inner))))).backward()
    name = "encoder.layers.0.self_attn.input"
    assert list(flow) == [name]
    assert_equal_in_float64({name: flow[name].norms}, {name: norms(q.grad.transpose(0, 1))})
    assert flow[name].lags[1 if masked == "causal" else 2] == 0, "nothing later is attended to"


# --- loops of Cells and modules of a user's own ---------------------------------------------------------------------


class State(NamedTuple):
    h: Tensor
    c: Tensor
    n: Tensor


class OwnStep(nn.Module):
    """A recurrence with parameters of its own: three parts of a state."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, E) / 2)

    def forward(self, x, state):
        h, c, n = state
        c = 0.9 * c + torch.tanh(x + h @ self.w)
        return State(torch.tanh(c), c, n + 0.1 * c)


class Retaining(nn.Module):
    """A step whose outputs retain their gradients, no part of the state being made of another."""

    def __init__(self, step):
        super().__init__()
        self.step, self.calls = step, []

    def forward(self, x, state):
        new = self.step(x, state)
        parts = [part.clone() for part in tensors(new)]
        for part in parts:
            part.retain_grad()
        self.calls.append(parts)
        return packed_state(parts)


def packed_state(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


class Loop(nn.Module):
    def __init__(self, step, parts):
        super().__init__()
        self.step, self.parts = step, parts

    def forward(self, x):
        state, outputs = packed_state([x.new_zeros(B, E)] * self.parts), []
        for x_t in x:
            state = self.step(x_t, state)
            outputs.append(sum(tensors(state)))
        return torch.stack(outputs)


STEPS = {
    "torch's GRUCell": (lambda: nn.GRUCell(E, E), 1),
    "our RNNCell": (lambda: seqcore.nn.RNNCell(E, E), 1),
    "torch's LSTMCell": (lambda: nn.LSTMCell(E, E), 2),
    "our LSTMCell": (lambda: seqcore.nn.LSTMCell(E, E, backend="reference"), 2),
    "a user's own": (OwnStep, 3),
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_called_in_a_loop(kind):
    make, parts = STEPS[kind]
    model, x = Loop(make(), parts).double(), torch.randn(T, B, E, **DOUBLE)
    loss = lambda y: (y * torch.arange(1, T + 1)[:, None, None]).sum()
    flow = gradient_flow(model, x, loss=loss, watch=["step"] if kind in ("a user's own", "our RNNCell") else ())
    step = Retaining(model.step)
    loss(Loop(step, parts)(x)).backward()
    calls = [torch.stack([state.grad for state in states]) for states in zip(*step.calls, strict=True)]
    expected = dict(zip(("step.h", "step.c", "step.s2"), map(norms, calls), strict=False))
    assert_equal_in_float64(found(flow), expected)


# --- what is made of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e307])
def test_norms_neither_underflow_nor_overflow(scale):
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], **DOUBLE) * scale
    assert_equal_in_float64({"norms": row_norms(rows) / scale}, {"norms": torch.tensor([5.0, 0.0], **DOUBLE)})
    odd = row_norms(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0]]))
    assert odd[0].isinf() and odd[1].isnan()


def test_plots_show_every_step():
    pytest.importorskip("matplotlib", reason="plots are matplotlib's").use("Agg")
    import matplotlib.pyplot as plt

    flow = gradient_flow(nn.LSTM(E, 3), torch.randn(T, B, E))
    ax = flow.plot()
    assert [line.get_label() for line in ax.lines] == ["input", "h", "c"] and ax.get_yscale() == "log"
    assert list(ax.lines[1].get_ydata()) == flow["h"].norms.tolist()
    assert flow["h"].plot(ax) is ax and len(ax.lines) == 4
    plt.close("all")
