"""The reference recurrences against torch.nn in float64, and what torch.nn lacks against running the pieces apart."""

import pytest
import torch

from seqcore import cells, functional
from seqcore.reference import bptt, recurrence
from seqcore.reference.recurrence import Weights

from .comparisons import assert_equal_in_float64, cotangents
from .recurrence_twins import CELLS, FLAGS, initial_state, ours, packed, results, tensors, torch_module

DOUBLE = {"dtype": torch.float64}
T, B, I, H = 7, 5, 4, 3


def reference_twins(cell, **options):
    """The same weights in torch.nn and on the reference."""
    twin = torch_module(cell, I, H, **options, **DOUBLE)
    return twin, ours(twin, "reference")


@pytest.mark.parametrize("given", [False, True], ids=["hx_default", "hx_given"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("cell", CELLS)
def test_padded(cell, flags, given):
    twin, module = reference_twins(cell, **FLAGS[flags])
    x = torch.randn(T, B, I, **DOUBLE)
    hx = initial_state(twin, T if twin.batch_first else B, **DOUBLE) if given else None
    assert_equal_in_float64(results(module, x, hx), results(twin, x, hx))


@pytest.mark.parametrize("lengths", [[7, 7, 4, 2, 1], [2, 7, 1, 7, 4], [7]], ids=["sorted", "unsorted", "one"])
@pytest.mark.parametrize("flags", ["plain", "all"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, flags, lengths):
    twin, module = reference_twins(cell, **FLAGS[flags])
    x = packed(torch.randn(len(lengths), T, I, **DOUBLE), lengths, batch_first=True)
    hx = initial_state(twin, len(lengths), **DOUBLE)
    assert_equal_in_float64(results(module, x, hx), results(twin, x, hx))
    assert_equal_in_float64(results(module, x), results(twin, x))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 5, 3, 1), (7, 1, 1, 31), (7, 0, 4, 3)], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_odd_shapes(cell, shape):
    time, batch, inputs, hidden = shape
    twin = torch_module(cell, inputs, hidden, bidirectional=True, **DOUBLE)
    x = torch.randn(time, batch, inputs, **DOUBLE)
    hx = initial_state(twin, batch, **DOUBLE)
    assert_equal_in_float64(results(ours(twin, "reference"), x, hx), results(twin, x, hx))


# --- lengths and reset: each row, and each piece of a row between two resets, stands for itself --------------------


def alone(twin, x, hx, cuts):
    """y and the final states of one sequence [T, 1, I], run piece by piece between ``cuts``.

    The first piece starts from ``hx`` going forward and the last one going backward; all others start from zeros.
    """
    backward = torch.arange(tensors(hx)[0].shape[0]) % (2 if twin.bidirectional else 1) == 1
    starts = sorted({0, *cuts})
    pieces = list(zip(starts, [*starts[1:], x.shape[0]], strict=True))
    outputs, finals = [], []
    for start, stop in pieces:
        entering = []
        for state in tensors(hx):
            forward_cut, backward_cut = start > 0 or 0 in cuts, stop < x.shape[0]
            cut = torch.where(backward, torch.tensor(backward_cut), torch.tensor(forward_cut))
            entering.append(state * ~cut[:, None, None])
        y, state = twin(x[start:stop], tuple(entering) if len(entering) == 2 else entering[0])
        outputs.append(y)
        finals.append(tensors(state))
    last = [
        torch.where(backward[:, None, None], first, final) for first, final in zip(finals[0], finals[-1], strict=True)
    ]
    return torch.cat(outputs), last


class RowByRow(torch.nn.Module):
    """What ``lengths`` and ``reset`` mean, said with torch.nn alone."""

    def __init__(self, twin):
        super().__init__()
        self.twin = twin

    def named_parameters(self, *args, **keywords):
        return self.twin.named_parameters(*args, **keywords)

    def forward(self, x, hx, lengths=None, reset=None):
        time, batch = x.shape[:2]
        outputs, finals = [], []
        for b in range(batch):
            length = time if lengths is None else int(lengths[b])
            row = tuple(state[:, b : b + 1] for state in tensors(hx))
            cuts = [] if reset is None else reset[:length, b].nonzero().flatten().tolist()
            if length == 0:
                y, final = x.new_zeros(0, 1, self.width()), list(row)
            else:
                y, final = alone(self.twin, x[:length, b : b + 1], row, cuts)
            outputs.append(torch.cat([y, y.new_zeros(time - length, 1, y.shape[-1])]))
            finals.append(final)
        state = tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))
        return torch.cat(outputs, 1), state if len(state) == 2 else state[0]

    def width(self):
        return (self.twin.proj_size or self.twin.hidden_size) * (2 if self.twin.bidirectional else 1)


