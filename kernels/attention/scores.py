"""The score of queries against keys, with every feature, in one definition; and what a pair's dropout decides.

Scores are in base 2: the natural logit times log2(e), so that exp2 gives the probabilities. A pair that may not
attend scores -inf, and so does everything outside a sequence's rectangle of rows and columns. All here is pointwise:
what belongs to queries comes as [BLOCK_M, 1], what belongs to keys as [1, BLOCK_N], or the other way up for a tile
that is transposed, and one definition serves both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..activations import LOG2_E, tanh
from ..settled import settle

# The largest number that is finite in base 2, too: the largest float32 over log2(e).
LARGEST: tl.constexpr = tl.constexpr(2.358e38)


class Features(NamedTuple):
    """What makes a score out of a product; None is absent, and compiled out.

    With the distance d = n - m - diagonal, a query sees keys of -left <= d <= right; causal is right = 0. The diagonal
    is 0, or with ``lower_right`` columns - rows.
    """

    scale: Any
    # The scale is.
    positive: Any = None
    softcap: Any = None
    left: Any = None
    right: Any = None
    lower_right: Any = None
    # bool (True may attend) or additive [B, H, M, N]; dimensions it is broadcast along have stride 0.
    mask_ptr: Any = None
    stride_mask_b: Any = None
    stride_mask_h: Any = None
    stride_mask_m: Any = None
    stride_mask_n: Any = None
    # [H] float32: ALiBi's slopes, and the logit of one more key a head, of value zero.
    slopes_ptr: Any = None
    sinks_ptr: Any = None
    # int64: the key of the random numbers.
    seed_ptr: Any = None
    dropout: Any = None
    # 1 / (1 - dropout)
    kept_scale: Any = None


class Queries(NamedTuple):
    """What the scores of a tile need to know of its queries; a scalar if one head's, else shaped like ``m``."""

    m: Any
    # Which head of which sequence, counted through; its slope in base 2; where its row of the mask begins.
    batch_head: Any
    slope: Any
    mask_ptrs: Any
    # Of the sequence they belong to.
    rows: Any
    columns: Any
    diagonal: Any


@triton.jit
def in_base_2(given):
    """log2(e) times logits that are given, as masks and sinks are; those that would overflow stay as they are.

    So a mask of finfo.min or finfo.max stays finite, and infinity and NaN stay what they are.
    """
    return given * tl.where(tl.abs(given) <= LARGEST, LOG2_E, 1.0)


@triton.jit
def queries_of(m, place, head, H, features):
    """The ``Queries`` at positions m of ``place``'s sequence; ``head`` may be one, or a tensor like m."""
    # Triton 3.6 lets no function return None: what is absent is 0, and nobody asks for it.
    slope, mask_ptrs = 0.0, 0
    if features.slopes_ptr is not None:
        slope = in_base_2(tl.load(features.slopes_ptr + head))
    if features.mask_ptr is not None:
        # Offsets in int64: a mask of its own for each pair passes 2^31 elements at M = N = 46,341.
        mask_ptrs = (
            features.mask_ptr
            + place.batch.to(tl.int64) * features.stride_mask_b
            + head.to(tl.int64) * features.stride_mask_h
            + (place.first_row + m).to(tl.int64) * features.stride_mask_m
            + place.first_column.to(tl.int64) * features.stride_mask_n
        )
    batch_head = place.sequence * H + head
    return Queries(m, batch_head, slope, mask_ptrs, place.rows, place.columns, diagonal_of(place, features))


@triton.jit
def diagonal_of(place, features):
    """How many keys query 0 stands past key 0."""
    diagonal = place.rows * 0
    if features.lower_right is not None:
        diagonal = place.columns - place.rows
    return diagonal


@triton.jit
def scores(product, queries, n, features, EDGE: tl.constexpr):
    """log2(e) times the logits of ``product`` = q k^T, and the slope of the softcap, by which gradients multiply.

    EDGE is False for a tile known to lie inside the rectangle and the bounds, which then needs no comparison.
    """
    slope = 1.0
    if features.softcap is None:
        logits = product * (features.scale * LOG2_E)
    else:
        capped = tanh(product * (features.scale / features.softcap))
        logits = capped * (features.softcap * LOG2_E)
        slope = 1.0 - capped * capped
    if features.slopes_ptr is not None:
        logits -= queries.slope * tl.abs(n - queries.m - queries.diagonal).to(tl.float32)
    if features.mask_ptr is not None:
        inside = (queries.m < queries.rows) & (n < queries.columns)
        ptrs = queries.mask_ptrs + n.to(tl.int64) * features.stride_mask_n
        if features.mask_ptr.dtype.element_ty == tl.int1:
            logits = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, logits, float("-inf"))
        else:
            bias = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            logits += in_base_2(bias)
    if EDGE:
        logits = tl.where(may_attend(queries, n, features), logits, float("-inf"))
    return logits, slope


