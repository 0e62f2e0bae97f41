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
from .sizes import is_zero

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
    """out [*, H, M, DV] in the query's dtype; lse [*, H, M] and weights [*, H, M, N] in float32 or better.

    rows [2, *, H, M] rebuild the weights, before dropout, as exp(s - rows[0]) rows[1].
    """

    out: Tensor
    lse: Tensor
    weights: Tensor | None
    rows: Tensor


def dense_grid(
    lead: tuple[int, ...],
    M: int,
    N: int,
    device: torch.device,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    first_sequence: int = 0,
) -> Grid:
    """Positions in a padded batch; lengths are [B], B the first of the leading dimensions ``lead`` = (*batch, H)."""
    row, column = torch.arange(M, device=device)[:, None], torch.arange(N, device=device)
    shape = (-1, *(1,) * (len(lead) + 1))
    rows = M if query_lengths is None else query_lengths.reshape(shape)
    columns = N if key_lengths is None else key_lengths.reshape(shape)
    batches = math.prod(lead[:-1])
    batch = torch.arange(batches, device=device).reshape(*lead[:-1], 1, 1, 1) if lead else row.new_zeros(1, 1, 1)
    return Grid(row, column, rows, columns, batch + first_sequence, (row < rows) & (column < columns))


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


def scores(
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
) -> tuple[Tensor, Tensor | None]:
    """Natural logits [*, H, M, N], -inf where query m may not see key n; and the softcap's slope there."""
    acc, slope = wide(query.dtype), None
    logits = (query.to(acc) @ key.to(acc).transpose(-2, -1)) * scale
    if softcap:
        capped = torch.tanh(logits / softcap)
        logits, slope = softcap * capped, 1 - capped * capped
    visible, distance = _visible(grid, causal, window)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(acc)[..., None, None] * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            logits = logits + attn_mask.to(acc)
    return torch.where(visible, logits, NEGATIVE_INFINITY), slope


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
    first_sequence: int = 0,
) -> Result:
    """Attention with everything; arguments as ``seqcore.functional.attention``, which checks them.

    query [*, H, M, D], key [*, H_kv, N, D], value [*, H_kv, N, DV], leading dimensions broadcasting and H a multiple
    of H_kv; with cu_seqlens, [H, M, D], [H_kv, N, D] and [H_kv, N, DV]. Dropout counts sequences from
    ``first_sequence``. Differentiable any number of times.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    grid = grid_of(query, key, value, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, first_sequence)
    rank = max(query.dim(), key.dim(), value.dim())
    query = without_padding(query, query_lengths, rank)
    key, value = (without_padding(t, key_lengths, rank) for t in (key, value))
    logits, _ = scores(
        query, key, grid,
        attn_mask=attn_mask, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    weights, lse, rows = normalise(logits, sinks)
    # Weights are zeros in the padding already, as out is, but so is what their gradient brings back: a NaN that arrives
    # there, times a weight of 0, would be one. lse is the sink there, and a constant.
    weights = weights_without_padding(weights, query_lengths, key_lengths, rank)
    lse = without_padding(lse[..., None], query_lengths, rank, lse[..., None].detach()).squeeze(-1)
    if dropout_p:
        heads = weights.shape[-3] if weights.dim() > 2 else 1
        weights = drop(weights, keep(grid, range(heads), heads, dropout_p, dropout_seed), dropout_p)
    out = (weights @ value.to(weights.dtype)).to(query.dtype)
    return Result(without_padding(out, query_lengths, out.dim()), lse, weights, rows)


def grid_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    first_sequence: int = 0,
) -> Grid:
    """The positions of query's rows and key's; heads of key and value already repeated."""
    M, N = query.shape[-2], key.shape[-2]
    if cu_seqlens_q is not None:
        return packed_grid(M, N, cu_seqlens_q, cu_seqlens_k)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    return dense_grid(lead, M, N, query.device, query_lengths, key_lengths, first_sequence)


def without_padding(tensor: Tensor, lengths: Tensor | None, rank: int = 4, padding: Tensor | float = 0) -> Tensor:
    """Rows with ``padding`` past each sequence's length: a NaN there, times a weight of 0, would be NaN.

    Lengths are those of the first of ``rank`` dimensions, to which the tensor broadcasts.
    """
    if lengths is None:
        return tensor
    row = torch.arange(tensor.shape[-2], device=tensor.device)[:, None]
    return torch.where(row < lengths.reshape(-1, *(1,) * (rank - 1)), tensor, padding)


def weights_without_padding(
    weights: Tensor, query_lengths: Tensor | None, key_lengths: Tensor | None, rank: int = 4
) -> Tensor:
    """Weights [*, M, N], or their gradient, with zeros past each sequence's queries and past its keys."""
    weights = without_padding(weights, query_lengths, rank)
    return without_padding(weights.transpose(-2, -1), key_lengths, rank).transpose(-2, -1)