LENGTHS = {
    "lengths": torch.tensor([3, 7, 0, 1, 5]),
    "lengths_full": torch.full((B,), T),
    "lengths_none_full": torch.tensor([2, 1, 3, 1, 2], dtype=torch.int32),
}
# A row with no reset, one at the first step, one at the last, several, and all.
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[0, 1] = RESET[-1, 2] = RESET[3, 3] = RESET[4, 3] = RESET[1, 3] = True
RESET[:, 4] = True
MASKS = {
    **{name: {"lengths": lengths} for name, lengths in LENGTHS.items()},
    "reset": {"reset": RESET},
    "reset_first": {"reset": (torch.arange(T) == 0)[:, None].expand(T, B)},
    "reset_with_lengths": {"reset": RESET.roll(2, 1), "lengths": LENGTHS["lengths"]},
    "reset_always_with_lengths": {"reset": torch.ones(T, B, dtype=torch.bool), "lengths": LENGTHS["lengths"]},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "deep_both_ways"])
@pytest.mark.parametrize("cell", CELLS)
def test_masked_rows_run_as_their_pieces_would_alone(cell, options, masks):
    twin, module = reference_twins(cell, **options)
    x, hx = torch.randn(T, B, I, **DOUBLE), initial_state(twin, B, **DOUBLE)
    assert_equal_in_float64(results(module, x, hx, **MASKS[masks]), results(RowByRow(twin), x, hx, **MASKS[masks]))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_do_what_packing_does(cell):
    twin, module = reference_twins(cell, num_layers=2, bidirectional=True)
    lengths = [3, 7, 1, 1, 5]
    x, hx = torch.randn(T, B, I, **DOUBLE), initial_state(twin, B, **DOUBLE)
    y, state = module(x, hx, lengths=torch.tensor(lengths))
    packed_y, packed_state = twin(packed(x, lengths), hx)
    torch.testing.assert_close(y, torch.nn.utils.rnn.pad_packed_sequence(packed_y, total_length=T)[0])
    torch.testing.assert_close(state, packed_state)


@pytest.mark.parametrize("cell", CELLS)
def test_reset_cuts_off_what_is_not_finite(cell):
    _, module = reference_twins(cell)
    x = torch.randn(T, B, I, **DOUBLE)
    x[2, 0] = float("nan")
    y, _ = module(x, reset=(torch.arange(T) == 4)[:, None].expand(T, B))
    assert y[2:4, 0].isnan().all() and y[4:].isfinite().all() and y[:, 1:].isfinite().all()


def test_masks_follow_batch_first():
    time_major = torch_module("gru", bidirectional=True, **DOUBLE)
    module = ours(time_major, "reference")
    x, masks = torch.randn(T, B, I, **DOUBLE), MASKS["reset_with_lengths"]
    expected, expected_state = module(x, **masks)
    module.batch_first = True
    y, state = module(x.transpose(0, 1), lengths=masks["lengths"], reset=masks["reset"].T)
    assert torch.equal(y.transpose(0, 1), expected) and torch.equal(state, expected_state)


