"""Attention over a sequence that is divided among processes, keys and values going round in a ring.

Each process keeps its queries. In W steps it meets the keys and values of all W processes, passing on to the next one
those it has while it attends to them; partial results are joined by their log-sum-exps. With o_i and l_i those of the
i-th part of the keys,

    l = log sum_i exp l_i,    o = sum_i exp(l_i - l) o_i

Backward goes round once more, with the gradients of keys and values behind them, summed in float32: given the whole l
and o, a part's gradients do not depend on other parts. Sources: Liu et al., "Ring Attention with Blockwise Transformers
for Near-Infinite Context" (2023); Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd.attention import Settings as AttentionSettings
from ..errors import InvalidInput, UnsupportedInput
from ..functional.arguments import check_flags
from ..functional.attention import check_operator
from ..functional.autocast import cast
from ..ops import attention as ops
from ..reference.attention import NEGATIVE_INFINITY
from ..reference.recurrence import wide
from .layout import Group, check_layout, check_parts, group_of


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    layout: str = "contiguous",
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`seqcore.functional.attention` of one sequence, each of W processes having a part of it.

    Args:
        query: [B, H, M/W, D], this process's queries.
        key, value: [B, H_kv, N/W, D] and [B, H_kv, N/W, DV]; H_kv = H, or with ``enable_gqa`` a divisor of it.
        causal: query m sees keys n <= m; M and N are then the same.
        layout: which part is whose: "contiguous", or "zigzag", which gives all processes the same work if ``causal``;
            :func:`shard_sequence` divides so.
        scale, softcap, sinks: as there; a sink's gradient is that of this process's queries, to be summed over all.
        return_lse: also return the natural log-sum-exp, [B, H, M/W], as differentiable as the result.
        group: a process group or one-dimensional DeviceMesh, the default group if None. All of its processes call with
            the same shapes, and all run backward, or wait for each other in vain.

    Returns:
        [B, H, M/W, DV] in the query's dtype; differentiable once.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: if no kernel serves these inputs on this GPU; in backward, with ``create_graph=True``.
    """
    check_layout(layout)
    group = group_of(group)
    check_flags("ring_attention", causal=causal, enable_gqa=enable_gqa, return_lse=return_lse)
    check_parts("ring_attention", query, key, value)
    shapes = [list(t.shape) for t in (query, key, value)]
    heads = {shape[1] for shape in (shapes if not enable_gqa else shapes[1:])}
    if len({shape[0] for shape in shapes}) > 1 or len(heads) > 1:
        raise InvalidInput(
            f"ring_attention: nothing broadcasts here; query, key and value need the same batch and heads (with "
            f"enable_gqa key and value the same), got {shapes}; expand them"
        )
    if causal and query.shape[2] != key.shape[2]:
        raise InvalidInput(
            f"ring_attention: causal attention takes as many keys as queries, got {query.shape[2]} and {key.shape[2]}"
        )
    if layout == "zigzag" and (query.shape[2] % 2 or key.shape[2] % 2):
        raise InvalidInput(
            "ring_attention: a process has two chunks of one length in 'zigzag' layout, got "
            f"{query.shape[2]} queries and {key.shape[2]} keys; see shard_sequence"
        )
    scale = check_operator(query, key, value, scale=scale, softcap=softcap, sinks=sinks, enable_gqa=enable_gqa)
    settings = _Settings(causal, layout == "zigzag", scale, softcap)
    query, key, value = cast(query, key, value)
    out, lse = _RingAttention.apply(query, key, value, sinks, settings, group)
    return (out, lse) if return_lse else out


class _Settings(NamedTuple):
    causal: bool
    zigzag: bool
    scale: float
    softcap: float

    def of(self, part: "_Part") -> tuple:
        """All that the operators take beside query, key and value."""
        return *(None,) * 6, *AttentionSettings(False, part.causal, None, None, self.scale, self.softcap, 0.0)


class _Part(NamedTuple):
    """What of a process's queries meets what of another's keys, and whether along the diagonal."""

    queries: slice
    keys: slice
    causal: str


