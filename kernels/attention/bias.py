"""The gradient of an additive mask, summed over what the mask is broadcast along: dS itself. No atomics."""

import triton
import triton.language as tl

from ..settled import settle
from .backward import gradients, load_statistics
from .layout import head_ptr, load_rows, locate, place_at, row_stride
from .scores import queries_of, scores, seeing_queries, visible_keys


@triton.jit
def _score_gradient(
    place, head, start_m, start_n, q, k, v, dout, statistics_ptr, features, H, M,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of one tile, [BLOCK_M, BLOCK_N], zero where a pair may not attend."""
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    q_ptr = head_ptr(q, place.batch, head, place.first_row)
    dout_ptr = head_ptr(dout, place.batch, head, place.first_row)
    k_ptr = head_ptr(k, place.batch, head // GROUP, place.first_column)
    v_ptr = head_ptr(v, place.batch, head // GROUP, place.first_column)
    q_tile = load_rows(q_ptr, row_stride(q), offs_m, place.rows, D, BLOCK_D)
    k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
    queries = queries_of(offs_m[:, None], place, head, H, features)
    product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    logits, _ = scores(product, queries, offs_n[None, :], features, True)
    v_tile = load_rows(v_ptr, row_stride(v), offs_n, place.columns, DV, BLOCK_DV)
    dout_tile = load_rows(dout_ptr, row_stride(dout), offs_m, place.rows, DV, BLOCK_DV)
    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
    row_max, row_scale, delta = load_statistics(statistics_ptr, place, head, H, M, offs_m, BLOCK_M)
    _, ds = gradients(
        logits, dp, row_max[:, None], row_scale[:, None], delta[:, None], queries, start_n, features, BLOCK_N, False
    )
    return ds


@triton.jit(do_not_specialize=["B", "H", "M", "N", "batches", "heads"])
def attention_backward_bias_kernel(
    q,
    k,
    v,
    dout,
    statistics_ptr,
    dbias_ptr,
    features,
    sequences,
    B,
    H,
    M,
    N,
    batches,
    heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SUM_M: tl.constexpr,
    SUM_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dbias, contiguous, [B / batches, H / heads, M, N], without M or N where summed over it.

    Each program has one tile of dbias and walks over all that tile stands for: ``batches`` and ``heads``, which are 1
    or all; or, summing over queries or keys, one head's. Grid (tiles * blocks of N), or (tiles) where one is summed.
    """
    groups = H // heads
    if SUM_M:
        place = locate(tl.program_id(0), sequences, B // batches, groups, M, N, 1, BLOCK_N, True, False)
        column = place.start
    elif SUM_N:
        place = locate(tl.program_id(0), sequences, B // batches, groups, M, N, 1, BLOCK_M, False, False)
        column = place.start * 0
    else:
        blocks = tl.cdiv(N, BLOCK_N)
        tile = tl.program_id(0) // blocks
        place = locate(tile, sequences, B // batches, groups, M, N, 1, BLOCK_M, False, False)
        column = tl.program_id(0) % blocks * BLOCK_N

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for copy in range(batches * heads):
        head = place.head + copy % heads
        here = place_at(place.sequence + copy // heads, head, place.start, sequences, M, N)
        if SUM_M:
            begin, _, end = seeing_queries(here, features, BLOCK_M, BLOCK_N)
            for start_m in range(begin, end, BLOCK_M):
                total += _score_gradient(
                    here, head, start_m, column, q, k, v, dout, statistics_ptr, features, H, M,
                    GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
        else:
            begin, _, end = visible_keys(here, features, BLOCK_M, BLOCK_N)
            if not SUM_N:
                begin, end = tl.maximum(begin, column), tl.minimum(end, column + BLOCK_N)
            for start_n in range(begin, end, BLOCK_N):
                total += _score_gradient(
                    here, head, place.start, start_n, q, k, v, dout, statistics_ptr, features,
                    H, M, GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip

    rows, columns = M, N
    if sequences.packed is not None:
        rows, columns = place.rows, place.columns
    batch_head = place.batch.to(tl.int64) * groups + place.head
    offs_m, offs_n = place.start + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if SUM_M:
        ptrs = dbias_ptr + batch_head * N + place.first_column + offs_n
        tl.store(ptrs, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty), mask=offs_n < columns)
    elif SUM_N:
        ptrs = dbias_ptr + batch_head * M + place.first_row + offs_m
        tl.store(ptrs, tl.sum(total, 1).to(dbias_ptr.dtype.element_ty), mask=offs_m < rows)
    else:
        rows_of = (batch_head * M + place.first_row + offs_m) * N
        ptrs = dbias_ptr + rows_of[:, None] + (place.first_column + offs_n)[None, :]
        inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
        tl.store(ptrs, total.to(dbias_ptr.dtype.element_ty), mask=inside)


settle(globals())