# --- derivatives ---------------------------------------------------------------------------------------------------


def small_layer(cell, directions=2, batch=2, inputs=2, hidden=2, outputs=None):
    """h0, c0 or None and the flat weights of one small layer, all random."""
    gates, outputs = cells.find(cell).gates * hidden, outputs or hidden
    shapes = [(gates, inputs), (gates, outputs), (gates,), (gates,)]
    if outputs != hidden:
        shapes.append((outputs, hidden))
    weights = [torch.randn(shape, **DOUBLE) for _ in range(directions) for shape in shapes]
    c0 = torch.randn(directions, batch, hidden, **DOUBLE) if cell == "lstm" else None
    return torch.randn(directions, batch, outputs, **DOUBLE), c0, weights


@pytest.mark.parametrize("cell, width", [("rnn_tanh", 2), ("rnn_relu", 2), ("gru", 2), ("lstm", 2), ("lstm", 1)])
def test_first_and_second_derivatives(cell, width):
    h0, c0, weights = small_layer(cell, outputs=width)
    x = torch.randn(3, 2, 2, **DOUBLE)
    masks = torch.tensor([3, 2]), torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.bool)

    def run(x, h0, *rest):
        c0, weights = (None, rest) if cell != "lstm" else (rest[0], rest[1:])
        grouped = recurrence.group(weights, directions=2, bias=True)
        found = recurrence.layer(cell, x, h0, c0, grouped, recurrence.padded_steps(3, 2), *masks)
        return tuple(t for t in found if t is not None)

    inputs = [t.requires_grad_() for t in (x, h0, c0, *weights) if t is not None]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


LAYOUTS = {
    "padded": {},
    **{name: MASKS[name] for name in ("lengths", "reset", "reset_with_lengths")},
    "packed": {"batch_sizes": torch.tensor([5, 5, 4, 2, 2, 1, 1])},
}


@pytest.mark.parametrize(
    "layout, option",
    [
        *((layout, "") for layout in LAYOUTS),
        # Each gradient coming in, and the one going out, absent once.
        *(("reset_with_lengths", name) for name in ("dy", "dh_n", "dc_n", "dcells", "dx")),
        *((layout, option) for layout in ("reset_with_lengths", "packed") for option in ("clip", "recompute")),
    ],
)
@pytest.mark.parametrize("cell, width", [("rnn_tanh", H), ("rnn_relu", H), ("gru", H), ("lstm", H), ("lstm", 2)])
def test_backward_through_time_by_hand(cell, width, layout, option):
    """bptt.py against autograd through recurrence.py."""
    masks = dict(LAYOUTS[layout])
    sizes = masks.pop("batch_sizes", None)
    steps = recurrence.padded_steps(T, B) if sizes is None else recurrence.packed_steps(sizes)
    clip = 0.1 if option == "clip" else None
    h0, c0, weights = small_layer(cell, batch=B, inputs=I, hidden=H, outputs=width)
    x = torch.randn(T, B, I, **DOUBLE) if sizes is None else torch.randn(int(sizes.sum()), I, **DOUBLE)
    inputs = [t.requires_grad_() for t in (x, h0, c0, *weights) if t is not None]
    grouped = recurrence.group(weights, directions=2, bias=True)
    expected = recurrence.layer(cell, x, h0, c0, grouped, steps, **masks, grad_clip=clip)
    given = [
        None if out is None or name == option else cotangents([out])[0]
        for name, out in zip(("dy", "dh_n", "dc_n", "dcells"), expected, strict=True)
    ]
    outputs, grads = zip(*[pair for pair in zip(expected, given, strict=True) if pair[1] is not None], strict=True)
    wanted = torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)

    with torch.no_grad():
        rows, layout = x.flatten(0, -2), bptt.Layout(steps, **masks)
        y, h_n, c_n, kept = bptt.forward(cell, rows, h0, c0, grouped, layout, option != "recompute", True)
        dy, dcells = (None if grad is None else grad.flatten(0, -2) for grad in (given[0], given[3]))
        gradients = bptt.Gradients(dy, given[1], given[2], dcells)
        dx, dh0, dc0, dweights = bptt.backward(
            cell, rows, h0, c0, grouped, layout, y, kept, gradients, clip, need_dx=option != "dx"
        )
    found = [y.view_as(expected[0]), h_n] if c0 is None else [y.view_as(expected[0]), h_n, c_n]
    torch.testing.assert_close(found, list(expected[: len(found)]))
    if c0 is not None:
        torch.testing.assert_close(kept.cells.view_as(expected[3]), expected[3])
    assert dx.numel() == (0 if option == "dx" else x.numel())
    torch.testing.assert_close([dh0, dc0, *dweights] if c0 is not None else [dh0, *dweights], list(wanted[1:]))
    if option != "dx":
        torch.testing.assert_close(dx.view_as(x), wanted[0])


