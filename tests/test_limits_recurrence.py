"""The recurrences' kernels, interpreted, on tensors of more than 2^31 elements."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from seqcore.kernels import floors
from seqcore.kernels.recurrence import pointwise
from seqcore.kernels.recurrence.cells import gru_step, lstm_step
from seqcore.kernels.recurrence.products import gate_weights, unit_weights
from seqcore.ops import recurrence as recurrence_ops

from .recurrence_twins import differing, mapped, masks, ours, problem, results, tensors
from .vast import FAR, ON_THEM, at_the_end, corner, running, vast

pytestmark = ON_THEM

# What each pointer of the sequence kernels points to; R rows are T steps of B sequences.
OF_ROWS = ("y_ptr", "cells_ptr", "dy_ptr", "dcells_ptr")
OF_DIRECTIONS_AND_ROWS = ("x_gates_ptr", "saved_ptr", "dx_gates_ptr", "dh_gates_ptr")
OF_SEQUENCES = ("h_init_ptr", "c_init_ptr", "h_n_ptr", "c_n_ptr", "dh_n_ptr", "dc_n_ptr", "dh_init_ptr", "dc_init_ptr")
# So many sequences before those of a test that steps of theirs, rows of states and what belongs to a direction are far.
BEFORE = 2**30


class FarBatch:
    """Launches of the sequence kernels for the last sequences of a batch of more than 2^30."""

    def __init__(self, run: Callable) -> None:
        self.run, self.largest = run, 0

    def __call__(self, kernel, *arguments, **keywords):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        if "first_group" not in given:
            return self.run(kernel, *arguments, **keywords)
        T, B, D = given["T"], given["B"], given["y_width"]
        batch = BEFORE + B
        numbers = {"B": batch, "R": T * batch, "first_group": BEFORE // given["BLOCK_B"]}
        numbers["initial_rows"] = given["initial_rows"] // B * batch
        if "saved_direction" in given:
            numbers["saved_direction"] = T * batch * given["saved_width"]
        # In the place of a tensor that is not there stands one of the first kind, and is to be taken for that.
        places = dict.fromkeys(OF_DIRECTIONS_AND_ROWS, (D, T, B, -1)) | dict.fromkeys(OF_ROWS, (T, B, -1))
        places |= dict.fromkeys(OF_SEQUENCES, (D, -1, B, given["UNITS"] * given["BLOCKS"]))
        moved = {}
        for name, place in places.items():
            tensor = given.get(name)
            if tensor is not None and tensor.numel() and tensor.data_ptr() not in moved:
                near = tensor.view(place)
                shape = [batch if size == B and dim == near.dim() - 2 else size for dim, size in enumerate(near.shape)]
                moved[tensor.data_ptr()] = near, at_the_end(near, *shape)
        self.largest = max(self.largest, *(far.numel() for _, far in moved.values()))
        tensors = {
            name: moved[value.data_ptr()][1]
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.data_ptr() in moved
        }
        if given["MAPPED"]:
            tensors |= self._map(given, T, B, D, batch)
        found = self.run(kernel, **given | numbers | tensors)
        for near, far in moved.values():
            near.copy_(corner(far, near.shape))
        return found

    @staticmethod
    def _map(given, T, B, D, batch):
        """The map of the rows, in their new places."""

        def row(at):
            initial = T * batch + (at - T * B) // B * batch + BEFORE + (at - T * B) % B
            return torch.where(at < 0, at, torch.where(at < T * B, at // B * batch + BEFORE + at % B, initial))

        return {
            "offset_ptr": torch.arange(T) * batch,
            "active_ptr": torch.full((T,), batch),
            "source_ptr": at_the_end(row(given["source_ptr"]).view(D, T, B), D, T, batch),
            "last_ptr": at_the_end(row(given["last_ptr"]), D, batch),
            "steps_ptr": at_the_end(given["steps_ptr"], BEFORE // given["BLOCK_B"] + len(given["steps_ptr"])),
        }


@pytest.mark.parametrize("form", ["padded", "masked", "reset to given states"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sequences(cell, form, monkeypatch):
    from triton.runtime import interpreter

    twin, x, hx = problem(cell, T=4, B=5, I=3, H=3, bidirectional=True)
    module = ours(twin, "triton")
    keywords = {} if form == "padded" else masks()

    def run():
        if form != "reset to given states":
            return results(module, x, hx, **keywords)
        given = mapped(lambda t: t.detach().requires_grad_(), hx)
        outputs = module(x, hx, **keywords, reset_hx=given)
        gradients = torch.autograd.grad(outputs[0].sum(), [*tensors(given), module.weight_hh_l0_reverse])
        return dict(enumerate([*tensors(outputs), *gradients]))

    expected = run()
    launch = FarBatch(interpreter.InterpretedFunction.run)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *given, **named: launch(*given, **named))
    found = run()
    assert launch.largest > FAR
    assert not differing(found, expected)


def test_single_steps(monkeypatch):
    """Of the last sequences; one of the launch's numbers of programs is that of the slices, of which there are two."""
    B, I, H = 2**27 + 5, 3, 31
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **_: vast(*_sizes(shape), dtype=self.dtype))
    weights = [torch.randn(size) for size in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    near = [torch.randn(1, 5, width) for width in (I, H, H)]

    def step(x, h, c):
        with torch.no_grad():
            return recurrence_ops._forward("lstm", x, h, c, weights, 1, True, None, None, None, True, True)

    expected = step(*near)
    with running(lambda count: [count // 2 - 1, count - 1]):
        found = step(*(at_the_end(t, 1, B, t.shape[-1]) for t in near))
    assert found[0].numel() > FAR
    for far, tensor in zip(found[:5], expected[:5], strict=True):
        assert tensor.any() and torch.equal(corner(far, tensor.shape), tensor)


def _sizes(shape):
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


@pytest.mark.parametrize("step, gates, saved", [(lstm_step, 4, 4), (gru_step, 3, 4)], ids=["lstm", "gru"])
def test_pointwise_steps(step, gates, saved):
    H, few, many = 33, 5, 2**27 + 1
    x_gates, h_gates, h, c = (torch.randn(few, width * H) for width in (gates, gates, 1, 1))

    def run(x_gates, h_gates, h, c, kept):
        rows = h.shape[0]
        pointwise.pointwise_kernel[(-(-rows // 4) * 3,)](
            x_gates, h_gates, h, c, kept, rows, H, gates * H, saved * H,
            STEP=step, GATES=gates, EXTRA=0, SAVED=saved, HAS_C=step is lstm_step, BLOCK_B=4, BLOCK_H=16,
        )  # fmt: skip
        return kept

    expected = run(x_gates, h_gates, h, c, torch.zeros(few, saved * H))
    far = [at_the_end(t, many, t.shape[1]) for t in (x_gates, h_gates, h, c)]
    blocks = -(-many // 4)
    with running(lambda _: [column * blocks + block for column in range(3) for block in (blocks - 2, blocks - 1)]):
        found = run(*far, vast(many, saved * H))
    assert h.shape[1] * many > FAR and torch.equal(corner(found, expected.shape), expected)


@triton.jit
def weights_kernel(
    w_ptr, gate_ptr, unit_ptr, block, first_unit, tile, GATES: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """A tile of each kind, of 16 places of the contraction by 16 units."""
    gates = gate_weights(w_ptr, block, first_unit, tile, 1, GATES - 1, 1, GATES, BLOCKS, UNITS, UNITS, 16, 16, SWAP)
    units = unit_weights(w_ptr, block, first_unit, GATES * (tile + 1) - 1, 1, GATES, BLOCKS, UNITS, 16, 16, SWAP)
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(gate_ptr + offs, gates)
    tl.store(unit_ptr + offs, units)


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("gates, blocks, units", [(4, 1, 23184), (4, 3, 2**14)], ids=["one", "blocks"])
def test_weights(gates, blocks, units, swap):
    """The last tiles of W [gates, blocks, units, units]."""
    weights = vast(gates, blocks, units, units)
    assert weights.numel() > FAR
    there = weights[-1, -1, -16:, -16:].copy_(torch.arange(256.0).view(16, 16))
    found = torch.zeros(2, 16, 16)
    weights_kernel[(1,)](
        weights, *found, blocks - 1, units - 16, units // 16 - 1, GATES=gates, BLOCKS=blocks, UNITS=units, SWAP=swap
    )
    # The one kind stands along the places that lead to a unit, the other along the units that are led to.
    assert torch.equal(found[0], there if swap else there.T)
    assert torch.equal(found[1], there.T if swap else there)


def test_exchange():
    """The kernel that measures the least time of a step, with teams of one program."""
    teams, T, width, rows = 2**25, 2, 37, 2

    def run(teams):
        buffer = vast(T + 1, teams * rows, width, dtype=torch.int32)
        corner(buffer[:1], (1, rows, width)).copy_(torch.arange(rows * width).view(1, rows, width))
        counters = vast(teams * 32, dtype=torch.int32)
        floors.exchange_kernel[(teams,)](
            buffer, counters, T, teams, SLICES=1, WIDTH=width, SHARE=width, BLOCK_B=rows, BLOCK_K=64
        )
        return buffer

    expected = run(1)
    with running(lambda count: [count - 1]):
        found = run(teams)
    assert found.numel() > FAR and expected[-1].all()
    assert torch.equal(corner(found, expected.shape), expected)
