"""Sequences in chunks: what carries a state over equals one call, and truncated_bptt cuts the graph between chunks."""

import weakref

import pytest
import torch
from torch import nn

import seqcore
from seqcore import InvalidInput, truncated_bptt

from .comparisons import assert_equal_in_float64, assert_within
from .recurrence_twins import CELLS, mapped, masks, ours, packed, problem, tensors, torch_module

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, STEPS = 7, 3
DOUBLE = {"dtype": torch.float64}
LENGTHS = torch.tensor([7, 3, 0, 5, 1])


def named(y, hx):
    return dict(zip(("y", "h_n", "c_n"), [y, *tensors(hx)], strict=False))


def streamed(module, x, hx, steps=STEPS, **given):
    """The outputs of a time-major ``module`` called chunk by chunk, by hand."""
    outputs = []
    for start in range(0, len(x), steps):
        chunk, here = x[start : start + steps], dict(given)
        if "lengths" in given:
            here["lengths"] = (given["lengths"] - start).clamp(0, len(chunk))
        if "reset" in given:
            here["reset"] = given["reset"][start : start + steps]
        y, hx = module(chunk, hx, **here)
        outputs.append(y)
    return named(torch.cat(outputs), hx)


def in_chunks(module, x, steps=STEPS, hx=None, **given):
    """The outputs of ``truncated_bptt``, put together."""
    outputs = []
    for y, state in truncated_bptt(module, x, steps, hx, **given):
        outputs.append(y)
        hx = state
    return named(torch.cat(outputs, 1 if module.batch_first and x.dim() == 3 else 0), hx)


def ragged(name):
    """What makes a batch ragged, by name; nothing for "plain", which torch's operators run, too."""
    return {"plain": {}, "lengths": {"lengths": LENGTHS}, "reset": {"reset": torch.rand(T, 5) < 0.3}}[name]


# --- the state carried over by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["plain", "lengths", "reset"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cell", CELLS)
def test_streaming_equals_one_call(cell, backend, mask):
    twin, x, hx = problem(cell, T=T, num_layers=2, **DOUBLE)
    module, given = ours(twin, backend), ragged(mask)
    assert_equal_in_float64(streamed(module, x, hx, **given), named(*module(x, hx, **given)))


