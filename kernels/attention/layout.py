"""Where a tile stands: matrices in memory, the sequences in them, and which tile of which head a program has.

Sequences lie in a padded batch, all of one length or with lengths of their own, or end to end ("packed").
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..settled import settle

# How many ends of packed sequences a program reads at a time, in search of its own.
SEARCH: tl.constexpr = tl.constexpr(128)


class Matrix(NamedTuple):
    """[B, H, rows, columns] in memory; columns are contiguous, and strides count ``unit`` elements.

    The unit, a compile-time constant, is how a kernel knows that rows are aligned: by itself Triton only looks whether
    a stride divides by 16, and would read rows of 72 elements one by one.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any
    unit: Any


class Sequences(NamedTuple):
    """How long sequences are: without a pointer all have M queries, or N keys.

    ``q_ptr`` and ``k_ptr`` hold lengths [B]; with ``packed`` [B + 1] each, where sequences begin and the last one ends.
    """

    q_ptr: Any = None
    k_ptr: Any = None
    packed: Any = None


class Place(NamedTuple):
    """A tile of one head of one sequence; ``start`` is its first row, within the sequence."""

    # Which of the tensors' batch, and which of all sequences: not the same where they are packed.
    batch: Any
    sequence: Any
    head: Any
    start: Any
    # How many queries and keys the sequence has, and where they begin in the tensors.
    rows: Any
    columns: Any
    first_row: Any
    first_column: Any


@triton.jit
def _within(length, most):
    """A length read from memory, where nobody could check it, so that it leads to no address outside a tensor."""
    return tl.minimum(tl.maximum(length, 0), most).to(tl.int32)


@triton.jit
def _search(ends_ptr, tile, S, BLOCK: tl.constexpr):
    """Which of S packed sequences the tile belongs to, S if to none, and which of its tiles it is."""
    sequence = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    counted = tl.full([], 0, tl.int32)
    for first in range(0, S, SEARCH):
        offs = first + tl.arange(0, SEARCH)
        begins = tl.load(ends_ptr + offs, mask=offs < S, other=0)
        ends = tl.load(ends_ptr + offs + 1, mask=offs < S, other=0)
        tiles = ((ends - begins + BLOCK - 1) // BLOCK).to(tl.int32)
        last = counted + tl.cumsum(tiles, 0)
        passed = (last <= tile) & (offs < S)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, last, 0), 0))
        counted += tl.sum(tiles, 0)
    return sequence, tile - before


@triton.jit
def place_at(sequence, head, start, sequences, M, N):
    """The ``Place`` of a tile that begins ``start`` rows into a sequence."""
    first_row = tl.full([], 0, tl.int32)
    first_column, batch = first_row, sequence
    rows, columns = first_row + M, first_row + N
    if sequences.packed is not None:
        batch = first_row
        first_row = _within(tl.load(sequences.q_ptr + sequence), M)
        first_column = _within(tl.load(sequences.k_ptr + sequence), N)
        rows = _within(tl.load(sequences.q_ptr + sequence + 1) - first_row, M - first_row)
        columns = _within(tl.load(sequences.k_ptr + sequence + 1) - first_column, N - first_column)
    else:
        if sequences.q_ptr is not None:
            rows = _within(tl.load(sequences.q_ptr + sequence), M)
        if sequences.k_ptr is not None:
            columns = _within(tl.load(sequences.k_ptr + sequence), N)
    return Place(batch, sequence, head, start, rows, columns, first_row, first_column)


@triton.jit
def locate(
    tile, sequences, B, H, M, N, section, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr, LAST_FIRST: tl.constexpr
):
    """The ``Place`` of the ``tile``-th tile, of BLOCK queries or, with OVER_KEYS, of BLOCK keys.

    Heads are taken ``section`` at a time, and of a section's heads first all first tiles, then all second ones, so that
    programs which run together share keys that fit into the second-level cache. LAST_FIRST begins with the last tiles,
    the longest ones of causal attention. A tile past the last has ``start`` beyond its sequence.
    """
    length = N if OVER_KEYS else M
    blocks = tl.cdiv(length, BLOCK)
    if sequences.packed is None:
        first_head = tile // (section * blocks) * section
        within = tile - first_head * blocks
        heads = tl.minimum(section, B * H - first_head)
        block = within // heads
        if LAST_FIRST:
            block = blocks - 1 - block
        sequence = (first_head + within % heads) // H
        head = (first_head + within % heads) % H
    else:
        head = tile % H
        sequence, block = _search(sequences.k_ptr if OVER_KEYS else sequences.q_ptr, tile // H, B, BLOCK)
        if sequence == B:
            sequence -= 1
            block = blocks
    return place_at(sequence, head, block * BLOCK, sequences, M, N)


@triton.jit
def head_ptr(matrix, batch, head, first_row):
    """Where a head's rows begin. Offsets are int64: a tensor may pass 2^31 elements."""
    units = batch.to(tl.int64) * matrix.stride_b + head.to(tl.int64) * matrix.stride_h
    return matrix.ptr + (units + first_row.to(tl.int64) * matrix.stride_row) * matrix.unit


@triton.jit
def row_offsets(place, head, H, M, offs_m):
    """Where a head's rows stand in a contiguous [B, H, M]."""
    return (place.batch.to(tl.int64) * H + head) * M + place.first_row + offs_m


@triton.jit
def row_stride(matrix):
    """In elements."""
    return matrix.stride_row * matrix.unit


@triton.jit
def load_rows(ptr, stride_row, offs_row, rows, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows of a matrix, zero past either end; [len(offs_row), BLOCK_COLUMNS]."""
    offs_column = tl.arange(0, BLOCK_COLUMNS)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_column[None, :]
    mask = (offs_row < rows)[:, None]
    if COLUMNS != BLOCK_COLUMNS:
        mask = mask & (offs_column < COLUMNS)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, stride_row, tile, offs_row, rows, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The reverse of ``load_rows``, in the matrix's dtype."""
    offs_column = tl.arange(0, BLOCK_COLUMNS)
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_column[None, :]
    mask = (offs_row < rows)[:, None]
    if COLUMNS != BLOCK_COLUMNS:
        mask = mask & (offs_column < COLUMNS)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


settle(globals())
