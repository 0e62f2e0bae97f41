"""RNN, GRU and LSTM in plain PyTorch: the oracle the kernels are held to.

Definitions are those of ``torch.nn.RNN``, ``GRU`` and ``LSTM`` (https://docs.pytorch.org/docs/stable/nn.html):

    RNN   h' = tanh(a) or relu(a),                a = W_ih x + b_ih + W_hh h + b_hh
    GRU   r = s(a_r), z = s(a_z), n = tanh(x_n + r h_n), h' = (1 - z) n + z h
    LSTM  i, f, o = s(a_i), s(a_f), s(a_o), g = tanh(a_g), c' = f c + i g, h' = W_hr (o tanh c')

Beyond torch: ``lengths`` (the state is carried through, and y is zero, past a sequence's end; the reverse direction
starts at its last valid step) and ``reset`` (the state entering a step is replaced by zeros; seen from the reverse
direction the cut lies between the same two steps).

The products run in the inputs' dtype, the pointwise math and the LSTM's c in float32 or better, as in the kernels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


class Weights(NamedTuple):
    """Parameters of one layer in one direction, shaped as in ``torch.nn``: G gates, P = H unless projected.

    w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh [G*H] or None, w_hr [P, H] or None.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def group(weights: Sequence[Tensor], directions: int, bias: bool) -> list[Weights]:
    """One layer's parameters, flat in the order of ``Weights`` without absent ones, as one ``Weights`` a direction."""
    count = len(weights) // directions
    grouped = []
    for first in range(0, len(weights), count):
        w_ih, w_hh, *others = weights[first : first + count]
        biases, others = (others[:2], others[2:]) if bias else ((None, None), others)
        grouped.append(Weights(w_ih, w_hh, *biases, others[0] if others else None))
    return grouped


class Steps(NamedTuple):
    """Where each time step's rows stand: step t holds rows offset[t] : offset[t] + active[t] of the data."""

    offset: tuple[int, ...]
    active: tuple[int, ...]

    def rows(self, t: int) -> slice:
        return slice(self.offset[t], self.offset[t] + self.active[t])

    def order(self, reverse: bool) -> range:
        """Time steps in the order a direction walks them."""
        steps = len(self.active)
        return range(steps - 1, -1, -1) if reverse else range(steps)


def padded_steps(time: int, batch: int) -> Steps:
    return Steps(tuple(range(0, time * batch, batch)) if batch else (0,) * time, (batch,) * time)


def packed_steps(batch_sizes: Tensor) -> Steps:
    """Steps of a PackedSequence. ``batch_sizes`` stands on the CPU, as torch requires, so nothing waits for a GPU."""
    active = tuple(batch_sizes.tolist())
    offset = [0]
    for size in active[:-1]:
        offset.append(offset[-1] + size)
    return Steps(tuple(offset), active)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype pointwise math runs in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def pointwise(
    cell: str, x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """One step's pointwise math from the two pre-activations, [B, G*H] each.

    Returns the new (unprojected) h, the new c, and the activated gates, which is what a backward needs.
    """
    if cell == "rnn_tanh":
        h = torch.tanh(x_gates + h_gates)
        return h, None, (h,)
    if cell == "rnn_relu":
        h = torch.relu(x_gates + h_gates)
        return h, None, (h,)
    if cell == "gru":
        x_r, x_z, x_n = x_gates.chunk(3, -1)
        h_r, h_z, h_n = h_gates.chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n), None, (r, z, n, h_n)
    i, f, g, o = (x_gates + h_gates).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    return o * torch.tanh(c), c, (i, f, g, o)


def step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """One time step: x [B, I], h [B, P], c [B, H] or None to the next h and c; c comes back wide."""
    x_gates = F.linear(x, weights.w_ih, weights.b_ih)
    return _advance(cell, x_gates, h, c, weights)


def _advance(cell: str, x_gates: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor | None]:
    acc = wide(h.dtype)
    h_gates = F.linear(h, weights.w_hh, weights.b_hh)
    new_h, new_c, _ = pointwise(cell, x_gates.to(acc), h_gates.to(acc), h.to(acc), None if c is None else c.to(acc))
    new_h = new_h.to(h.dtype)
    if weights.w_hr is not None:
        new_h = F.linear(new_h, weights.w_hr)
    return new_h, new_c


