"""Attention in plain PyTorch, with every feature: the oracle the kernels are held to.

For query m and key n of one sequence, with logits s and the set of keys a query may see,

    s[m, n] = softcap(scale q_m . k_n) + bias[m, n] - slope |n - m - diagonal|,   softcap(x) = c tanh(x / c)
    lse[m] = log(sum_n exp s[m, n] + exp sink),   out[m] = sum_n drop(exp(s[m, n] - lse[m])) v_n

The diagonal places query m at key m + diagonal: 0 for ``causal="top_left"`` (torch's), N - M otherwise, with M and N
the sequence's own lengths. Causal allows n <= m + diagonal; a window (left, right) allows
m + diagonal - left <= n <= m + diagonal + right, a None side being open. A query that may see nothing gives zeros and
lse = -inf, with finite gradients.

Sources: Vaswani et al. (2017); Press et al. (2022) for ALiBi; Gemma 2 (2024) for the softcap; Xiao et al. (2024) and
gpt-oss (2025) for sinks; ``torch.nn.functional.scaled_dot_product_attention`` for the masks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import uniform
from .precision import without_autocast
from .recurrence import wide

NEGATIVE_INFINITY = float("-inf")


class Grid(NamedTuple):
    """Positions of queries and keys within their own sequences; each broadcasts to [*batch, 1, M, N]."""

    row: Tensor
    column: Tensor
    rows: Tensor | int
    columns: Tensor | int
    batch: Tensor
    visible: Tensor


class Result(NamedTuple):
    """out [*, H, M, DV] in the query's dtype; lse [*, H, M] and weights [*, H, M, N] in float32 or better."""

    out: Tensor
    lse: Tensor
    weights: Tensor


