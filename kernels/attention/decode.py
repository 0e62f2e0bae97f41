"""Attention of few queries over many keys: keys split among programs, a group's query heads packed into one tile.

With one query a program of the plain kernel would multiply a tile of 15 empty rows, and B * H programs fill no GPU.
Here the rows of a tile are the queries of all heads that share a key head, so that keys are read once for them all,
and ``splits`` programs walk over a part of the keys each. What they found is put together by the log-sum-exp.
Source: Dao et al., Flash-Decoding (2023).
"""

import triton
import triton.language as tl

from ..settled import settle
from .forward import finish, fold
from .layout import head_ptr, load_rows, place_at, row_stride, store_rows
from .scores import in_base_2, queries_of, scores, visible_keys


@triton.jit(do_not_specialize=["H_KV", "M", "N", "splits"])
def attention_decode_kernel(
    q,
    k,
    v,
    part_ptr,
    part_max_ptr,
    part_sum_ptr,
    features,
    sequences,
    H_KV,
    M,
    N,
    splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One part of each row's sum: part [splits, B, H, M, DV], not yet divided, part_max and part_sum [splits, B, H, M].

    All float32 and contiguous. Grid (B * H_KV * splits,); GROUP * M <= BLOCK_M. Row r of a tile is query r % M of the
    group's head r // M.
    """
    batch_head = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    first_head = batch_head % H_KV * GROUP
    place = place_at(batch_head // H_KV, first_head, tl.full([], 0, tl.int32), sequences, M, N)
    offs_row = tl.arange(0, BLOCK_M)
    member = tl.minimum(offs_row // M, GROUP - 1)
    # Rows past the group's are no queries at all.
    m = tl.where(offs_row < GROUP * M, offs_row % M, M)
    queries = queries_of(m[:, None], place, (first_head + member)[:, None], H_KV * GROUP, features)

    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = head_ptr(q, place.batch, first_head + member, m)[:, None] + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=(m < place.rows)[:, None] & (offs_d < D)[None, :], other=0.0)
    k_ptr = head_ptr(k, place.batch, batch_head % H_KV, place.first_column)
    v_ptr = head_ptr(v, place.batch, batch_head % H_KV, place.first_column)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The queries of a head, all M of them, are one tile of the plain kernel's.
    begin, _whole, end = visible_keys(place, features, BLOCK_M, BLOCK_N)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N
    begin += split * share
    for start_n in range(begin, tl.minimum(end, begin + share), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        logits, _ = scores(product, queries, offs_n[None, :], features, True)
        v_tile = load_rows(v_ptr, row_stride(v), offs_n, place.columns, DV, BLOCK_DV)
        acc, row_max, row_sum = fold(
            acc, row_max, row_sum, logits, 1.0, v_tile, queries, start_n, features, BLOCK_N, PRECISION
        )

    rows = tl.num_programs(0) // splits * GROUP * M
    row = split.to(tl.int64) * rows + batch_head * GROUP * M + offs_row
    tl.store(part_max_ptr + row, row_max, mask=offs_row < GROUP * M)
    tl.store(part_sum_ptr + row, row_sum, mask=offs_row < GROUP * M)
    first = split.to(tl.int64) * rows + batch_head * GROUP * M
    store_rows(part_ptr + first * DV, DV, acc, offs_row, GROUP * M, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["rows", "H", "M", "splits"])
def attention_combine_kernel(
    part_ptr,
    part_max_ptr,
    part_sum_ptr,
    out_ptr,
    lse_ptr,
    row_max_ptr,
    row_scale_ptr,
    features,
    rows,
    H,
    M,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Put the parts of each of ``rows`` = B * H * M rows together: what the plain kernel leaves, contiguous."""
    offs_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = offs_row < rows
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if features.sinks_ptr is not None:
        row_max = in_base_2(tl.load(features.sinks_ptr + offs_row // M % H, mask=there, other=0.0))
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    first = tl.full([], 0, tl.int64)
    for _split in range(splits):
        row = first + offs_row
        part_max = tl.load(part_max_ptr + row, mask=there, other=float("-inf"))
        part = load_rows(part_ptr + first * DV, DV, offs_row, rows, DV, BLOCK_DV)
        new_max = tl.maximum(row_max, part_max)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        before, now = tl.exp2(row_max - base), tl.exp2(part_max - base)
        acc = acc * before[:, None] + part * now[:, None]
        row_sum = row_sum * before + tl.load(part_sum_ptr + row, mask=there, other=0.0) * now
        row_max = new_max
        first += rows
    out, lse, row_scale = finish(acc, row_max, row_sum, features)
    store_rows(out_ptr, DV, out, offs_row, rows, DV, BLOCK_DV)
    tl.store(lse_ptr + offs_row, lse, mask=there)
    tl.store(row_max_ptr + offs_row, row_max, mask=there)
    tl.store(row_scale_ptr + offs_row, row_scale, mask=there)


settle(globals())
