"""One recurrent layer's forward and backward through time, written out by hand, with no autograd.

This is what the operators run where there is no GPU. (An operator must not call autograd inside: under a dispatch
mode that fails.) The differentiable reference in ``recurrence.py`` is the oracle for this and for the kernels.

Buffers, for D directions and R rows, all in the input's dtype: ``saved`` [D, R, S*H] holds each step's S saved tiles
(no rows if the cell saves its output alone, which y holds), ``cells`` [R, D*H] each c, ``hidden`` [R, D*H] each h
before its projection (no rows without one).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cells as definitions
from ..cells import Cell
from .recurrence import (
    Steps,
    Weights,
    cut_before,
    hidden_size,
    recurrent_product,
    replace_first,
    replaced,
    split_initial,
    step_inputs,
    wide,
)


class Layout(NamedTuple):
    """How rows are laid out in time, and which of them count; shared by every direction."""

    steps: Steps
    lengths: Tensor | None = None
    reset: Tensor | None = None


class Kept(NamedTuple):
    """What forward leaves for backward, besides its results."""

    saved: Tensor
    cells: Tensor
    hidden: Tensor


class Gradients(NamedTuple):
    """What comes into backward: gradients of y, h_n, c_n and every step's c, each None where there is none."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    cells: Tensor | None


def _step(cell: Cell, x_gates: Tensor, extra: Tensor | None, h_gates: Tensor, h: Tensor, c: Tensor | None):
    """New h in h's dtype, new c (wide), and what to save, side by side."""
    acc = wide(h.dtype)
    state, saved = cell.reference(
        step_inputs(cell, x_gates, extra, acc),
        h_gates.to(acc).chunk(cell.gates, -1),
        (h.to(acc),) if c is None else (h.to(acc), c),
    )
    return state[0].to(h.dtype), None if c is None else state[1], torch.cat(saved, -1)


def forward(
    cell_name: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: Layout,
    save_gates: bool,
    save_cells: bool,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """One layer: x [R, I], h0 [D, B, P], c0 [D, B, H] to y [R, D*P], h_n, c_n (no elements without c) and ``Kept``.

    ``extra`` is [D, R, extra*H], for cells that take it.
    """
    cell = definitions.find(cell_name)
    rows, directions, acc = x.shape[0], len(weights), wide(x.dtype)
    hidden, outputs = hidden_size(weights[0].w_hh, cell.gates), h0.shape[-1]
    projected = weights[0].w_hr is not None
    y = x.new_empty(rows, directions * outputs)
    batch = layout.steps.active[0]
    h_n = h0.new_empty(directions, batch, outputs)
    c_n = x.new_empty(0) if c0 is None else c0.new_empty(directions, batch, hidden)
    kept = Kept(
        x.new_empty(directions, rows if save_gates and not cell.saves_output else 0, cell.saved * hidden),
        x.new_empty(rows if save_cells and cell.has_c else 0, directions * hidden),
        x.new_empty(rows if save_cells and projected else 0, directions * hidden),
    )
    for d, w in enumerate(weights):
        x_gates = F.linear(x, w.w_ih, w.b_ih)
        here_h = slice(d * hidden, (d + 1) * hidden)
        h, reset_h = split_initial(h0[d], batch)
        c, reset_c = split_initial(None if c0 is None else c0[d].to(acc), batch)
        for t in layout.steps.order(reverse=d == 1):
            here, active = layout.steps.rows(t), layout.steps.active[t]
            h_in, c_in = h[:active], None if c is None else c[:active]
            cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, d == 1)
            if cut is not None:
                h_in, c_in = replaced(h_in, cut, reset_h), replaced(c_in, cut, reset_c)
            h_gates = recurrent_product(h_in, w.w_hh, w.b_hh)
            besides = None if extra is None else extra[d, here]
            new_h, new_c, saved = _step(cell, x_gates[here], besides, h_gates, h_in, c_in)
            valid = None if layout.lengths is None else (t < layout.lengths)[:, None]
            if kept.saved.shape[1]:
                kept.saved[d, here] = saved
            if kept.cells.shape[0]:
                kept.cells[here, here_h] = new_c if valid is None else torch.where(valid, new_c, 0)
            if kept.hidden.shape[0]:
                kept.hidden[here, here_h] = new_h if valid is None else torch.where(valid, new_h, 0)
            if projected:
                new_h = F.linear(new_h, w.w_hr)
            out = new_h
            if valid is not None:
                out, new_h = torch.where(valid, new_h, 0), torch.where(valid, new_h, h)
                new_c = None if new_c is None else torch.where(valid, new_c, c)
            y[here, d * outputs : (d + 1) * outputs] = out
            h = replace_first(h, new_h)
            c = None if new_c is None else replace_first(c, new_c)
        h_n[d] = h
        if c is not None:
            c_n[d] = c
    return y, h_n, c_n, kept