def cut_before(reset: Tensor, lengths: Tensor | None, t: int, reverse: bool) -> Tensor | None:
    """[B] bool: which rows' entering state step t replaces by zeros.

    Going backward in time, step t takes its state from step t + 1, so the cut that ``reset[t + 1]`` makes lies there;
    and a sequence's own last step starts from its initial state, which nothing past its end can cut off.
    """
    if not reverse:
        return reset[t]
    if t + 1 == reset.shape[0]:
        return None
    return reset[t + 1] if lengths is None else reset[t + 1] & (t + 1 < lengths)


def direction(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    steps: Steps,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction of one layer over rows x [R, I] laid out as ``steps``: y [R, P], h_n [B, P], c_n [B, H]."""
    x_gates = F.linear(x, weights.w_ih, weights.b_ih)
    outputs: dict[int, Tensor] = {}
    for t in steps.order(reverse):
        active = steps.active[t]
        h_in, c_in = h[:active], None if c is None else c[:active]
        cut = None if reset is None else cut_before(reset, lengths, t, reverse)
        if cut is not None:
            # Not by multiplying: a state that has become infinite or NaN is cut off, too.
            h_in = h_in.masked_fill(cut[:, None], 0)
            c_in = None if c_in is None else c_in.masked_fill(cut[:, None], 0)
        new_h, new_c = _advance(cell, x_gates[steps.rows(t)], h_in, c_in, weights)
        outputs[t] = new_h
        if lengths is not None:
            valid = (t < lengths)[:, None]
            outputs[t] = torch.where(valid, new_h, 0)
            new_h = torch.where(valid, new_h, h)
            new_c = None if new_c is None else torch.where(valid, new_c, c.to(new_c.dtype))
        h = replace_first(h, new_h)
        c = None if new_c is None else replace_first(c, new_c)
    return torch.cat([outputs[t] for t in range(len(steps.active))]), h, c


def replace_first(old: Tensor, new: Tensor) -> Tensor:
    """``old`` with its first rows replaced by ``new``: sequences past ``new`` are not active and keep their state."""
    active = new.shape[0]
    return new if active == old.shape[0] else torch.cat([new, old[active:].to(new.dtype)])


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    steps: Steps,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All directions of one layer.

    Args:
        x: [T, B, I], or [R, I] for packed rows.
        h0, c0: [D, B, P] and [D, B, H]; c0 is None for cells without c.
        weights: one ``Weights`` a direction; the second one walks backward in time.

    Returns:
        y, shaped like x with D*P columns; h_n; c_n.
    """
    rows = x.flatten(0, -2)
    results = [
        direction(
            cell, rows, h0[d], None if c0 is None else c0[d], weights[d], steps,
            reverse=d == 1, lengths=lengths, reset=reset,
        )
        for d in range(len(weights))
    ]  # fmt: skip
    y = torch.cat([y for y, _, _ in results], -1)
    h_n = torch.stack([h for _, h, _ in results])
    c_n = None if c0 is None else torch.stack([c for _, _, c in results]).to(c0.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1]), h_n, c_n


# (x, h0 [D, B, P], c0 [D, B, H] or None, weights of each direction) -> y, h_n, c_n
Layer = Callable[[Tensor, Tensor, Tensor | None, Sequence[Weights]], tuple[Tensor, Tensor, Tensor | None]]


def stack(
    layer: Layer,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Sequence[Weights]],
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Layers upon each other, dropout between them; ``weights[l][d]``, h0 [L*D, B, P], c0 [L*D, B, H] or None."""
    directions = len(weights[0])
    h_n, c_n = [], []
    for index, layer_weights in enumerate(weights):
        if index and dropout and training:
            x = F.dropout(x, dropout)
        here = slice(index * directions, (index + 1) * directions)
        x, h, c = layer(x, h0[here], None if c0 is None else c0[here], layer_weights)
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)
