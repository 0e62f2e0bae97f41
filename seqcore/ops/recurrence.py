"""``seqcore::recurrence_forward`` and ``_backward``: one recurrent layer, all its directions, over a whole sequence.

On a GPU (or interpreted) ``sequence.py`` runs the kernels, elsewhere ``reference/bptt.py`` the formulas written out.
h0 and c0 may have twice the batch: the second half are the states that ``reset`` puts in place of a sequence's own.
Weights come flat, in the order of ``reference.recurrence.Weights``, one direction after the other. ``extra``
[D, T, B, E*H], or [D, R, E*H] of packed rows, is what a cell with ``extra`` E takes besides; it gets no gradient.
"""

import torch
from torch import Tensor

from .. import cells as definitions
from ..errors import InvalidInput
from ..reference import bptt
from ..reference.bptt import Gradients, Kept
from ..reference.recurrence import group, hidden_size, packed_steps, padded_steps
from . import layout, sequence
from .layer import Layer
from .library import define, has_kernels

_INPUTS = (
    "str cell, Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, int directions, bool bias, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset"
)
# y, h_n, c_n; then saved, cells and hidden, as bptt.py describes them.
FORWARD_SCHEMA = (
    f"({_INPUTS}, bool save_gates, bool save_cells, Tensor? extra=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# dx, dh0, dc0, and the weights' gradients.
BACKWARD_SCHEMA = (
    f"({_INPUTS}, Tensor y, Tensor saved, Tensor cells, Tensor hidden, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
    "Tensor? dcells, float? grad_clip, bool need_dx, Tensor? extra=None) -> (Tensor, Tensor, Tensor, Tensor[])"
)


def _layer(cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, extra) -> Layer:
    rows = layout.of(x, h0, directions, batch_sizes, lengths, reset)
    grouped = group(weights, directions, bias)
    return Layer(definitions.find(cell), x.flatten(0, -2), h0, c0, grouped, rows, extra)


def _by_row(cell: str, extra: Tensor | None) -> Tensor | None:
    """What a step takes besides its gates, [D, R, E*H]; it must be there if the cell says so, and only then."""
    count = definitions.find(cell).extra
    if (extra is not None) != (count > 0):
        got = "none" if extra is None else list(extra.shape)
        raise InvalidInput(f"recurrence: cell {cell!r} takes {count} tiles as extra=, got {got}; pass as many")
    return None if extra is None else extra.flatten(1, -2)


def _steps(x: Tensor, h0: Tensor, batch_sizes: Tensor | None, lengths, reset) -> bptt.Layout:
    if batch_sizes is None:
        return bptt.Layout(padded_steps(x.shape[0], x.shape[1]), lengths, reset)
    layout.check_packed(x, h0, batch_sizes)
    return bptt.Layout(packed_steps(batch_sizes), lengths, reset)


def _forward(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, save_gates, save_cells, extra=None
):
    extra = _by_row(cell, extra)
    if has_kernels(x):
        layer = _layer(cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, extra)
        run = sequence.step if sequence.is_step(layer) else sequence.forward
        y, h_n, c_n, kept = run(layer, save_gates, save_cells)
    else:
        steps, grouped = _steps(x, h0, batch_sizes, lengths, reset), group(weights, directions, bias)
        y, h_n, c_n, kept = bptt.forward(cell, x.flatten(0, -2), h0, c0, grouped, steps, save_gates, save_cells, extra)
    # No view, for whoever computes in place: autograd allows that with no view among several outputs of a Function.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])), h_n, c_n, *kept


def _forward_fake(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, save_gates, save_cells, extra=None
):
    definition = definitions.find(cell)
    rows, batch = x.flatten(0, -2).shape[0], h0.shape[1] if batch_sizes is not None else x.shape[1]
    hidden = hidden_size(weights[1], definition.gates)
    projected = len(weights) // directions == (5 if bias else 3)
    kept = rows if save_gates and not definition.saves_output else 0
    return (
        x.new_empty(*x.shape[:-1], directions * h0.shape[-1]),
        h0.new_empty(directions, batch, h0.shape[-1]),
        x.new_empty(0) if c0 is None else c0.new_empty(directions, batch, hidden),
        x.new_empty(directions, kept, definition.saved * hidden),
        x.new_empty(rows if save_cells and definition.has_c else 0, directions * hidden),
        x.new_empty(rows if save_cells and projected else 0, directions * hidden),
    )


def _backward(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, y, saved, cells, hidden,
    dy, dh_n, dc_n, dcells, grad_clip, need_dx, extra=None,
):  # fmt: skip
    rows, y, extra = x.flatten(0, -2), y.flatten(0, -2), _by_row(cell, extra)
    gradients = Gradients(
        None if dy is None else dy.flatten(0, -2), dh_n, dc_n, None if dcells is None else dcells.flatten(0, -2)
    )
    kept = Kept(saved, cells, hidden)
    if has_kernels(x):
        layer = _layer(cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, extra)
        dx, dh0, dc0, dweights = sequence.backward(layer, y, kept, gradients, grad_clip, need_dx)
    else:
        steps, grouped = _steps(x, h0, batch_sizes, lengths, reset), group(weights, directions, bias)
        dx, dh0, dc0, dweights = bptt.backward(
            cell, rows, h0, c0, grouped, steps, y, kept, gradients, grad_clip, need_dx, extra
        )
    return dx.view(x.shape) if need_dx else dx, dh0, dc0, dweights


def _backward_fake(
    cell, x, h0, c0, weights, directions, bias, batch_sizes, lengths, reset, y, saved, cells, hidden,
    dy, dh_n, dc_n, dcells, grad_clip, need_dx, extra=None,
):  # fmt: skip
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
