"""Attention backward: delta, then dK and dV by tiles of keys, then dQ by tiles of queries. No atomics.

With P = softmax(S), dP = dO V^T and delta = rowsum(O dO) - dlse, the gradient of the scores is dS = P (dP - delta);
then dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K. Where dropout keeps a pair, what passes it is scaled by
1 / (1 - p), in P for dV and in dP; elsewhere it is 0. A softcap multiplies dS by its slope on the way to Q and K.
Source: Dao, FlashAttention-2 (2023), section 3.1.2, with the log-sum-exp's own gradient subtracted from delta.
"""

import triton
import triton.language as tl

from ..settled import settle
from .layout import head_ptr, load_rows, locate, row_offsets, row_stride, store_rows
from .scores import dropout_keeps, probabilities, queries_of, scores, seeing_queries, visible_keys


@triton.jit(do_not_specialize=["H", "M"])
def attention_backward_delta_kernel(
    out,
    dout,
    dlse_ptr,
    row_max_ptr,
    row_scale_ptr,
    statistics_ptr,
    H,
    M,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(out * dout) - dlse, and beside it what forward left of each row; grid (B * H * blocks of M,).

    statistics is [B, H, M, 4] float32, contiguous: row_max, or 0 where that is -inf; row_scale; delta; 0.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    offs_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    zero = tl.full([], 0, tl.int32)
    out_ptr = head_ptr(out, batch_head // H, batch_head % H, zero)
    dout_ptr = head_ptr(dout, batch_head // H, batch_head % H, zero)
    out_tile = load_rows(out_ptr, row_stride(out), offs_m, M, DV, BLOCK_DV)
    dout_tile = load_rows(dout_ptr, row_stride(dout), offs_m, M, DV, BLOCK_DV)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    row = batch_head * M + offs_m
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=offs_m < M, other=0.0)
    row_max = tl.load(row_max_ptr + row, mask=offs_m < M, other=0.0)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_scale = tl.load(row_scale_ptr + row, mask=offs_m < M, other=0.0)
    tl.store(statistics_ptr + row * 4, row_max, mask=offs_m < M)
    tl.store(statistics_ptr + row * 4 + 1, row_scale, mask=offs_m < M)
    tl.store(statistics_ptr + row * 4 + 2, delta, mask=offs_m < M)
    tl.store(statistics_ptr + row * 4 + 3, delta * 0.0, mask=offs_m < M)


@triton.jit
def load_statistics(statistics_ptr, place, head, H, M, offs_m, BLOCK_M: tl.constexpr):
    """row_max, row_scale and delta of each row; zeros past the sequence's rows, which then weigh nothing.

    They stand side by side and are loaded as one tile: else each thread fetches for itself, one by one, those of all
    columns it has of a transposed tile of scores, which is nearly half of all instructions of the loop.
    """
    row = row_offsets(place, head, H, M, offs_m)
    ptrs = statistics_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    four = tl.load(ptrs, mask=(offs_m < place.rows)[:, None], other=0.0)  # [BLOCK_M, 4]
    even, odd = tl.split(tl.reshape(four, (BLOCK_M, 2, 2)))
    row_max, delta = tl.split(even)
    row_scale, _nothing = tl.split(odd)
    return row_max, row_scale, delta


@triton.jit
def gradients(
    logits, dp, row_max, row_scale, delta, queries, start_n, features, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """P as it meets V, and dS; of queries comes row_max, row_scale and delta, in the shape of ``queries.m``."""
    p = probabilities(logits, row_max, row_scale)
    met = p
    if features.seed_ptr is not None:
        keep = dropout_keeps(queries, start_n, features, BLOCK_N, TRANSPOSED)
        met = tl.where(keep, p * features.kept_scale, 0.0)
        dp = tl.where(keep, dp * features.kept_scale, 0.0)
    return met, p * (dp - delta)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q, dout, statistics_ptr, place, H_KV, M, features, begin, end,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what queries begin..end of all heads of a group contribute to one tile of keys. dk lacks its factor scale.

    Tiles are transposed, [BLOCK_N, BLOCK_M], so that P and dS stay where the products they enter expect them. One loop
    goes over a group's heads and their tiles: of two nested ones the inner could begin to load only after the outer.
    """
    offs_n = place.start + tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    for index in range(0, tiles * GROUP):
        head = place.head * GROUP
        start_m = begin + index * BLOCK_M
        if GROUP > 1:
            head += index // tiles
            start_m = begin + index % tiles * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q_ptr = head_ptr(q, place.batch, head, place.first_row)
        dout_ptr = head_ptr(dout, place.batch, head, place.first_row)
        q_tile = load_rows(q_ptr, row_stride(q), offs_m, place.rows, D, BLOCK_D)
        dout_tile = load_rows(dout_ptr, row_stride(dout), offs_m, place.rows, DV, BLOCK_DV)
        row_max, row_scale, delta = load_statistics(statistics_ptr, place, head, H_KV * GROUP, M, offs_m, BLOCK_M)
        queries = queries_of(offs_m[None, :], place, head, H_KV * GROUP, features)
        product = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        logits, slope = scores(product, queries, offs_n[:, None], features, EDGE)
        dp = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        met, ds = gradients(
            logits, dp, row_max[None, :], row_scale[None, :], delta[None, :], queries, place.start, features, BLOCK_N,
            True,
        )  # fmt: skip
        dv = tl.dot(met.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dk = tl.dot((ds * slope).to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["B", "H_KV", "M", "N", "section"])
def attention_backward_dkdv_kernel(
    q,
    k,
    v,
    dout,
    statistics_ptr,
    dk,
    dv,
    features,
    sequences,
    B,
    H_KV,
    M,
    N,
    section,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk [B, H_KV, N, D] and dv [B, H_KV, N, DV], a group's summed; grid (tiles over keys,)."""
    place = locate(tl.program_id(0), sequences, B, H_KV, M, N, section, BLOCK_N, True, False)
    offs_n = place.start + tl.arange(0, BLOCK_N)
    k_ptr = head_ptr(k, place.batch, place.head, place.first_column)
    v_ptr = head_ptr(v, place.batch, place.head, place.first_column)
    k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
    v_tile = load_rows(v_ptr, row_stride(v), offs_n, place.columns, DV, BLOCK_DV)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)

    # Rows past the sequence's load zeros and contribute none, so only the bounds need comparisons.
    begin, whole, end = seeing_queries(place, features, BLOCK_M, BLOCK_N)
    if (features.left is not None) or (features.right is not None):
        dk_tile, dv_tile = _accumulate_dkdv(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, statistics_ptr, place, H_KV, M, features,
            begin, whole, GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    if features.left is None:
        dk_tile, dv_tile = _accumulate_dkdv(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, statistics_ptr, place, H_KV, M, features,
            whole, end, GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, PRECISION,
        )  # fmt: skip

    columns = place.columns if sequences.packed is not None else N
    if sequences.k_ptr is not None:
        # Padding is written too.
        dk_tile = tl.where((offs_n < place.columns)[:, None], dk_tile, 0.0)
        dv_tile = tl.where((offs_n < place.columns)[:, None], dv_tile, 0.0)
    dk_ptr = head_ptr(dk, place.batch, place.head, place.first_column)
    dv_ptr = head_ptr(dv, place.batch, place.head, place.first_column)
    store_rows(dk_ptr, row_stride(dk), dk_tile * features.scale, offs_n, columns, D, BLOCK_D)
    store_rows(dv_ptr, row_stride(dv), dv_tile, offs_n, columns, DV, BLOCK_DV)


@triton.jit
def _accumulate_dq(
    dq, q_tile, dout_tile, row_max, row_scale, delta, k, v, place, queries, features, begin, end,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys begin..end contribute to one tile of queries. dq lacks its factor scale."""
    k_ptr = head_ptr(k, place.batch, place.head // GROUP, place.first_column)
    v_ptr = head_ptr(v, place.batch, place.head // GROUP, place.first_column)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
        v_tile = load_rows(v_ptr, row_stride(v), offs_n, place.columns, DV, BLOCK_DV)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits, slope = scores(product, queries, offs_n[None, :], features, EDGE)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        _, ds = gradients(
            logits, dp, row_max[:, None], row_scale[:, None], delta[:, None], queries, start_n, features, BLOCK_N, False
        )
        dq = tl.dot((ds * slope).to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["B", "H", "M", "N", "section"])
def attention_backward_dq_kernel(
    q,
    k,
    v,
    dout,
    statistics_ptr,
    dq,
    features,
    sequences,
    B,
    H,
    M,
    N,
    section,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq [B, H, M, D]; grid (tiles over queries,)."""
    place = locate(tl.program_id(0), sequences, B, H, M, N, section, BLOCK_M, False, features.right is not None)
    offs_m = place.start + tl.arange(0, BLOCK_M)
    queries = queries_of(offs_m[:, None], place, place.head, H, features)
    q_ptr = head_ptr(q, place.batch, place.head, place.first_row)
    dout_ptr = head_ptr(dout, place.batch, place.head, place.first_row)
    q_tile = load_rows(q_ptr, row_stride(q), offs_m, place.rows, D, BLOCK_D)
    dout_tile = load_rows(dout_ptr, row_stride(dout), offs_m, place.rows, DV, BLOCK_DV)
    row_max, row_scale, delta = load_statistics(statistics_ptr, place, place.head, H, M, offs_m, BLOCK_M)

    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    begin, whole, end = visible_keys(place, features, BLOCK_M, BLOCK_N)
    if features.left is None:
        dq_tile = _accumulate_dq(
            dq_tile, q_tile, dout_tile, row_max, row_scale, delta, k, v, place, queries, features, begin, whole,
            GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    # Keys past the sequence's load zeros, but against those dS must vanish: beyond float16 it is inf, and inf * 0 NaN.
    dq_tile = _accumulate_dq(
        dq_tile, q_tile, dout_tile, row_max, row_scale, delta, k, v, place, queries, features, whole, end,
        GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    rows = place.rows if sequences.packed is not None else M
    dq_ptr = head_ptr(dq, place.batch, place.head, place.first_row)
    store_rows(dq_ptr, row_stride(dq), dq_tile * features.scale, offs_m, rows, D, BLOCK_D)


settle(globals())
