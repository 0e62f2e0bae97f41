"""Attention's weights averaged over heads, rebuilt head by head from what forward left: no tensor a head."""

import triton
import triton.language as tl

from ..settled import settle
from .layout import head_ptr, load_rows, locate, row_offsets, row_stride
from .scores import dropout_keeps, probabilities, queries_of, scores


@triton.jit(do_not_specialize=["B", "H", "M", "N"])
def attention_weights_kernel(
    q,
    k,
    row_max_ptr,
    row_scale_ptr,
    weights_ptr,
    features,
    sequences,
    B,
    H,
    M,
    N,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """weights [B, M, N], contiguous: the mean over heads of softmax(scores), after dropout.

    Grid (B * blocks of M * blocks of N,).
    """
    blocks = tl.cdiv(N, BLOCK_N)
    place = locate(tl.program_id(0) // blocks, sequences, B, 1, M, N, 1, BLOCK_M, False, False)
    start_n = tl.program_id(0) % blocks * BLOCK_N
    offs_m, offs_n = place.start + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for index in range(H):
        head = place.head + index
        q_ptr = head_ptr(q, place.batch, head, place.first_row)
        k_ptr = head_ptr(k, place.batch, head // GROUP, place.first_column)
        q_tile = load_rows(q_ptr, row_stride(q), offs_m, place.rows, D, BLOCK_D)
        k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
        queries = queries_of(offs_m[:, None], place, head, H, features)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits, _ = scores(product, queries, offs_n[None, :], features, True)
        row = row_offsets(place, head, H, M, offs_m)
        row_max = tl.load(row_max_ptr + row, mask=offs_m < place.rows, other=0.0)
        row_scale = tl.load(row_scale_ptr + row, mask=offs_m < place.rows, other=0.0)
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        p = probabilities(logits, row_max[:, None], row_scale[:, None])
        if features.seed_ptr is not None:
            p = tl.where(dropout_keeps(queries, start_n, features, BLOCK_N, False), p * features.kept_scale, 0.0)
        total += p
    ptrs = weights_ptr + (place.batch.to(tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(ptrs, (total / H).to(weights_ptr.dtype.element_ty), mask=inside)


settle(globals())