def _entering(values: Tensor, initial: Tensor, layout: Layout, t: int, before: int | None, reverse: bool) -> Tensor:
    """The state entering step t: what step ``before`` (in walking order) left, the initial one, or another if cut.

    Zeros past a sequence's end.
    """
    steps, active = layout.steps, layout.steps.active[t]
    initial, by = split_initial(initial, steps.active[0])
    if before is None:
        state = initial[:active]
    else:
        left = values[steps.rows(before)][:active]
        if reverse and layout.lengths is not None:
            # A sequence's own last step starts from its initial state; past it, y holds zeros.
            left = torch.where((before < layout.lengths)[:, None], left, initial)
        state = left if left.shape[0] == active else torch.cat([left, initial[left.shape[0] : active]])
    cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, reverse)
    if cut is not None:
        state = replaced(state, cut, by)
    return state if layout.lengths is None else replaced(state, t >= layout.lengths, None)


def valid_rows(layout: Layout, rows: int) -> Tensor | None:
    """[R, 1] bool: which rows are steps of their sequences; None if all are."""
    if layout.lengths is None:
        return None
    t = torch.arange(len(layout.steps.active), device=layout.lengths.device)
    return (t[:, None] < layout.lengths).reshape(rows, 1)


def weight_gradient(dgates: Tensor, entering: Tensor, w_hh: Tensor) -> Tensor:
    """The gradient of ``recurrent_product`` with respect to W_hh: dgates [R, G*H], entering [R, P]."""
    if w_hh.dim() == 2:
        return dgates.T @ entering
    gates, blocks, units, _ = w_hh.shape
    by_block = dgates.view(-1, gates, blocks, units).permute(2, 1, 3, 0).reshape(blocks, gates * units, -1)
    found = by_block @ entering.view(-1, blocks, units).transpose(0, 1)
    return found.view(blocks, gates, units, units).transpose(0, 1).contiguous()


def _through_weights(dgates: Tensor, w_hh: Tensor) -> Tensor:
    """dgates W_hh, [B, P]."""
    if w_hh.dim() == 2:
        return dgates @ w_hh
    gates, blocks, units, _ = w_hh.shape
    return torch.einsum("bgnu,gnuv->bnv", dgates.view(-1, gates, blocks, units), w_hh).flatten(1)