@pytest.mark.parametrize("cell", CELLS)
def test_forward_keeps_only_what_was_asked_for(cell):
    """All gates; with recompute the c's, and of a projected LSTM the h's; nothing where y has it already."""
    name, width = ("lstm", 2) if cell == "lstm_proj" else (cell, H)
    h0, c0, weights = small_layer(name, batch=B, inputs=I, hidden=H, outputs=width)
    grouped, layout = recurrence.group(weights, 2, bias=True), bptt.Layout(recurrence.padded_steps(T, B))
    x, tile, gated = torch.ones(T * B, I, **DOUBLE), T * B * 2 * H, cell in ("gru", "lstm", "lstm_proj")
    plain, every, recomputing = (
        bptt.forward(name, x, h0, c0, grouped, layout, *asked)
        for asked in ((False, False), (True, True), (False, True))
    )
    states = [(name == "lstm") * tile, (cell == "lstm_proj") * tile]
    assert [t.numel() for t in plain[3]] == [0, 0, 0]
    assert [t.numel() for t in every[3]] == [gated * 4 * tile, *states]
    assert [t.numel() for t in recomputing[3]] == [0, *states]
    for found in (every, recomputing):
        assert all(torch.equal(a, b) for a, b in zip(plain[:3], found[:3], strict=True))


# --- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_results_have_the_input_dtype(cell, dtype):
    module = ours(torch_module(cell, dtype=dtype), "reference")
    found = results(module, torch.randn(T, B, I, dtype=dtype), initial_state(module, B, dtype=dtype))
    assert {value.dtype for value in found.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cell_state_is_kept_in_float32(dtype):
    """An increment below half a rounding of c in 16 bits, repeated, must add up."""
    steps, increment = 64, torch.finfo(dtype).eps / 8
    weights = [torch.zeros(4, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)]
    # Gates from the bias alone: i = f = 1, g = the increment.
    b_ih = torch.tensor([30.0, 30.0, increment, 0.0], dtype=dtype)
    hx = torch.zeros(1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
    x = torch.zeros(steps, 1, 1, dtype=dtype)
    _, (_, c_n) = functional.lstm(x, hx, [*weights, b_ih, torch.zeros_like(b_ih)], backend="reference")
    assert c_n.item() == pytest.approx(1 + steps * increment, abs=torch.finfo(dtype).eps)


def test_group_orders_weights_as_torch_does():
    module = torch_module("lstm_proj", bidirectional=True)
    forward, backward = recurrence.group(module._flat_weights, directions=2, bias=True)
    assert backward == Weights(*module._flat_weights[5:]) and forward.w_hr is module.weight_hr_l0
    bare = torch_module("lstm", bias=False)
    assert recurrence.group(bare._flat_weights, 1, bias=False) == [Weights(bare.weight_ih_l0, bare.weight_hh_l0)]
