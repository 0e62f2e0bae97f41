"""One recurrent layer's forward and backward through time, written out by hand, with no autograd.

This is what the operators run: with the pointwise math of the kernels on a GPU, with the formulas below elsewhere.
(An operator must not call autograd inside: under a dispatch mode that fails.) The differentiable reference in
``recurrence.py`` is the oracle for both.

Buffers, for D directions and R rows: ``saved`` [D, R, S*H] holds each step's activated gates in the input's dtype,
``cells`` [D, R, H] each c in float32 or better (no elements unless LSTM).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrence import GATES, Steps, Weights, cut_before, pointwise, replace_first, wide

# Tiles each cell saves for backward: the RNN its output, the GRU r, z, n and h_n, the LSTM i, f, g and o.
SAVED = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}


class Pointwise(Protocol):
    """One step's pointwise math. Tensors are [B, …]; c, dh and dc are wide, all else in the inputs' dtype."""

    def forward(
        self, cell: str, x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None, saved: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The new h (unprojected) and c; fills ``saved`` unless it is None."""

    def backward(
        self,
        cell: str,
        saved: Tensor,
        h: Tensor,
        c: Tensor | None,
        new_c: Tensor | None,
        dh: Tensor,
        dc: Tensor | None,
        dx_gates: Tensor,
        dh_gates: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of h (the part that bypasses w_hh) and c entering the step; fills ``dx_gates`` and ``dh_gates``.

        For all cells but the GRU the two are the same buffer.
        """


class PlainPointwise:
    """In plain PyTorch, on any device and in any float dtype."""

    def forward(self, cell, x_gates, h_gates, h, c, saved):
        acc = wide(h.dtype)
        new_h, new_c, gates = pointwise(cell, x_gates.to(acc), h_gates.to(acc), h.to(acc), c)
        if saved is not None:
            saved.copy_(torch.cat(gates, -1))
        return new_h.to(h.dtype), new_c

    def backward(self, cell, saved, h, c, new_c, dh, dc, dx_gates, dh_gates):
        gates = saved.to(dh.dtype).chunk(SAVED[cell], -1)
        if cell in ("rnn_tanh", "rnn_relu"):
            slope = 1 - gates[0] * gates[0] if cell == "rnn_tanh" else (gates[0] > 0).to(dh.dtype)
            dx_gates.copy_(dh * slope)
            return torch.zeros_like(dh), None
        if cell == "gru":
            r, z, n, h_n = gates
            dn = dh * (1 - z) * (1 - n * n)
            dz = dh * (h.to(dh.dtype) - n) * z * (1 - z)
            dr = dn * h_n * r * (1 - r)
            dx_gates.copy_(torch.cat([dr, dz, dn], -1))
            dh_gates.copy_(torch.cat([dr, dz, dn * r], -1))
            return dh * z, None
        i, f, g, o = gates
        tanh_c = torch.tanh(new_c)
        dc = dc + dh * o * (1 - tanh_c * tanh_c)
        di, df, dg = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g)
        dx_gates.copy_(torch.cat([di, df, dg, dh * tanh_c * o * (1 - o)], -1))
        return torch.zeros_like(dh), dc * f


PLAIN = PlainPointwise()


class Layout(NamedTuple):
    """How rows are laid out in time, and which of them count; shared by every direction."""

    steps: Steps
    lengths: Tensor | None = None
    reset: Tensor | None = None


def _blank(like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def forward(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: Layout,
    save: bool,
    math: Pointwise = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer: x [R, I], h0 [D, B, P], c0 [D, B, H] to y [R, D*P], h_n, c_n, saved, cells.

    ``c_n`` and ``cells`` have no elements for cells without c; ``saved`` and ``cells`` none unless ``save``.
    """
    rows, directions, acc = x.shape[0], len(weights), wide(x.dtype)
    hidden, outputs = weights[0].w_hh.shape[0] // GATES[cell], h0.shape[-1]
    y = _blank(x, x.dtype, rows, directions * outputs)
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    c_n = _blank(x, x.dtype, 0) if c0 is None else torch.empty_like(c0, memory_format=torch.contiguous_format)
    saved = _blank(x, x.dtype, directions, rows if save else 0, SAVED[cell] * hidden)
    cells = _blank(x, acc, directions, rows if save and c0 is not None else 0, hidden)
    for d, w in enumerate(weights):
        x_gates = F.linear(x, w.w_ih, w.b_ih)
        h, c = h0[d], None if c0 is None else c0[d].to(acc)
        for t in layout.steps.order(reverse=d == 1):
            here, active = layout.steps.rows(t), layout.steps.active[t]
            h_in, c_in = h[:active], None if c is None else c[:active]
            cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, d == 1)
            if cut is not None:
                h_in = h_in.masked_fill(cut[:, None], 0)
                c_in = None if c_in is None else c_in.masked_fill(cut[:, None], 0)
            h_gates = F.linear(h_in, w.w_hh, w.b_hh)
            new_h, new_c = math.forward(cell, x_gates[here], h_gates, h_in, c_in, saved[d, here] if save else None)
            if w.w_hr is not None:
                new_h = F.linear(new_h, w.w_hr)
            if save and new_c is not None:
                cells[d, here] = new_c
            out = new_h
            if layout.lengths is not None:
                valid = (t < layout.lengths)[:, None]
                out, new_h = torch.where(valid, new_h, 0), torch.where(valid, new_h, h)
                new_c = None if new_c is None else torch.where(valid, new_c, c)
            y[here, d * outputs : (d + 1) * outputs] = out
            h = replace_first(h, new_h)
            c = None if new_c is None else replace_first(c, new_c)
        h_n[d] = h
        if c is not None:
            c_n[d] = c
    return y, h_n, c_n, saved, cells


