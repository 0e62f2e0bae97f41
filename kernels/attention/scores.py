"""The score of a tile of queries against a tile of keys: scale, mask and causality, in one definition.

Scores are in base 2: the natural logit times log2(e), so that exp2 gives the probabilities. A pair that may not
attend scores -inf, and so does everything outside the M x N rectangle.
"""

import triton
import triton.language as tl

from ..activations import LOG2_E

# An additive mask of finfo.min must stay finite in base 2, as it does in base e: the lowest float32 over log2(e).
LOWEST: tl.constexpr = tl.constexpr(-2.358e38)

NO_MASK: tl.constexpr = tl.constexpr(0)
BOOL_MASK: tl.constexpr = tl.constexpr(1)
ADDITIVE_MASK: tl.constexpr = tl.constexpr(2)


@triton.jit
def score_tile(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [BLOCK_N, BLOCK_D]
    offs_m,  # [BLOCK_M] int32
    offs_n,  # [BLOCK_N] int32
    mask_ptr,  # at this batch and head
    stride_mask_m,
    stride_mask_n,
    M,
    N,
    scale,
    diagonal,
    CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(e) * (scale * q k^T + additive mask), -inf where query m may not see key n; [BLOCK_M, BLOCK_N] float32.

    Causal lets m see n <= m + diagonal: 0 aligns the top-left corners (torch's choice), N - M the lower-right ones.
    EDGE is False for tiles known to lie inside the rectangle and below the diagonal, which then need no comparison.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    if MASK_KIND != NO_MASK:
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        # Offsets in int64: a broadcast-free mask passes 2^31 elements at M = N = 46,341.
        ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mask_m + offs_n.to(tl.int64)[None, :] * stride_mask_n
        if MASK_KIND == BOOL_MASK:
            scores = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            bias = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            scores += tl.where(bias == float("-inf"), bias, tl.maximum(bias, LOWEST) * LOG2_E)
    if EDGE:
        visible = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        if CAUSAL:
            visible = visible & (offs_n[None, :] <= offs_m[:, None] + diagonal)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def split_program(rows, BLOCK: tl.constexpr):
    """(batch * heads + head as int64, first row) of this program. One grid axis: the others end at 65,535 programs."""
    blocks = tl.cdiv(rows, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK


@triton.jit
def load_rows(ptr, offs_row, rows, stride_row, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows of a matrix whose columns are contiguous, zero past either end; [len(offs_row), BLOCK_COLUMNS]."""
    offs_column = tl.arange(0, BLOCK_COLUMNS)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_column[None, :]
    mask = (offs_row < rows)[:, None]
    if COLUMNS != BLOCK_COLUMNS:
        mask = mask & (offs_column < COLUMNS)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, tile, offs_row, rows, stride_row, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    offs_column = tl.arange(0, BLOCK_COLUMNS)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_column[None, :]
    mask = (offs_row < rows)[:, None]
    if COLUMNS != BLOCK_COLUMNS:
        mask = mask & (offs_column < COLUMNS)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible_keys(start_m, M, N, diagonal, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one block of queries: where whole unmasked key tiles end, and where visible keys end."""
    if CAUSAL:
        end = tl.minimum(N, tl.maximum(0, tl.minimum(start_m + BLOCK_M, M) + diagonal))
        # The first query of the block sees the fewest keys; every tile below that needs no comparison.
        full = tl.minimum(N, tl.maximum(0, start_m + diagonal + 1)) // BLOCK_N * BLOCK_N
    else:
        end = N
        full = N // BLOCK_N * BLOCK_N
    return full, end