def backward(
    cell_name: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: Layout,
    y: Tensor,
    kept: Kept,
    gradients: Gradients,
    grad_clip: float | None,
    need_dx: bool,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of what ``forward`` took: dx (no elements unless needed), dh0, dc0 (none without c0), and the weights'.

    The weights' gradients come flat, in the order of ``Weights`` within each direction, absent ones left out. Where
    forward kept no gates, they are made again.
    """
    cell = definitions.find(cell_name)
    acc, outputs = wide(x.dtype), h0.shape[-1]
    hidden = hidden_size(weights[0].w_hh, cell.gates)
    if not cell.saves_output and not kept.saved.shape[1]:
        kept = forward(cell_name, x, h0, c0, weights, layout, True, True, extra)[3]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    batch = layout.steps.active[0]
    dh0 = h0.new_empty(h0.shape)
    dc0 = x.new_empty(0) if c0 is None else c0.new_empty(c0.shape)
    valid = valid_rows(layout, x.shape[0])
    # What stands past a sequence's end may be NaN, and 0 * NaN is NaN.
    clean_x = x if valid is None else x.masked_fill(~valid, 0)
    dweights: list[Tensor] = []
    for d, w in enumerate(weights):
        mine, mine_h = slice(d * outputs, (d + 1) * outputs), slice(d * hidden, (d + 1) * hidden)
        dx_gates = x.new_empty(x.shape[0], cell.gates * hidden)
        dh_gates = torch.empty_like(dx_gates)
        h_in = x.new_empty(x.shape[0], outputs)
        dh_out = None if w.w_hr is None else torch.empty_like(h_in)
        dh = torch.zeros_like(h0[d, :batch], dtype=acc) if gradients.h_n is None else gradients.h_n[d].to(acc)
        dc = initial_c = None
        if c0 is not None:
            dc = torch.zeros_like(c0[d, :batch], dtype=acc) if gradients.c_n is None else gradients.c_n[d].to(acc)
            initial_c = c0[d].to(x.dtype)
        # Of the states that resets put in, which may be put in at many steps.
        dh_reset = torch.zeros_like(dh)
        dc_reset = None if dc is None else torch.zeros_like(dc)
        order = layout.steps.order(reverse=d == 1)
        for index in range(len(order) - 1, -1, -1):
            t, before = order[index], order[index - 1] if index else None
            here, active = layout.steps.rows(t), layout.steps.active[t]
            h_in[here] = _entering(y[:, mine], h0[d], layout, t, before, d == 1)
            dh_t, dc_t = dh[:active], None if dc is None else dc[:active]
            if gradients.y is not None:
                dh_t = dh_t + gradients.y[here, mine]
            if gradients.cells is not None:
                dc_t = dc_t + gradients.cells[here, mine_h]
            carried_h = carried_c = past = None
            if layout.lengths is not None:
                # Past its end a sequence's state is carried through, and its y is the constant zero.
                past = (t >= layout.lengths)[:, None]
                carried_h, dh_t = dh.masked_fill(~past, 0), dh_t.masked_fill(past, 0)
                if dc is not None:
                    carried_c, dc_t = dc.masked_fill(~past, 0), dc_t.masked_fill(past, 0)
            if w.w_hr is not None:
                dh_out[here] = dh_t
                dh_t = (dh_out[here] @ w.w_hr).to(acc)
            saved = (y[here, mine] if cell.saves_output else kept.saved[d, here]).to(acc)
            # A projected h is not hidden wide, and no cell that projects reads it.
            state, new_state, dstate = (h_in[here].to(acc),), (y[here, mine].to(acc),), (dh_t,)
            if c0 is not None:
                c_in = _entering(kept.cells[:, mine_h], initial_c, layout, t, before, d == 1)
                state, dstate = (*state, c_in.to(acc)), (*dstate, dc_t)
                new_state = (*new_state, kept.cells[here, mine_h].to(acc))
            found = cell.reference_backward(saved.chunk(cell.saved, -1), state, new_state, dstate)
            dx_t, dh_gates_t = torch.cat(found[0], -1), torch.cat(found[1], -1)
            if past is not None:
                dx_t, dh_gates_t = dx_t.masked_fill(past, 0), dh_gates_t.masked_fill(past, 0)
            if grad_clip is not None:
                dx_t, dh_gates_t = dx_t.clamp(-grad_clip, grad_clip), dh_gates_t.clamp(-grad_clip, grad_clip)
            dx_gates[here], dh_gates[here] = dx_t, dh_gates_t
            direct, dc_t = found[2][0], found[2][1] if c0 is not None else None
            dh_t = _through_weights(dh_gates[here], w.w_hh)
            # A projected state is as wide as w_hr is tall, and nothing bypasses w_hh there.
            dh_t = dh_t.to(acc) if w.w_hr is not None else direct + dh_t
            cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, d == 1)
            if cut is not None:
                here_cut = cut[:, None] if past is None else cut[:, None] & ~past
                dh_reset += torch.where(here_cut, dh_t, 0)
                if dc is not None:
                    dc_reset += torch.where(here_cut, dc_t, 0)
            stopped = past if cut is None else cut[:, None] if past is None else past | cut[:, None]
            if stopped is not None:
                dh_t = dh_t.masked_fill(stopped, 0)
                dc_t = None if dc_t is None else dc_t.masked_fill(stopped, 0)
            dh = replace_first(dh, dh_t if carried_h is None else dh_t + carried_h)
            if dc is not None:
                dc = replace_first(dc, dc_t if carried_c is None else dc_t + carried_c)
        dh0[d, :batch], dh0[d, batch:] = dh, dh_reset[: h0.shape[1] - batch]
        if dc is not None:
            dc0[d, :batch], dc0[d, batch:] = dc, dc_reset[: h0.shape[1] - batch]
        if need_dx:
            dx += dx_gates @ w.w_ih
        dweights += [dx_gates.T @ clean_x, weight_gradient(dh_gates, h_in, w.w_hh)]
        if w.b_ih is not None:
            dweights += [dx_gates.sum(0), dh_gates.sum(0)]
        if w.w_hr is not None:
            dweights.append(dh_out.T @ kept.hidden[:, mine_h])
    return dx, dh0, dc0, dweights
