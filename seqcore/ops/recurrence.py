"""``seqcore::recurrence_forward`` and ``_backward``: one recurrent layer, all its directions, over a whole sequence.

The products are the library's; the pointwise math of each step is one launch of ``kernels/recurrence/cells.py``.
Weights come flat, ``weights_per_direction`` to a direction, in the order of ``reference.recurrence.Weights``.
"""

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..reference import bptt
from ..reference.bptt import SAVED, Layout
from ..reference.recurrence import GATES, group, packed_steps, padded_steps, wide
from .library import define, interpreted

FORWARD_SCHEMA = (
    "(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int directions, bool bias, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int directions, bool bias, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset, Tensor y, Tensor saved, Tensor cells, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
    "bool need_dx) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def _layout(x: Tensor, h0: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None) -> Layout:
    if batch_sizes is None:
        return Layout(padded_steps(x.shape[0], x.shape[1]), lengths, reset)
    steps = packed_steps(batch_sizes)
    # In a compiled graph nobody has looked at these values before.
    if steps.active[0] != h0.shape[1] or sum(steps.active) != x.shape[0]:
        raise InvalidInput(
            f"recurrence: a PackedSequence of {steps.active[0]} sequences and {sum(steps.active)} rows needs hx of as "
            f"many sequences and data of as many rows, got {h0.shape[1]} and {x.shape[0]}"
        )
    return Layout(steps, lengths, reset)


class _Launcher:
    """The pointwise kernels, behind the interface the time loop calls them by."""

    def forward(self, cell, x_gates, h_gates, h, c, saved):
        from ..kernels import tuning
        from ..kernels.recurrence import cells

        batch, hidden = x_gates.shape[0], x_gates.shape[1] // GATES[cell]
        # A projected h is not hidden wide and no cell that projects reads it; x_gates stands in for the pointer.
        entering = _rows(h) if h.shape[1] == hidden else x_gates
        new_h = torch.empty(batch, hidden, dtype=h.dtype, device=h.device)
        new_c = None if c is None else torch.empty(batch, hidden, dtype=torch.float32, device=h.device)
        if batch:
            tiles = tuning.pointwise_tiles(batch, hidden)
            cells.pointwise_forward_kernel[_grid(tiles, batch, hidden)](
                x_gates, h_gates.contiguous(), entering, _dense(c, h), new_h, _dense(new_c, h), _dense(saved, h),
                batch, hidden, x_gates.stride(0), entering.stride(0), hidden,
                STEP=getattr(cells, f"{cell}_step"), GATES=GATES[cell], SAVED=SAVED[cell],
                HAS_C=c is not None, SAVE=saved is not None,
                BLOCK_B=tiles.rows, BLOCK_H=tiles.columns, num_warps=tiles.num_warps,
            )  # fmt: skip
        return new_h, new_c

    def backward(self, cell, saved, h, c, new_c, dh, dc, dx_gates, dh_gates):
        from ..kernels import tuning
        from ..kernels.recurrence import cells

        batch, hidden = dh.shape
        entering = _rows(h) if h.shape[1] == hidden else saved
        dh_in = torch.empty_like(dh, memory_format=torch.contiguous_format)
        dc_in = None if dc is None else torch.empty_like(dh_in)
        if batch:
            tiles = tuning.pointwise_tiles(batch, hidden)
            cells.pointwise_backward_kernel[_grid(tiles, batch, hidden)](
                saved, entering, _dense(c, dh), _dense(new_c, dh), dh.contiguous(), _dense(dc, dh),
                dx_gates, dh_gates, dh_in, _dense(dc_in, dh), batch, hidden, entering.stride(0),
                STEP_BACKWARD=getattr(cells, f"{cell}_step_backward"), GATES=GATES[cell], SAVED=SAVED[cell],
                HAS_C=c is not None, SPLIT=cell == "gru",
                BLOCK_B=tiles.rows, BLOCK_H=tiles.columns, num_warps=tiles.num_warps,
            )  # fmt: skip
        return dh_in, dc_in


def _grid(tiles, batch: int, hidden: int) -> tuple[int, int]:
    return -(-batch // tiles.rows), -(-hidden // tiles.columns)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A contiguous tensor for the kernel; where there is none, any pointer, which the kernel is compiled not to use."""
    return stand_in if tensor is None else tensor.contiguous()


def _math(x: Tensor) -> bptt.Pointwise:
    return _Launcher() if x.is_cuda or interpreted(x.dtype) else bptt.PLAIN


def _forward(cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, save):
    rows = x.flatten(0, -2)
    layout = _layout(x, h0, batch_sizes, lengths, reset)
    grouped = group(weights, directions, bias)
    y, h_n, c_n, saved, cells = bptt.forward(cell, rows, h0, c0, grouped, layout, save, _math(x))
    return y.view(*x.shape[:-1], y.shape[-1]), h_n, c_n, saved, cells


def _forward_fake(cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, save):
    rows = x.flatten(0, -2).shape[0] if save else 0
    hidden = weights[1].shape[0] // GATES[cell]
    return (
        x.new_empty(*x.shape[:-1], directions * h0.shape[-1]),
        h0.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else c0.new_empty(c0.shape),
        x.new_empty(directions, rows, SAVED[cell] * hidden),
        x.new_empty(directions, rows if c0 is not None else 0, hidden, dtype=wide(x.dtype)),
    )


def _backward(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, y, saved, cells, dy, dh_n, dc_n, need_dx
):
    layout = _layout(x, h0, batch_sizes, lengths, reset)
    grouped = group(weights, directions, bias)
    dx, dh0, dc0, dweights = bptt.backward(
        cell, x.flatten(0, -2), h0, c0, grouped, layout, y.flatten(0, -2), saved, cells,
        None if dy is None else dy.flatten(0, -2), dh_n, dc_n, need_dx, _math(x),
    )  # fmt: skip
    return dx.view(x.shape) if need_dx else dx, dh0, dc0, dweights


def _backward_fake(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, y, saved, cells, dy, dh_n, dc_n, need_dx
):
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        h0.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else c0.new_empty(c0.shape),
        [w.new_empty(w.shape) for w in weights],
    )


define("recurrence_forward", FORWARD_SCHEMA, _forward, _forward_fake)
define("recurrence_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
forward = torch.ops.seqcore.recurrence_forward
backward = torch.ops.seqcore.recurrence_backward
