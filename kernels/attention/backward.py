"""Attention backward: delta, then dK and dV by blocks of keys, then dQ by blocks of queries. No atomics.

With P = softmax(S), dP = dO V^T and delta = rowsum(O dO) - dlse, the gradient of the scores is dS = P (dP - delta);
then dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
Source: Dao, FlashAttention-2 (2023), section 3.1.2, with the log-sum-exp's own gradient subtracted from delta.
"""

import triton
import triton.language as tl

from .scores import load_rows, score_tile, split_program, store_rows, visible_keys


@triton.jit
def _probabilities(scores, row_max, row_scale):
    """P from base-2 scores and what forward kept; scores rebuilt in other tiles may pass row_max by a rounding."""
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    return tl.exp2(tl.minimum(scores - base[:, None], 0.0)) * row_scale[:, None]


@triton.jit(do_not_specialize=["H", "M"])
def attention_backward_delta_kernel(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    stride_out_b,
    stride_out_h,
    stride_out_m,
    stride_dout_b,
    stride_dout_h,
    stride_dout_m,
    H,
    M,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(out * dout) - dlse; [B, H, M] float32, contiguous like dlse. Grid (B * H * blocks of M,)."""
    batch_head, start_m = split_program(M, BLOCK_M)
    batch = batch_head // H
    head = batch_head % H
    offs_m = start_m + tl.arange(0, BLOCK_M)
    out = load_rows(out_ptr + batch * stride_out_b + head * stride_out_h, offs_m, M, stride_out_m, DV, BLOCK_DV)
    dout = load_rows(dout_ptr + batch * stride_dout_b + head * stride_dout_h, offs_m, M, stride_dout_m, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + batch_head * M + offs_m, mask=offs_m < M, other=0.0)
    tl.store(delta_ptr + batch_head * M + offs_m, delta, mask=offs_m < M)


@triton.jit
def _accumulate_dkdv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    row_max_ptr,
    row_scale_ptr,
    delta_ptr,
    mask_ptr,
    start_n,
    begin,
    end,
    stride_q_m,
    stride_dout_m,
    stride_mask_m,
    stride_mask_n,
    M,
    N,
    scale,
    diagonal,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what queries begin..end contribute to one block of keys. dk lacks its factor scale."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    for start_m in range(begin, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, M, stride_q_m, D, BLOCK_D)
        dout = load_rows(dout_ptr, offs_m, M, stride_dout_m, DV, BLOCK_DV)
        row_max = tl.load(row_max_ptr + offs_m, mask=offs_m < M, other=0.0)
        row_scale = tl.load(row_scale_ptr + offs_m, mask=offs_m < M, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < M, other=0.0)
        scores = score_tile(
            q, k, offs_m, offs_n, mask_ptr, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
            CAUSAL, MASK_KIND, EDGE, PRECISION,
        )  # fmt: skip
        p = _probabilities(scores, row_max, row_scale)
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["H_KV", "M", "N", "diagonal"])
def attention_backward_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    dout_ptr,
    row_max_ptr,
    row_scale_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_dout_b,
    stride_dout_h,
    stride_dout_m,
    H_KV,
    M,
    N,
    scale,
    diagonal,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk [B, H_KV, N, D] and dv [B, H_KV, N, DV], contiguous, a group's summed; grid (B * H_KV * blocks of N,)."""
    batch_head, start_n = split_program(N, BLOCK_N)
    batch = batch_head // H_KV
    head_kv = batch_head % H_KV
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + batch * stride_k_b + head_kv * stride_k_h, offs_n, N, stride_k_n, D, BLOCK_D)
    v = load_rows(v_ptr + batch * stride_v_b + head_kv * stride_v_h, offs_n, N, stride_v_n, DV, BLOCK_DV)

    # Query m sees key n when m >= n - diagonal: no query before `begin` sees any key of this block, every query from
    # `full` on sees them all. Rows past M load zeros and contribute none; rows of dk and dv past N are not stored.
    if CAUSAL:
        begin = tl.maximum(0, start_n - diagonal) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(0, start_n + BLOCK_N - 1 - diagonal), BLOCK_M) * BLOCK_M
    else:
        begin = 0
        full = 0

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for member in range(GROUP):
        head = head_kv * GROUP + member
        row = (batch * H_KV * GROUP + head) * M
        q_head = q_ptr + batch * stride_q_b + head * stride_q_h
        dout_head = dout_ptr + batch * stride_dout_b + head * stride_dout_h
        mask_head = mask_ptr
        if MASK_KIND != 0:
            mask_head = mask_ptr + batch * stride_mask_b + head * stride_mask_h
        if CAUSAL:
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, q_head, dout_head, row_max_ptr + row, row_scale_ptr + row, delta_ptr + row, mask_head,
                start_n, begin, tl.minimum(full, M), stride_q_m, stride_dout_m, stride_mask_m, stride_mask_n,
                M, N, scale, diagonal, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, True, PRECISION,
            )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_head, dout_head, row_max_ptr + row, row_scale_ptr + row, delta_ptr + row, mask_head,
            start_n, full, M, stride_q_m, stride_dout_m, stride_mask_m, stride_mask_n,
            M, N, scale, diagonal, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, False, PRECISION,
        )  # fmt: skip

    store_rows(dk_ptr + batch_head * N * D, dk * scale, offs_n, N, D, D, BLOCK_D)
    store_rows(dv_ptr + batch_head * N * DV, dv, offs_n, N, DV, DV, BLOCK_DV)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    dout,
    row_max,
    row_scale,
    delta,
    k_ptr,
    v_ptr,
    mask_ptr,
    start_m,
    begin,
    end,
    stride_k_n,
    stride_v_n,
    stride_mask_m,
    stride_mask_n,
    M,
    N,
    scale,
    diagonal,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what keys begin..end contribute to one block of queries. dq lacks its factor scale."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, N, stride_k_n, D, BLOCK_D)
        v = load_rows(v_ptr, offs_n, N, stride_v_n, DV, BLOCK_DV)
        scores = score_tile(
            q, k, offs_m, offs_n, mask_ptr, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
            CAUSAL, MASK_KIND, EDGE, PRECISION,
        )  # fmt: skip
        p = _probabilities(scores, row_max, row_scale)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["H", "M", "N", "diagonal"])
def attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    dout_ptr,
    row_max_ptr,
    row_scale_ptr,
    delta_ptr,
    dq_ptr,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_dout_b,
    stride_dout_h,
    stride_dout_m,
    H,
    M,
    N,
    scale,
    diagonal,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK_KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq [B, H, M, D], contiguous; grid (B * H * blocks of M,)."""
    batch_head, start_m = split_program(M, BLOCK_M)
    batch = batch_head // H
    head = batch_head % H
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, offs_m, M, stride_q_m, D, BLOCK_D)
    dout = load_rows(dout_ptr + batch * stride_dout_b + head * stride_dout_h, offs_m, M, stride_dout_m, DV, BLOCK_DV)
    row_max = tl.load(row_max_ptr + batch_head * M + offs_m, mask=offs_m < M, other=0.0)
    row_scale = tl.load(row_scale_ptr + batch_head * M + offs_m, mask=offs_m < M, other=0.0)
    delta = tl.load(delta_ptr + batch_head * M + offs_m, mask=offs_m < M, other=0.0)
    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    if MASK_KIND != 0:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h

    # Keys past N load zeros and contribute none, so only the diagonal needs comparisons.
    if CAUSAL:
        full, end = visible_keys(start_m, M, N, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    else:
        full = N
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dq = _accumulate_dq(
        dq, q, dout, row_max, row_scale, delta, k_ptr, v_ptr, mask_ptr, start_m, 0, full,
        stride_k_n, stride_v_n, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, False, PRECISION,
    )  # fmt: skip
    if CAUSAL:
        dq = _accumulate_dq(
            dq, q, dout, row_max, row_scale, delta, k_ptr, v_ptr, mask_ptr, start_m, full, end,
            stride_k_n, stride_v_n, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, True, PRECISION,
        )  # fmt: skip
    store_rows(dq_ptr + batch_head * M * D, dq * scale, offs_m, M, D, D, BLOCK_D)