def _part(settings: _Settings, ring: "_Ring", step: int, M: int, N: int) -> _Part | None:
    """Which pairs of this process's M queries and the N keys that are here may attend; None if there are none."""
    rank, source, everything = ring.rank, ring.source(step), slice(None)
    if not settings.causal or source == rank:
        return _Part(everything, everything, "top_left" if settings.causal else "none")
    if not settings.zigzag:
        return _Part(everything, everything, "none") if source < rank else None
    # Chunks are (r, 2 W - 1 - r): an earlier process's first is seen by both of ours and its second by neither, and of
    # a later process's both are seen by our second.
    if source < rank:
        return _Part(everything, slice(0, N // 2), "none")
    return _Part(slice(M // 2, M), everything, "none")


class _Ring:
    """The process before and the one after, and tensors on their way."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)

    def source(self, step: int) -> int:
        """Whose keys are here after so many steps."""
        return (self.rank - step) % self.ranks

    def pass_on(self, *tensors: Tensor) -> "_Passing":
        """Begin to send ``tensors`` to the next process, and to receive their like from the one before."""
        return _Passing(self, tensors)


class _Passing:
    def __init__(self, ring: _Ring, tensors: tuple[Tensor, ...]) -> None:
        self.received = tuple(torch.empty_like(t) for t in tensors)
        after, before = (ring.rank + 1) % ring.ranks, (ring.rank - 1) % ring.ranks
        sends = [dist.P2POp(dist.isend, t, group=ring.group, group_peer=after) for t in tensors]
        receives = [dist.P2POp(dist.irecv, t, group=ring.group, group_peer=before) for t in self.received]
        self._sent = tensors  # kept until they have gone
        self._works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> tuple[Tensor, ...]:
        for work in self._works:
            work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    """(query, key, value, sinks, settings, group) -> out and lse of this process's queries over all processes' keys."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, settings, group):
        ring, acc = _Ring(group), wide(query.dtype)
        # A sink is a part of the sum that has no value, met before any other.
        out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=acc)
        lse = query.new_full(query.shape[:3], NEGATIVE_INFINITY, dtype=acc)
        lse = lse if sinks is None else lse.copy_(sinks[:, None])
        kept = []
        held = key.contiguous(), value.contiguous()
        for step in range(ring.ranks):
            passing = ring.pass_on(*held) if step + 1 < ring.ranks else None
            part = _part(settings, ring, step, query.shape[2], key.shape[2])
            if part is not None:
                k, v = (t[:, :, part.keys] for t in held)
                o, l, rows = ops.forward(query[:, :, part.queries], k, v, *settings.of(part))
                _join(out[:, :, part.queries], lse[:, :, part.queries], o, l)
                kept += [rows, l]
            held = passing.wait() if passing else held
        out = out.to(query.dtype)
        ctx.settings, ctx.ring = settings, ring
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, sinks, out, lse, *kept)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            raise UnsupportedInput(
                "ring_attention can be differentiated once, got create_graph=True; ulysses_attention can be twice"
            )
        if dout is None and dlse is None:
            return (None,) * 6
        settings, ring = ctx.settings, ctx.ring
        query, key, value, sinks, out, lse, *kept = ctx.saved_tensors
        dq = torch.zeros_like(query, dtype=lse.dtype)
        # Gradients of keys and values travel for the process they belong to, if it wants any; all want the same.
        travel = any(ctx.needs_input_grad[1:3])
        wanted = [True, travel, travel, False, False]
        held, summed, passing = (key.contiguous(), value.contiguous()), None, None
        for step in range(ring.ranks):
            following = ring.pass_on(*held) if step + 1 < ring.ranks else None
            part = _part(settings, ring, step, query.shape[2], key.shape[2])
            if part is not None:
                rows, l, *kept = kept
                here = part.queries
                # The op's rows are those of this part alone: its share of the whole sum makes them the whole's.
                rows = torch.stack([rows[0], rows[1] * _share(l, lse[:, :, here])])
                k, v = (t[:, :, part.keys] for t in held)
                grads = (None if t is None else t[:, :, here] for t in (dout, dlse))
                found = ops.backward(
                    *grads, out[:, :, here], rows, wanted, query[:, :, here], k, v, *settings.of(part)
                )
                dq[:, :, here] += found[0]
            if travel:
                # What was summed for these keys before they came here has come with them, a step behind.
                summed = passing.wait() if passing else tuple(torch.zeros_like(t, dtype=lse.dtype) for t in held)
                if part is not None:
                    for total, mine in zip(summed, found[1:3], strict=True):
                        total[:, :, part.keys] += mine
                passing = ring.pass_on(*summed) if ring.ranks > 1 else None
            held = following.wait() if following else held
        dk, dv = (passing.wait() if passing else summed) if travel else (None, None)
        dsinks = None
        if sinks is not None:
            delta = 0 if dout is None else (out.to(lse.dtype) * dout).sum(-1)
            delta = delta if dlse is None else delta - dlse
            dsinks = -(_share(sinks[:, None], lse) * delta).sum((0, 2)).to(sinks.dtype)
        if travel:
            dk, dv = dk.to(key.dtype), dv.to(value.dtype)
        return dq.to(query.dtype), dk, dv, dsinks, None, None


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), the part of a row's sum that has the log-sum-exp ``part``; 0 where there is none at all."""
    return torch.where(whole == NEGATIVE_INFINITY, 0, torch.exp(part - whole))


def _join(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Let ``out`` and ``lse`` take in one more part of the keys."""
    joined = torch.logaddexp(lse, part_lse)
    before, now = _share(lse, joined), _share(part_lse, joined)
    out.mul_(before[..., None]).add_(part_out * now[..., None])
    lse.copy_(joined)
