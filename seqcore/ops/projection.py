"""The LSTM's projection W_hr, folded into the recurrent weights: the kernels never see it.

W_hh W_hr is made once, the state which travels is the unprojected one, and every y is projected at once afterwards.
"""

import torch
from torch import Tensor

from ..reference.bptt import Gradients
from .layer import Layer


def add_initial(layer: Layer, d: int, x_gates: Tensor) -> None:
    """Add what initial states contribute to the gates of the rows that take them up; the kernel starts from zeros."""
    start = layer.h0[d] @ layer.weights[d].w_hh.T
    if layer.map.resets:
        taken = layer.map.source[d] - layer.map.rows
        x_gates += start.index_select(0, taken.clamp(min=0)).masked_fill_((taken < 0)[:, None], 0)
        return
    rows, taken = layer.map.first_rows(d)
    if taken is None:
        x_gates[rows] += start
    else:
        x_gates.index_add_(0, rows, start.masked_fill(~taken[:, None], 0))


def _initial_gradient(layer: Layer, d: int, dh_gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what ``add_initial`` added, [B or 2B, G*H], and the states that it added."""
    map_, h0 = layer.map, layer.h0[d]
    rows, taken = map_.first_rows(d)
    first = dh_gates[rows]
    if taken is None:
        return first, h0
    taken = taken & (map_.source[d].index_select(0, rows) < map_.rows + map_.batch)
    first = first.masked_fill(~taken[:, None], 0)
    if map_.resets:
        put_in = (map_.source[d] >= map_.rows + map_.batch)[:, None]
        by_step = (map_.steps, map_.batch, -1)
        first = torch.cat([first, dh_gates.masked_fill(~put_in, 0).view(by_step).sum(0)])
        taken = torch.cat([taken, put_in.view(by_step).any(0)[:, 0]])
    # States that no step takes up may be NaN, and 0 * NaN is NaN.
    return first, h0.masked_fill(~taken[:, None], 0)


def project_output(layer: Layer, states: Tensor) -> tuple[Tensor, Tensor]:
    outputs, hidden = layer.h0.shape[-1], layer.hidden
    y = states.new_empty(states.shape[0], layer.directions * outputs)
    h_n = layer.h0.new_empty(layer.directions, layer.map.batch, outputs)
    for d, w in enumerate(layer.weights):
        here = y[:, layer.part(d, outputs)]
        torch.mm(states[:, layer.part(d, hidden)], w.w_hr.T, out=here)
        rows, present = layer.map.last_rows(d)
        initial = layer.h0[d, : layer.map.batch]
        h_n[d] = here[rows] if present is None else torch.where(present[:, None], here[rows], initial)
    return y, h_n


def before_projection(layer: Layer, dy: Tensor, gradients: Gradients) -> Gradients:
    """The gradients with respect to the unprojected states; ``dy`` is ``all_outputs``, where those of h_n are in."""
    outputs, hidden = layer.h0.shape[-1], layer.hidden
    d_states = dy.new_empty(dy.shape[0], layer.directions * hidden)
    for d, w in enumerate(layer.weights):
        torch.mm(dy[:, layer.part(d, outputs)], w.w_hr, out=d_states[:, layer.part(d, hidden)])
    return Gradients(d_states, None, gradients.c_n, gradients.cells)


def all_outputs(layer: Layer, gradients: Gradients) -> Tensor:
    """Gradients of every projected h: those of y, with those of h_n added on each sequence's last row."""
    outputs = layer.h0.shape[-1]
    dy = layer.x.new_zeros(layer.x.shape[0], layer.directions * outputs) if gradients.y is None else gradients.y.clone()
    if gradients.h_n is not None:
        for d in range(layer.directions):
            rows, present = layer.map.last_rows(d)
            here = dy[:, layer.part(d, outputs)]
            if present is None:
                here[rows] += gradients.h_n[d]
            else:
                here.index_add_(0, rows, gradients.h_n[d].masked_fill(~present[:, None], 0))
    valid = layer.map.valid()
    return dy if valid is None else dy.masked_fill(~valid, 0)


def unfold(
    layer: Layer, d: int, states: Tensor, folded: Tensor, dh_gates: Tensor, dy: Tensor, dh_n: Tensor | None, dh0: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of W_hh and W_hr out of that of their product W_hh W_hr, and ``dy`` of ``all_outputs``; fills dh0."""
    w, outputs, here = layer.weights[d], layer.h0.shape[-1], layer.part(d, layer.hidden)
    first, initial = _initial_gradient(layer, d, dh_gates)
    torch.mm(first, w.w_hh, out=dh0)
    _, present = layer.map.last_rows(d)
    if present is not None and dh_n is not None:
        own = dh0[: layer.map.batch]
        own.copy_(torch.where(present[:, None], own, dh_n[d]))
    dw_hh = torch.addmm(first.T @ initial, folded, w.w_hr.T)
    return dw_hh, torch.addmm(w.w_hh.T @ folded, dy[:, layer.part(d, outputs)].T, states[:, here])