def dense_grid(
    lead: tuple[int, ...],
    M: int,
    N: int,
    device: torch.device,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Grid:
    """Positions in a padded batch; lengths are [B], B the first of the leading dimensions ``lead`` = (*batch, H)."""
    row, column = torch.arange(M, device=device)[:, None], torch.arange(N, device=device)
    shape = (-1, *(1,) * (len(lead) + 1))
    rows = M if query_lengths is None else query_lengths.reshape(shape)
    columns = N if key_lengths is None else key_lengths.reshape(shape)
    batches = math.prod(lead[:-1])
    batch = torch.arange(batches, device=device).reshape(*lead[:-1], 1, 1, 1) if lead else row.new_zeros(1, 1, 1)
    return Grid(row, column, rows, columns, batch, (row < rows) & (column < columns))


def packed_grid(M: int, N: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Grid:
    """Positions in sequences laid end to end; cu_seqlens [S + 1] are where each begins, and where the last one ends."""

    def locate(size: int, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(size, device=ends.device)
        sequence = torch.searchsorted(ends[1:].contiguous(), index, right=True).clamp(max=len(ends) - 2)
        return sequence, index - ends[sequence], ends[sequence + 1] - ends[sequence]

    q_sequence, row, rows = (x[:, None] for x in locate(M, cu_seqlens_q.long()))
    k_sequence, column, _ = locate(N, cu_seqlens_k.long())
    columns = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).long()[q_sequence]
    visible = (q_sequence == k_sequence) & (row < rows) & (column < columns)
    return Grid(row, column, rows, columns, q_sequence[None], visible)


def _visible(grid: Grid, causal: str | None, window: tuple[int | None, int | None] | None) -> tuple[Tensor, Tensor]:
    """Which pairs may attend by position alone, and how far key n stands past the diagonal."""
    diagonal = 0 if causal == "top_left" else grid.columns - grid.rows
    distance = grid.column - grid.row - diagonal
    visible = grid.visible
    if causal is not None:
        visible = visible & (distance <= 0)
    left, right = window or (None, None)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    return visible, distance


def _scores(
    query: Tensor,
    key: Tensor,
    grid: Grid,
    *,
    attn_mask: Tensor | None,
    causal: str | None,
    scale: float,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Natural logits [*, H, M, N], -inf where query m may not see key n."""
    acc = wide(query.dtype)
    scores = (query.to(acc) @ key.to(acc).transpose(-2, -1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible, distance = _visible(grid, causal, window)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(acc)[..., None, None] * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            scores = scores + attn_mask.to(acc)
    return torch.where(visible, scores, NEGATIVE_INFINITY)


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Result:
    """Attention with everything; arguments as ``seqcore.functional.attention``, which checks them.

    query [*, H, M, D], key [*, H_kv, N, D], value [*, H_kv, N, DV], leading dimensions broadcasting and H a multiple
    of H_kv; with cu_seqlens, [H, M, D], [H_kv, N, D] and [H_kv, N, DV]. Differentiable any number of times.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    M, N, acc = query.shape[-2], key.shape[-2], wide(query.dtype)
    if cu_seqlens_q is None:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        grid = dense_grid(lead, M, N, query.device, query_lengths, key_lengths)
    else:
        grid = packed_grid(M, N, cu_seqlens_q, cu_seqlens_k)
    scores = _scores(
        query, key, grid,
        attn_mask=attn_mask, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    weights, lse = _normalise(scores, None if sinks is None else sinks.to(acc)[..., None])
    if dropout_p:
        weights = _drop(weights, grid, dropout_p, dropout_seed)
    return Result((weights @ value.to(acc)).to(query.dtype), lse, weights)


def _normalise(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights, and the log-sum-exp of each row: zeros and -inf where nothing may be seen."""
    N = scores.shape[-1]
    # The shift cancels out of every result, so it needs no gradient of its own.
    shift = (scores.amax(-1) if N else scores.new_full(scores.shape[:-1], NEGATIVE_INFINITY)).detach()
    shift = shift if sink is None else torch.maximum(shift, sink.detach())
    shift = torch.where(shift == NEGATIVE_INFINITY, 0, shift)
    exponentials = torch.exp(scores - shift[..., None])
    total = exponentials.sum(-1) if sink is None else exponentials.sum(-1) + torch.exp(sink - shift)
    empty = total == 0
    total = torch.where(empty, 1, total)
    return exponentials / total[..., None], torch.where(empty, NEGATIVE_INFINITY, shift + torch.log(total))


def _drop(weights: Tensor, grid: Grid, probability: float, seed: Tensor) -> Tensor:
    """Dropout keyed by (batch, head, row, column) of weights [*, H, M, N]."""
    heads = weights.shape[-3] if weights.dim() > 2 else 1
    head = torch.arange(heads, device=weights.device)[:, None, None]
    keep = uniform(seed, grid.batch * heads + head, grid.row, grid.column) >= probability
    # At probability 1 nothing is kept; the division by 1 then only keeps the gradient finite.
    return torch.where(keep, weights / ((1 - probability) or 1), 0)


@without_autocast
def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None,
    causal: str | None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The weights [B, H, M, N] of attention over [B, H, M, D] and [B, H, N, D], 0 in rows that see nothing.

    Rebuilt from a kernel's log-sum-exp they would err by a rounding of it, more than torch's own weights do.
    """
    grid = dense_grid(query.shape[:-2], query.shape[-2], key.shape[-2], query.device)
    scores = _scores(
        query, key, grid, attn_mask=attn_mask, causal=causal, scale=query.shape[-1] ** -0.5, window=None, softcap=0.0,
        alibi_slopes=None,
    )  # fmt: skip
    weights, _ = _normalise(scores, None)
    return _drop(weights, grid, dropout_p, dropout_seed) if dropout_p else weights


def repeat_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values with each head repeated for the group of query heads that shares it."""
    if query.dim() < 3 or tensor.dim() < 3 or tensor.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)


@without_autocast
def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    causal: str | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of [B, H, M, D], [B, H_kv, N, D] and [B, H_kv, N, DV], written out by hand, with no autograd.

    With P = softmax(s) and delta = rowsum(out dout) - dlse: ds = P (dout v^T - delta), dv = P^T dout,
    dk = scale ds^T q, dq = scale ds k; a group's dk and dv are summed. Source: Dao, FlashAttention-2 (2023), 3.1.2.
    """
    acc = wide(query.dtype)
    k, v = repeat_heads(query, key).to(acc), repeat_heads(query, value).to(acc)
    grid = dense_grid(query.shape[:-2], query.shape[-2], key.shape[-2], query.device)
    scores = _scores(
        query, k, grid, attn_mask=attn_mask, causal=causal, scale=scale, window=None, softcap=0.0, alibi_slopes=None
    )
    weights, _ = _normalise(scores, None)
    dout = torch.zeros_like(out, dtype=acc) if dout is None else dout.to(acc)
    delta = (out.to(acc) * dout).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = weights * (dout @ v.transpose(-2, -1) - delta[..., None])
    dq = scale * (ds @ k)
    dk, dv = scale * (ds.transpose(-2, -1) @ query.to(acc)), weights.transpose(-2, -1) @ dout
    group = query.shape[1] // max(key.shape[1], 1)
    dk, dv = (x.unflatten(1, (key.shape[1], group)).sum(2) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)