def _entering(values: Tensor, initial: Tensor, layout: Layout, t: int, before: int | None, reverse: bool) -> Tensor:
    """The state entering step t: what step ``before`` (in walking order) left, the initial state, or zeros if cut."""
    steps, active = layout.steps, layout.steps.active[t]
    if before is None:
        state = initial[:active]
    else:
        left = values[steps.rows(before)][:active]
        if reverse and layout.lengths is not None:
            # A sequence's own last step starts from its initial state; past it, y holds zeros.
            left = torch.where((before < layout.lengths)[:, None], left, initial)
        state = left if left.shape[0] == active else torch.cat([left, initial[left.shape[0] : active]])
    cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, reverse)
    return state if cut is None else state.masked_fill(cut[:, None], 0)


def backward(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    layout: Layout,
    y: Tensor,
    saved: Tensor,
    cells: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    need_dx: bool,
    math: Pointwise = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of what ``forward`` took: dx (no elements unless needed), dh0, dc0 (none without c0), and the weights'.

    The weights' gradients come flat, in the order of ``Weights`` within each direction, absent ones left out.
    """
    acc, outputs = wide(x.dtype), h0.shape[-1]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else _blank(x, x.dtype, 0)
    dh0 = torch.empty_like(h0, memory_format=torch.contiguous_format)
    dc0 = _blank(x, x.dtype, 0) if c0 is None else torch.empty_like(c0, memory_format=torch.contiguous_format)
    dweights: list[Tensor] = []
    for d, w in enumerate(weights):
        mine = slice(d * outputs, (d + 1) * outputs)
        dx_gates = _blank(x, x.dtype, x.shape[0], w.w_hh.shape[0])
        dh_gates = torch.empty_like(dx_gates) if cell == "gru" else dx_gates
        h_in = _blank(x, x.dtype, x.shape[0], outputs)
        dh_out = None if w.w_hr is None else torch.empty_like(h_in)
        dh = torch.zeros_like(h0[d], dtype=acc) if dh_n is None else dh_n[d].to(acc)
        dc = None
        if c0 is not None:
            dc = torch.zeros_like(c0[d], dtype=acc) if dc_n is None else dc_n[d].to(acc)
        initial_c = None if c0 is None else c0[d].to(acc)
        order = layout.steps.order(reverse=d == 1)
        for index in range(len(order) - 1, -1, -1):
            t, before = order[index], order[index - 1] if index else None
            here, active = layout.steps.rows(t), layout.steps.active[t]
            h_in[here] = _entering(y[:, mine], h0[d], layout, t, before, d == 1)
            c_in = None if c0 is None else _entering(cells[d], initial_c, layout, t, before, d == 1)
            dh_t, dc_t = dh[:active], None if dc is None else dc[:active]
            if dy is not None:
                dh_t = dh_t + dy[here, mine]
            carried_h = carried_c = None
            if layout.lengths is not None:
                # Past its end a sequence's state is carried through, and its y is the constant zero.
                past = (t >= layout.lengths)[:, None]
                carried_h, dh_t = dh * past, dh_t.masked_fill(past, 0)
                if dc is not None:
                    carried_c, dc_t = dc * past, dc_t.masked_fill(past, 0)
            if w.w_hr is not None:
                dh_out[here] = dh_t
                dh_t = (dh_out[here] @ w.w_hr).to(acc)
            new_c = None if c0 is None else cells[d, here]
            direct, dc_t = math.backward(
                cell, saved[d, here], h_in[here], c_in, new_c, dh_t, dc_t, dx_gates[here], dh_gates[here]
            )
            dh_t = dh_gates[here] @ w.w_hh
            # A projected state is as wide as w_hr is tall, and nothing bypasses w_hh there.
            dh_t = dh_t.to(acc) if w.w_hr is not None else direct + dh_t
            cut = None if layout.reset is None else cut_before(layout.reset, layout.lengths, t, d == 1)
            if cut is not None:
                dh_t = dh_t.masked_fill(cut[:, None], 0)
                dc_t = None if dc_t is None else dc_t.masked_fill(cut[:, None], 0)
            dh = replace_first(dh, dh_t if carried_h is None else dh_t + carried_h)
            if dc is not None:
                dc = replace_first(dc, dc_t if carried_c is None else dc_t + carried_c)
        dh0[d] = dh
        if dc is not None:
            dc0[d] = dc
        if need_dx:
            dx += dx_gates @ w.w_ih
        dweights += [dx_gates.T @ x, dh_gates.T @ h_in]
        if w.b_ih is not None:
            dweights += [dx_gates.sum(0), dh_gates.sum(0)]
        if w.w_hr is not None:
            # What was projected, o tanh(c), is not stored: both factors are.
            unprojected = saved[d].chunk(4, -1)[3].to(acc) * torch.tanh(cells[d])
            dweights.append(dh_out.T @ unprojected.to(x.dtype))
    return dx, dh0, dc0, dweights
