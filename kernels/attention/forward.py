"""Attention forward: tiled online softmax, writing the output and the log-sum-exp of every row."""

import triton
import triton.language as tl

from ..activations import LN_2
from .scores import load_rows, score_tile, split_program, store_rows, visible_keys


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
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
    """Fold keys begin..end into the running (acc, row_max, row_sum) of one block of queries."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, N, stride_k_n, D, BLOCK_D)
        scores = score_tile(
            q, k, offs_m, offs_n, mask_ptr, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
            CAUSAL, MASK_KIND, EDGE, PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(row_max - base)
        v = load_rows(v_ptr, offs_n, N, stride_v_n, DV, BLOCK_DV)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "M", "N", "diagonal"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    row_max_ptr,
    row_scale_ptr,
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
    stride_out_b,
    stride_out_h,
    stride_out_m,
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
    """out = softmax(scores) v and lse = log sum exp(scores), natural; grid (B * H * blocks of M,).

    q [B, H, M, D], k [B, H / GROUP, N, D], v [B, H / GROUP, N, DV], out [B, H, M, DV]; last dimensions contiguous.
    lse, row_max and row_scale [B, H, M], contiguous float32. A row that may see no key gives zeros and lse = -inf.

    For backward each row also leaves its largest score, in base 2, and one over the sum of exp2(score - largest):
    probabilities rebuilt from lse alone would err by a rounding of lse, which after a mask of -1e4 is a part in 1,000.
    """
    batch_head, start_m = split_program(M, BLOCK_M)
    batch = batch_head // H
    head = batch_head % H
    offs_m = start_m + tl.arange(0, BLOCK_M)

    k_ptr += batch * stride_k_b + head // GROUP * stride_k_h
    v_ptr += batch * stride_v_b + head // GROUP * stride_v_h
    if MASK_KIND != 0:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
    q = load_rows(q_ptr + batch * stride_q_b + head * stride_q_h, offs_m, M, stride_q_m, D, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    full, end = visible_keys(start_m, M, N, diagonal, CAUSAL, BLOCK_M, BLOCK_N)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, start_m, 0, full,
        stride_k_n, stride_v_n, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, False, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, start_m, full, end,
        stride_k_n, stride_v_n, stride_mask_m, stride_mask_n, M, N, scale, diagonal,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, MASK_KIND, True, PRECISION,
    )  # fmt: skip

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    out = acc / row_sum[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    store_rows(out_ptr + batch * stride_out_b + head * stride_out_h, out, offs_m, M, stride_out_m, DV, BLOCK_DV)
    row = batch_head * M + offs_m
    tl.store(lse_ptr + row, lse, mask=offs_m < M)
    tl.store(row_max_ptr + row, row_max, mask=offs_m < M)
    tl.store(row_scale_ptr + row, 1.0 / row_sum, mask=offs_m < M)
