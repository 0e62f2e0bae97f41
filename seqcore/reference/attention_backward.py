"""Attention's backward in plain PyTorch, written out by hand, with no autograd: what operators run on a CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import (
    NEGATIVE_INFINITY,
    drop,
    grid_of,
    keep,
    one_head,
    repeat_heads,
    scores,
    weights_without_padding,
    without_padding,
)
from .precision import without_autocast
from .recurrence import wide


class Gradients(NamedTuple):
    """Of query, key and value; of the mask, in its own shape, and of the sinks, if there are any."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None


@without_autocast
def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    rows: Tensor,
    *,
    attn_mask: Tensor | None,
    causal: str | None,
    scale: float,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    **sequences: Tensor | None,
) -> Gradients:
    """The gradients of ``attention`` on [B, H, M, D], [B, H_kv, N, D] and [B, H_kv, N, DV]; ``sequences`` as there.

    With P = softmax(s), rebuilt from ``rows``, and delta = rowsum(out dout) - dlse: ds = P (dout v^T - delta),
    dv = P^T dout, dk = scale ds^T q, dq = scale ds k; a group's dk and dv are summed. The mask's gradient is ds, summed
    to its shape; a sink's is -sum of exp(sink - lse) delta. Source: Dao, FlashAttention-2 (2023), 3.1.2.
    """
    acc = wide(query.dtype)
    k, v = repeat_heads(query, key).to(acc), repeat_heads(query, value).to(acc)
    grid = grid_of(query, k, v, **sequences)
    query = without_padding(query, sequences["query_lengths"])
    k, v = (without_padding(t, sequences["key_lengths"]) for t in (k, v))
    logits, slope = scores(
        query, k, grid,
        attn_mask=attn_mask, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    shift, factor = rows.to(acc)
    weights = torch.exp(logits - shift[..., None]) * factor[..., None]
    dout = torch.zeros_like(out, dtype=acc) if dout is None else dout.to(acc)
    dout = without_padding(dout, sequences["query_lengths"])
    delta = (out.to(acc) * dout).sum(-1)
    if dlse is not None:
        delta = delta - without_padding(dlse[..., None], sequences["query_lengths"]).squeeze(-1)
    met, dweights = weights, dout @ v.transpose(-2, -1)
    if dropout_p:
        heads = query.shape[1]
        kept = keep(grid, range(heads), heads, dropout_p, dropout_seed)
        met, dweights = drop(weights, kept, dropout_p), drop(dweights, kept, dropout_p)
    ds = weights * (dweights - delta[..., None])
    dmask, dsinks = None, None
    if attn_mask is not None and attn_mask.is_floating_point():
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if sinks is not None:
        share = torch.exp(sinks.to(acc)[:, None] - shift) * factor
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    ds = ds if slope is None else ds * slope
    dq = scale * (ds @ k)
    dk, dv = scale * (ds.transpose(-2, -1) @ query.to(acc)), met.transpose(-2, -1) @ dout
    group = query.shape[1] // max(key.shape[1], 1)
    dk, dv = (x.unflatten(1, (key.shape[1], group)).sum(2) for x in (dk, dv))
    return Gradients(dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dmask, dsinks)


@without_autocast
def average_weights_backward(dweights: Tensor, query: Tensor, key: Tensor, **options) -> Gradients:
    """The gradients of ``average_weights``, a head at a time; of values there is none.

    With P one head's weights and dP = dweights / H where dropout keeps them: ds = P (dP - rowsum(P dP)).
    """
    heads, mask, sinks, scale = query.shape[1], options["attn_mask"], options["sinks"], options["scale"]
    acc = wide(query.dtype)
    dq, dk = torch.zeros_like(query, dtype=acc), torch.zeros_like(key, dtype=acc)
    dmask = torch.zeros_like(mask, dtype=acc) if mask is not None and mask.is_floating_point() else None
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=acc)
    dweights = weights_without_padding(dweights, options["query_lengths"], options["key_lengths"], rank=3)
    for head in range(heads):
        one, of_key = slice(head, head + 1), head * key.shape[1] // heads
        found = one_head(query, key, head, **options)
        dp = dweights[:, None].to(acc) / heads
        dp = dp if found.kept is None else drop(dp, found.kept, options["dropout_p"])
        delta = (found.weights * dp).sum(-1)
        ds = found.weights * (dp - delta[..., None])
        if dmask is not None:
            of_head = dmask if mask.shape[1] == 1 else dmask[:, one]
            of_head += ds.sum_to_size(of_head.shape)
        if dsinks is not None:
            share = torch.where(found.lse == NEGATIVE_INFINITY, 0, torch.exp(sinks[head].to(acc) - found.lse))
            dsinks[head] = -(share * delta).sum()
        ds = (ds if found.slope is None else ds * found.slope) * scale
        dq[:, one] = ds @ found.key.to(acc)
        dk[:, of_key : of_key + 1] += ds.transpose(-2, -1) @ found.query.to(acc)
    dmask, dsinks = (None if t is None else t.to(like.dtype) for t, like in ((dmask, mask), (dsinks, sinks)))
    return Gradients(dq.to(query.dtype), dk.to(key.dtype), None, dmask, dsinks)
