"""RNN, GRU and LSTM in plain PyTorch: the oracle the kernels are held to.

Definitions are those of ``torch.nn.RNN``, ``GRU`` and ``LSTM`` (https://docs.pytorch.org/docs/stable/nn.html):

    RNN   h' = tanh(a) or relu(a),                a = W_ih x + b_ih + W_hh h + b_hh
    GRU   r = s(a_r), z = s(a_z), n = tanh(x_n + r h_n), h' = (1 - z) n + z h
    LSTM  i, f, o = s(a_i), s(a_f), s(a_o), g = tanh(a_g), c' = f c + i g, h' = W_hr (o tanh c')

Beyond torch: ``lengths`` (the state is carried through, and y is zero, past a sequence's end; the reverse direction
starts at its last valid step), ``reset`` (the state entering a step is replaced by zeros or given states; seen from
the reverse direction the cut lies between the same two steps), block-diagonal recurrent weights (``w_hh``
[G, N, H/N, H/N]: N independent recurrences side by side), any cell of ``seqcore.cells``, and a bound on each element
of the gradient of the gates' pre-activations, applied at every step before it travels on (Graves, "Generating
Sequences With Recurrent Neural Networks", 2013).

The products run in the inputs' dtype, the pointwise math and the LSTM's c in float32 or better, as in the kernels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cells


class Weights(NamedTuple):
    """Parameters of one layer in one direction, shaped as in ``torch.nn``: G gates, P = H unless projected.

    w_ih [G*H, I], w_hh [G*H, P] or [G, N, H/N, H/N], b_ih and b_hh [G*H] or None, w_hr [P, H] or None.
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


def hidden_size(w_hh: Tensor, gates: int) -> int:
    return w_hh.shape[1] * w_hh.shape[2] if w_hh.dim() == 4 else w_hh.shape[0] // gates


def block_count(w_hh: Tensor) -> int:
    return w_hh.shape[1] if w_hh.dim() == 4 else 1