@triton.jit
def probabilities(logits, row_max, row_scale):
    """Softmax from what forward left of a row: its largest score, and one over the sum of exp2(score - largest).

    A largest score of -inf must come as 0, for -inf - -inf is NaN.
    """
    # Scores rebuilt in other tiles may pass row_max by a rounding.
    return tl.exp2(tl.minimum(logits - row_max, 0.0)) * row_scale


@triton.jit
def may_attend(queries, n, features):
    """Whether position alone lets each pair attend."""
    visible = (queries.m < queries.rows) & (n < queries.columns)
    if features.left is not None:
        visible = visible & (n >= queries.m + queries.diagonal - features.left)
    if features.right is not None:
        visible = visible & (n <= queries.m + queries.diagonal + features.right)
    return visible


@triton.jit
def dropout_keeps(queries, start_n, features, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which pairs dropout keeps, by Philox at (n / 4, m, batch_head, 0), of whose four words pair n takes the n % 4th.

    The answer hangs on the pair alone, not on tiles. Source: Salmon et al. (2011), as in ``triton.language.random``.
    """
    seed = tl.load(features.seed_ptr)
    quarter = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    quarter = quarter[:, None] if TRANSPOSED else quarter[None, :]
    nothing = queries.m * 0 + quarter * 0
    a, b, c, d = tl.philox(seed, nothing + quarter, nothing + queries.m, nothing + queries.batch_head, nothing)
    a, b = tl.uint_to_uniform_float(a) >= features.dropout, tl.uint_to_uniform_float(b) >= features.dropout
    c, d = tl.uint_to_uniform_float(c) >= features.dropout, tl.uint_to_uniform_float(d) >= features.dropout
    # Side by side, so that element 2 i + j of the last two dimensions is the (2 i + j)th word.
    four = tl.join(tl.join(a, c), tl.join(b, d))
    if TRANSPOSED:
        kept = tl.reshape(tl.permute(four, (0, 2, 3, 1)), (BLOCK_N, four.shape[1]))
    else:
        kept = tl.reshape(four, (four.shape[0], BLOCK_N))
    return kept


@triton.jit
def visible_keys(place, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one tile of queries: where visible keys begin, where whole tiles all of them see begin and end, and the end.

    With a left bound no tile is taken for whole: few are, and a third loop would cost more than comparisons do.
    """
    last = tl.minimum(place.start + BLOCK_M, place.rows) - 1
    diagonal = diagonal_of(place, features)
    begin, end = place.rows * 0, place.columns
    if features.left is not None:
        begin = tl.maximum(0, place.start + diagonal - features.left) // BLOCK_N * BLOCK_N
    if features.right is not None:
        end = tl.minimum(end, tl.maximum(0, last + diagonal + features.right + 1))
    # Past the sequence's own queries there is nothing to attend for.
    if place.start >= place.rows:
        end = begin
    whole = end // BLOCK_N * BLOCK_N
    if features.right is not None:
        # The first query of the tile sees the fewest keys.
        first_sees = tl.maximum(0, place.start + diagonal + features.right + 1)
        whole = tl.minimum(whole, first_sees // BLOCK_N * BLOCK_N)
    if features.left is not None:
        whole = begin
    return begin, whole, end


@triton.jit
def seeing_queries(place, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one tile of keys: where queries begin that see any, where those that see all of them begin, and the end."""
    last = tl.minimum(place.start + BLOCK_N, place.columns) - 1
    diagonal = diagonal_of(place, features)
    begin, end = place.rows * 0, place.rows
    whole = begin
    if features.left is not None:
        end = tl.minimum(end, tl.maximum(0, last - diagonal + features.left + 1))
    if features.right is not None:
        begin = tl.maximum(0, place.start - diagonal - features.right) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(0, place.start + BLOCK_N - 1 - diagonal - features.right), BLOCK_M) * BLOCK_M
    if place.start >= place.columns:
        end = begin
    if features.left is not None:
        whole = end
    return begin, tl.minimum(whole, end), end


settle(globals())