def normalise(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the log-sum-exp of each row, zeros and -inf where nothing may be seen; and ``Result.rows``."""
    sink = None if sinks is None else sinks.to(logits.dtype)[..., None]
    no_keys = is_zero(logits.shape[-1])
    # The shift cancels out of every result, so it needs no gradient of its own.
    shift = (logits.new_full(logits.shape[:-1], NEGATIVE_INFINITY) if no_keys else logits.amax(-1)).detach()
    shift = shift if sink is None else torch.maximum(shift, sink.detach())
    shift = torch.where(shift == NEGATIVE_INFINITY, 0, shift)
    exponentials = torch.exp(logits - shift[..., None])
    total = exponentials.sum(-1) if sink is None else exponentials.sum(-1) + torch.exp(sink - shift)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, NEGATIVE_INFINITY, shift + torch.log(total))
    return exponentials / total[..., None], lse, torch.stack([shift, 1 / total.detach()])


def keep(grid: Grid, heads: range, of: int, probability: float, seed: Tensor) -> Tensor:
    """Which weights [*, len(heads), M, N], of the ``of`` heads in all, dropout keeps, by (batch, head, row, column)."""
    head = torch.arange(heads.start, heads.stop, device=seed.device)[:, None, None]
    return uniform(seed, grid.batch * of + head, grid.row, grid.column) >= probability


def drop(weights: Tensor, keep: Tensor, probability: float) -> Tensor:
    # At probability 1 nothing is kept; the division by 1 then only keeps the gradient finite.
    return torch.where(keep, weights / ((1 - probability) or 1), 0)


def repeat_heads(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values with each head repeated for the group of query heads that shares it."""
    if query.dim() < 3 or tensor.dim() < 3 or tensor.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)


class Head(NamedTuple):
    """What one head's weights are made of and from, all of [B, 1, …]; ``kept`` is None without dropout."""

    query: Tensor
    key: Tensor
    slope: Tensor | None
    weights: Tensor
    lse: Tensor
    kept: Tensor | None


@without_autocast
def one_head(
    query: Tensor,
    key: Tensor,
    head: int,
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
) -> Head:
    """One head of ``attention`` between query [B, H, M, D] and key [B, H_kv, N, D], dropout not applied yet.

    A mask is 4-D. Differentiable any number of times.
    """
    heads, one = query.shape[1], slice(head, head + 1)
    query, key = query[:, one], key[:, head * key.shape[1] // heads, None]
    grid = grid_of(query, key, key, **sequences)
    query = without_padding(query, sequences["query_lengths"])
    key = without_padding(key, sequences["key_lengths"])
    logits, slope = scores(
        query, key, grid, attn_mask=attn_mask if attn_mask is None or attn_mask.shape[1] == 1 else attn_mask[:, one],
        causal=causal, scale=scale, window=window, softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes[one],
    )  # fmt: skip
    weights, lse, _ = normalise(logits, None if sinks is None else sinks[one])
    kept = keep(grid, range(head, head + 1), heads, dropout_p, dropout_seed) if dropout_p else None
    return Head(query, key, slope, weights, lse, kept)


def average_weights(query: Tensor, key: Tensor, **options) -> Tensor:
    """The mean over heads of ``attention``'s weights, [B, M, N] float32 or better; see ``one_head``."""
    total, heads = 0, query.shape[1]
    for head in range(heads):
        found = one_head(query, key, head, **options)
        weights = found.weights if found.kept is None else drop(found.weights, found.kept, options["dropout_p"])
        total = total + weights.squeeze(1)
    # Zeros there already, and so is their gradient then: see ``attention``.
    return weights_without_padding(total / heads, options["query_lengths"], options["key_lengths"], rank=3)