def recurrent_product(h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """h W_hh^T + b_hh, [B, G*H]."""
    if w_hh.dim() == 2:
        return F.linear(h, w_hh, b_hh)
    by_block = torch.einsum("bnv,gnuv->bgnu", h.unflatten(-1, w_hh.shape[1:3]), w_hh).flatten(1)
    return by_block if b_hh is None else by_block + b_hh


class ClipGradient(torch.autograd.Function):
    """x, with each element of its gradient held within ``bound`` of zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, bound):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


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


def step_inputs(cell: cells.Cell, x_gates: Tensor, extra: Tensor | None, acc: torch.dtype) -> tuple[Tensor, ...]:
    """A step's gates [B, G*H] and what it takes besides, [B, extra*H] of any dtype, in tensors [B, H]."""
    tiles = x_gates.to(acc).chunk(cell.gates, -1)
    return tiles if extra is None else (*tiles, *extra.to(acc).chunk(cell.extra, -1))


def advance(
    cell: str,
    x_gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Weights,
    grad_clip: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step from its projected input [B, G*H]: h [B, P] and c [B, H] or None to the next ones; c comes back wide."""
    definition, acc = cells.find(cell), wide(h.dtype)
    h_gates = recurrent_product(h, weights.w_hh, weights.b_hh)
    if grad_clip is not None:
        x_gates, h_gates = ClipGradient.apply(x_gates, grad_clip), ClipGradient.apply(h_gates, grad_clip)
    state, _ = definition.reference(
        step_inputs(definition, x_gates, extra, acc),
        h_gates.to(acc).chunk(definition.gates, -1),
        (h.to(acc),) if c is None else (h.to(acc), c.to(acc)),
    )
    new_h = state[0].to(h.dtype)
    if weights.w_hr is not None:
        new_h = F.linear(new_h, weights.w_hr)
    return new_h, None if c is None else state[1]


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


def split_initial(states: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """The initial states [B, …] and, if there are as many rows more, those that ``reset`` puts in a state's place."""
    if states is None or states.shape[0] == batch:
        return states, None
    return states[:batch], states[batch:]


def replaced(state: Tensor | None, cut: Tensor, by: Tensor | None) -> Tensor | None:
    """``state`` where rows are not ``cut``; there zeros, or the rows of ``by``."""
    if state is None:
        return None
    # Not by multiplying: a state that has become infinite or NaN is cut off, too.
    return torch.where(cut[:, None], 0 if by is None else by.to(state.dtype), state)


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
    grad_clip: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One direction of one layer over rows x [R, I] laid out as ``steps``; h, c, and extra [R, *], as ``layer`` takes.

    Returns y [R, P], h_n [B, P], and, for cells with c, c_n [B, H] and every step's c [R, H] (zero past ``lengths``).
    """
    # Split once: the gradient of each of T slices would be as large as all of them, and backward quadratic in T.
    x_gates = F.linear(x, weights.w_ih, weights.b_ih).split(steps.active)
    extras = (None,) * len(steps.active) if extra is None else extra.split(steps.active)
    batch = steps.active[0]
    (h, reset_h), (c, reset_c) = split_initial(h, batch), split_initial(c, batch)
    outputs: dict[int, Tensor] = {}
    all_c: dict[int, Tensor] = {}
    for t in steps.order(reverse):
        active = steps.active[t]
        h_in, c_in = h[:active], None if c is None else c[:active]
        cut = None if reset is None else cut_before(reset, lengths, t, reverse)
        if cut is not None:
            h_in, c_in = replaced(h_in, cut, reset_h), replaced(c_in, cut, reset_c)
        if lengths is not None:
            # A state that is only carried may be NaN, and nothing of it is to reach the weights.
            past = t >= lengths
            h_in, c_in = replaced(h_in, past, None), replaced(c_in, past, None)
        new_h, new_c = advance(cell, x_gates[t], h_in, c_in, weights, grad_clip, extras[t])
        outputs[t], all_c[t] = new_h, new_c
        if lengths is not None:
            valid = (t < lengths)[:, None]
            outputs[t], all_c[t] = torch.where(valid, new_h, 0), None if new_c is None else torch.where(valid, new_c, 0)
            new_h = torch.where(valid, new_h, h)
            new_c = None if new_c is None else torch.where(valid, new_c, c.to(new_c.dtype))
        h = replace_first(h, new_h)
        c = None if new_c is None else replace_first(c, new_c)
    in_order = range(len(steps.active))
    y = torch.cat([outputs[t] for t in in_order])
    return y, h, c, None if c is None else torch.cat([all_c[t] for t in in_order]).to(y.dtype)


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
    grad_clip: float | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All directions of one layer.

    Args:
        x: [T, B, I], or [R, I] for packed rows.
        h0, c0: [D, B, P] and [D, B, H]; c0 is None for cells without c. B rows more in each are the states that
            ``reset`` puts in place of a sequence's own, which are zeros otherwise.
        weights: one ``Weights`` a direction; the second one walks backward in time.
        extra: [D, T, B, extra*H] or [D, R, extra*H], for cells that take more than gates; without a gradient.

    Returns:
        y, shaped like x with D*P columns; h_n; c_n; every step's c, shaped like x with D*H columns.
    """
    if lengths is not None:
        # What stands past a sequence's end may be NaN, and backward would multiply it by 0, which is NaN.
        t = torch.arange(len(steps.active), device=lengths.device)
        x = x.masked_fill((t[:, None] >= lengths)[:, :, None], 0)
    rows = x.flatten(0, -2)
    results = [
        direction(
            cell, rows, h0[d], None if c0 is None else c0[d], weights[d], steps,
            reverse=d == 1, lengths=lengths, reset=reset, grad_clip=grad_clip,
            extra=None if extra is None else extra[d].flatten(0, -2),
        )
        for d in range(len(weights))
    ]  # fmt: skip
    y = torch.cat([result[0] for result in results], -1)
    h_n = torch.stack([result[1] for result in results])
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    if c0 is None:
        return y, h_n, None, None
    c_n = torch.stack([result[2] for result in results]).to(c0.dtype)
    all_c = torch.cat([result[3] for result in results], -1)
    return y, h_n, c_n, all_c.reshape(*x.shape[:-1], all_c.shape[-1])


# (x, h0 [D, B, P], c0 [D, B, H] or None, weights of each direction) -> y, h_n, c_n, every step's c
LayerResult = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Layer = Callable[[Tensor, Tensor, Tensor | None, Sequence[Weights]], LayerResult]


def stack(
    layer: Layer,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Sequence[Weights]],
    between: Callable[[Tensor], Tensor] | None = None,
) -> LayerResult:
    """Layers upon each other, ``between`` them a function; ``weights[l][d]``, h0 [L*D, B, P], c0 [L*D, B, H] or None.

    Returns the last layer's y, every layer's h_n and c_n, and the last layer's c of every step.
    """
    directions = len(weights[0])
    h_n, c_n = [], []
    for index, layer_weights in enumerate(weights):
        if index and between is not None:
            x = between(x)
        here = slice(index * directions, (index + 1) * directions)
        x, h, c, all_c = layer(x, h0[here], None if c0 is None else c0[here], layer_weights)
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n), all_c