@pytest.mark.kernels
@pytest.mark.parametrize("mask", ["plain", "lengths", "reset"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm_proj"])
def test_kernels_stream(cell, mask, device):
    twin, x, hx = problem(cell, T=T, H=7, num_layers=2, device=device)
    given = {name: value.to(device) for name, value in ragged(mask).items()}
    found = streamed(ours(twin, "triton"), x, hx, **given)
    exact, eager = (
        named(*module(*mapped(lambda t, like=module: t.to(next(like.parameters()).dtype), (x, hx)), **given))
        for module in (ours(twin, "reference").double(), ours(twin, "reference"))
    )
    assert_within(found, exact, eager)


# --- truncated_bptt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 7, 100])
@pytest.mark.parametrize("whose", ["ours", "torch's"])
@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_one_call(cell, whose, steps):
    twin, x, hx = problem(cell, T=T, **DOUBLE)
    module = ours(twin, None) if whose == "ours" else twin
    assert_equal_in_float64(in_chunks(module, x, steps, hx), named(*module(x, hx)))
    assert_equal_in_float64(in_chunks(module, x, steps), named(*module(x)))
    assert_equal_in_float64(in_chunks(module, x[:, 0], steps), named(*module(x[:, 0])))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_chunks_of_a_ragged_batch(cell, batch_first):
    twin, x, hx = problem(cell, T=4, batch_first=batch_first, **DOUBLE)
    module, given = ours(twin, None), masks()
    given["reset"] = given["reset"].T if batch_first else given["reset"]
    assert_equal_in_float64(in_chunks(module, x, 3, hx, **given), named(*module(x, hx, **given)))
    whole = module(x, hx, lengths=given["lengths"])
    assert_equal_in_float64(in_chunks(module, x, 3, hx, lengths=[2, 4, 0, 1, 3]), named(*whole))


@pytest.mark.parametrize("whose", ["ours", "torch's"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_loop_written_out(cell, whose):
    twin, x, hx = problem(cell, T=T, num_layers=2, **DOUBLE)
    module = ours(twin, None) if whose == "ours" else twin
    x, hx = (mapped(lambda t: t.requires_grad_(), value) for value in (x, hx))
    wanted = [x, *tensors(hx), *module.parameters()]

    loss, state = 0, hx
    for start in range(0, T, STEPS):
        y, state = twin(x[start : start + STEPS], state)
        loss = loss + (start + 1) * y.square().sum()
        state = mapped(torch.Tensor.detach, state)
    expected = torch.autograd.grad(loss, [x, *tensors(hx), *twin.parameters()])

    chunks = truncated_bptt(module, x, STEPS, hx)
    loss = sum((start + 1) * y.square().sum() for start, (y, _) in zip(range(0, T, STEPS), chunks, strict=True))
    for found, exact in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_a_chunk_sees_the_step_that_the_one_before_led_to():
    twin, x, _ = problem("gru", T=6, **DOUBLE)
    module = ours(twin, None)
    for each, chunks in ((module, truncated_bptt(module, x, 3)), (twin, [None] * 2)):
        optimizer, hx = torch.optim.SGD(each.parameters(), lr=0.1), None
        for start, chunk in zip((0, 3), chunks, strict=True):
            y, hx = chunk or each(x[start : start + 3], hx)
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            hx = hx.detach()
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


class Saved:
    """A tensor that autograd keeps; unlike tensors and nodes of a graph it can be counted while it lives."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # a result would hold the node that saves it


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_graph_of_a_chunk_is_freed_before_the_next_is_made(cell):
    twin, x, _ = problem(cell, T=T)
    module, alive, before, after = ours(twin, "reference"), weakref.WeakSet(), [], []
    module.register_forward_pre_hook(lambda *_: before.append(len(alive)))

    def save(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        for chunk in truncated_bptt(module, x, 1):
            after.append(len(alive))
            assert all(t.requires_grad for t in tensors(chunk))
            del chunk
    assert before == [0] * T and after == [after[0]] * T and after[0] > 0


WRONG = {
    "is bidirectional": (lambda m, x: (ours(torch_module("gru", bidirectional=True), None), x, 2), {}),
    "got a PackedSequence": (lambda m, x: (m, packed(x, [3, 3, 2, 1, 1]), 2), {}),
    "at least 1, got 0": (lambda m, x: (m, x, 0), {}),
    "at least 1, got 1.5": (lambda m, x: (m, x, 1.5), {}),
    "a graph of its own": (lambda m, x: (m, x.requires_grad_() * 2, 2), {}),
    "got LSTMCell": (lambda m, x: (nn.LSTMCell(4, 3), x, 2), {}),
    "got \\[4\\]": (lambda m, x: (m, x[0, 0], 2), {}),
    "at least one time step": (lambda m, x: (m, x[:0], 2), {}),
    "need a module of seqcore.nn": (lambda m, x: (nn.GRU(4, 3), x, 2), {"lengths": [1] * 5}),
    "lengths must lie in 0 … 3, got 1 … 4": (lambda m, x: (m, x, 2), {"lengths": [1, 2, 3, 4, 1]}),
    "got torch.bool \\[2, 5\\]": (lambda m, x: (m, x, 2), {"reset": torch.zeros(2, 5, dtype=torch.bool)}),
    "got 2-D": (lambda m, x: (m, x[:, 0], 2), {"lengths": [1]}),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_said_before_the_first_chunk(said):
    arguments, options = WRONG[said]
    said = said.replace("is bidirectional", "a bidirectional module")
    with pytest.raises(InvalidInput, match=said):
        truncated_bptt(*arguments(seqcore.nn.GRU(4, 3), torch.randn(3, 5, 4)), **options)


# What torch's own compiler does to itself.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_module_is_taken():
    module = torch.compile(seqcore.nn.GRU(4, 3), backend="eager")
    x, lengths = torch.randn(4, 5, 4), torch.tensor([4, 2, 1, 0, 3])
    found = in_chunks(module, x, 2, lengths=lengths)
    torch.testing.assert_close(found["y"], module._orig_mod(x, lengths=lengths)[0])
