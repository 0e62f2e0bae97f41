"""Attention forward: tiled online softmax, writing the output and the log-sum-exp of every row."""

import triton
import triton.language as tl

from ..activations import LN_2, LOG2_E
from ..settled import settle
from .layout import head_ptr, load_rows, locate, row_offsets, row_stride, store_rows
from .scores import dropout_keeps, in_base_2, queries_of, scores, visible_keys


@triton.jit
def fold(
    acc,  # [BLOCK_M, BLOCK_DV]
    row_max,  # [BLOCK_M]
    row_sum,  # [BLOCK_M]
    logits,  # [BLOCK_M, BLOCK_N]
    unit,
    v,  # [BLOCK_N, BLOCK_DV]
    queries,
    start_n,
    features,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over scores unit * logits, the unit being positive."""
    new_max = tl.maximum(row_max, tl.max(logits, 1) * unit)
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(logits * unit - base[:, None])
    rescale = tl.exp2(row_max - base)
    acc = acc * rescale[:, None]
    row_sum = row_sum * rescale + tl.sum(p, 1)
    if features.seed_ptr is not None:
        p = tl.where(dropout_keeps(queries, start_n, features, BLOCK_N, False), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def finish(acc, row_max, row_sum, features):
    """out, the natural lse, and what backward rebuilds probabilities from: row_max and one over row_sum."""
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    out = acc / row_sum[:, None]
    if features.seed_ptr is not None:
        out *= features.kept_scale
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    return out, lse, 1.0 / row_sum


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile, k, v, k_descriptor, v_descriptor, place, queries, features, begin, end,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold keys begin..end into the running (acc, row_max, row_sum) of one tile of queries."""
    head = place.head // GROUP
    k_ptr = head_ptr(k, place.batch, head, place.first_column)
    v_ptr = head_ptr(v, place.batch, head, place.first_column)
    PLAIN: tl.constexpr = (
        (features.positive is not None)
        and (features.softcap is None)
        and (features.slopes_ptr is None)
        and (features.mask_ptr is None)
    )
    for start_n in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZE):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # Descriptors know where tensors end, not where a sequence does: the edge reads through pointers.
        if EDGE or k_descriptor is None:
            k_tile = load_rows(k_ptr, row_stride(k), offs_n, place.columns, D, BLOCK_D)
            v_tile = load_rows(v_ptr, row_stride(v), offs_n, place.columns, DV, BLOCK_DV)
        else:
            at = [place.batch, head, place.first_column + start_n, 0]
            k_tile = k_descriptor.load(at).reshape(BLOCK_N, BLOCK_D)
            v_tile = v_descriptor.load(at).reshape(BLOCK_N, BLOCK_DV)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if EDGE or not PLAIN:
            logits, _ = scores(product, queries, offs_n[None, :], features, EDGE)
            unit = 1.0
        else:
            # The largest product makes the largest score: scaling the products then costs no instruction of its own.
            logits, unit = product, features.scale * LOG2_E
        acc, row_max, row_sum = fold(
            acc, row_max, row_sum, logits, unit, v_tile, queries, start_n, features, BLOCK_N, PRECISION
        )
    return acc, row_max, row_sum


@triton.jit
def _forward_tile(
    tile, q, k, v, out, lse_ptr, row_max_ptr, row_scale_ptr, k_descriptor, v_descriptor, features, sequences,
    B, H, M, N, section, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    place = locate(tile, sequences, B, H, M, N, section, BLOCK_M, False, features.right is not None)
    offs_m = place.start + tl.arange(0, BLOCK_M)
    queries = queries_of(offs_m[:, None], place, place.head, H, features)
    q_ptr = head_ptr(q, place.batch, place.head, place.first_row)
    q_tile = load_rows(q_ptr, row_stride(q), offs_m, place.rows, D, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if features.sinks_ptr is not None:
        row_max = tl.zeros([BLOCK_M], dtype=tl.float32) + in_base_2(tl.load(features.sinks_ptr + place.head))
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    begin, whole, end = visible_keys(place, features, BLOCK_M, BLOCK_N)
    if sequences.q_ptr is not None:
        # Rows past the sequence's own are written too, and must have seen nothing.
        if place.start + BLOCK_M > place.rows:
            whole = begin
    if features.left is None:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k, v, k_descriptor, v_descriptor, place, queries, features, begin, whole,
            GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, SPECIALIZE, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q_tile, k, v, k_descriptor, v_descriptor, place, queries, features, whole, end,
        GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip

    out_tile, lse, row_scale = finish(acc, row_max, row_sum, features)
    # Of a padded batch all rows are written, zeros where no key was seen; of a packed one, those of the sequence.
    rows = place.rows if sequences.packed is not None else M
    out_ptr = head_ptr(out, place.batch, place.head, place.first_row)
    store_rows(out_ptr, row_stride(out), out_tile, offs_m, rows, DV, BLOCK_DV)
    row = row_offsets(place, place.head, H, M, offs_m)
    tl.store(lse_ptr + row, lse, mask=offs_m < rows)
    tl.store(row_max_ptr + row, row_max, mask=offs_m < rows)
    tl.store(row_scale_ptr + row, row_scale, mask=offs_m < rows)


@triton.jit(do_not_specialize=["tiles", "B", "H", "M", "N", "section"])
def attention_forward_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    row_max_ptr,
    row_scale_ptr,
    k_descriptor,
    v_descriptor,
    features,
    sequences,
    tiles,
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
    PERSISTENT: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = softmax(scores) v and lse = log sum exp(scores), natural; grid (tiles,), or less if PERSISTENT.

    q [B, H, M, D], k [B, H / GROUP, N, D], v [B, H / GROUP, N, DV] and out [B, H, M, DV] are matrices; lse, row_max and
    row_scale are [B, H, M], contiguous float32. A row that may see no key gives zeros and lse = -inf, or its sink.

    For backward each row also leaves its largest score, in base 2, and one over the sum of exp2(score - largest):
    probabilities rebuilt from lse alone would err by a rounding of lse, which after a mask of -1e4 is a part in 1,000.
    """
    if PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _forward_tile(
                tile, q, k, v, out, lse_ptr, row_max_ptr, row_scale_ptr, k_descriptor, v_descriptor, features,
                sequences, B, H, M, N, section, GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPECIALIZE,
                PRECISION,
            )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), q, k, v, out, lse_ptr, row_max_ptr, row_scale_ptr, k_descriptor, v_descriptor, features,
            sequences, B, H, M, N, section, GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPECIALIZE, PRECISION,
        )  # fmt: skip


settle(globals())
