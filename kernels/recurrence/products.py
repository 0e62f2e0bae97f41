"""The matrix products of a time step: a slice of the weights against the rows that arrive at that step.

A program owns BLOCK_H hidden units of one block of the weights (all of them unless ``blocks`` are asked for). Its
tiles stand either way up: rows of the batch by units, or, SWAP, units by rows. The product's left operand needs 64
rows for the widest matrix instruction, and at small batches only the weights have them.

FOLD parts of the contraction may be multiplied side by side, and summed afterwards: then each warp has a part of its
own, instead of all warps reading the same rows, and has many products at a time that do not wait for each other.

``HOLD`` loads the slice once, before the time loop, as a tuple of tiles: the compiler then keeps it in shared memory,
and no hidden size has to be padded to a power of two. Otherwise the slice is read again at every step.
"""

import triton
import triton.language as tl

from ..settled import settle


@triton.jit
def across(values, AXIS: tl.constexpr):
    """A vector as a tile of one row (AXIS 0) or one column (AXIS 1)."""
    return tl.expand_dims(values, AXIS)


@triton.jit
def load_gates(ptr, rows, stride, columns, H, mask, COUNT: tl.constexpr, ROW: tl.constexpr):
    """COUNT float32 tiles that stand side by side in rows of COUNT * H, every H columns."""
    tiles = ()
    for k in tl.static_range(COUNT):
        ptrs = across(ptr + rows * stride, ROW) + across(k * H + columns, 1 - ROW)
        tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_gates(ptr, rows, stride, columns, H, mask, tiles, COUNT: tl.constexpr, ROW: tl.constexpr):
    """The reverse of ``load_gates``, in the dtype of the tensor."""
    for k in tl.static_range(COUNT):
        ptrs = across(ptr + rows * stride, ROW) + across(k * H + columns, 1 - ROW)
        tl.store(ptrs, tiles[k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def issued(tiles, NATIVE: tl.constexpr):
    """``tiles``, all of whose loads are on their way before any of them is waited for.

    Left to itself the compiler loads a little and stores it to shared memory in turn, and pays the latency of the
    second-level cache at each turn. No load moves down past a barrier, which waits for none; and the copies, which
    cost nothing, keep the stores below it.
    """
    if NATIVE:
        tl.debug_barrier()
        arrived = ()
        for i in tl.static_range(len(tiles)):
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;",
                "=r,r",
                [tiles[i]],
                dtype=tiles[i].dtype,
                is_pure=False,
                pack=32 // tiles[i].dtype.primitive_bitwidth,
            )
            arrived = arrived + (tile,)
        tiles = arrived
    return tiles


@triton.jit
def dot(rows, weights, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + rows weights, or its transpose where tiles stand the other way up."""
    if SWAP:
        acc = tl.dot(weights, rows, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(rows, weights, acc, input_precision=PRECISION)
    return acc


@triton.jit
def chains(acc, CHAINS: tl.constexpr):
    """``acc`` and zeros: accumulators that take turns.

    A product that adds to the result of the one before waits for it, and at small batches a program has too few
    others to fill that time.
    """
    accs = (acc,)
    for _ in tl.static_range(CHAINS - 1):
        accs = accs + (tl.zeros_like(acc),)
    return accs


@triton.jit
def dot_in_turn(rows, weights, accs, TURN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """``accs`` with the product added to the one whose turn it is."""
    return accs[:TURN] + (dot(rows, weights, accs[TURN], SWAP, PRECISION),) + accs[TURN + 1 :]


@triton.jit
def joined(accs):
    """The sum of accumulators that took turns."""
    acc = accs[0]
    for i in tl.static_range(1, len(accs)):
        acc += accs[i]
    return acc


@triton.jit
def _along(values, AXIS: tl.constexpr, FOLD: tl.constexpr):
    """A vector along the first (0) or second (1) of a tile's dimensions, which follow that of the folds, if any."""
    values = across(values, 1 - AXIS)
    return values if FOLD == 1 else values[None, :, :]


@triton.jit
def _places(tile, AXIS: tl.constexpr, FOLD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where tile ``tile`` stands in the contraction: FOLD by BLOCK_K places, these along AXIS."""
    place = tile * FOLD * BLOCK_K + _along(tl.arange(0, BLOCK_K), AXIS, FOLD)
    # With one fold the tile has two dimensions, which the widest matrix instructions need, and comes as it is loaded.
    return place if FOLD == 1 else place + tl.arange(0, FOLD)[:, None, None] * BLOCK_K


@triton.jit
def _far(rows, ELEMENTS: tl.constexpr):
    """Numbers of rows of a matrix, in the width that offsets of its elements need: 64 bits cost registers."""
    return rows.to(tl.int64) if ELEMENTS > 2**31 else rows


@triton.jit
def gate_weights(
    w_ptr,  # [GATES, BLOCKS, UNITS, K]
    block,
    first_unit,  # of this program
    tile,
    FOLD: tl.constexpr,
    FIRST: tl.constexpr,  # of COUNT gates
    COUNT: tl.constexpr,
    GATES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """A tile of what leads to COUNT gates of these units: [FOLD, BLOCK_K, COUNT * BLOCK_H], or standing, transposed.

    Gate-major columns let the accumulator be split into gates without moving a value between threads.
    """
    AXIS: tl.constexpr = 1 if SWAP else 0
    columns = _along(tl.arange(0, COUNT * BLOCK_H), 1 - AXIS, FOLD)
    gate = FIRST + columns // BLOCK_H
    unit = first_unit + columns % BLOCK_H
    k = _places(tile, AXIS, FOLD, BLOCK_K)
    row = _far((gate * BLOCKS + block) * UNITS + unit, GATES * BLOCKS * UNITS * K)
    ptrs = w_ptr + row * K + k
    return tl.load(ptrs, mask=(gate < GATES) & (unit < UNITS) & (k < K), other=0.0)


@triton.jit
def gate_bias(
    b_ptr,  # [GATES, BLOCKS * UNITS]; unread unless BIAS
    block,
    first_unit,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    GATES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SWAP: tl.constexpr,
):
    """The bias of COUNT gates in every row, or zeros: what an accumulator that is not folded starts from."""
    AXIS: tl.constexpr = 1 if SWAP else 0
    acc = tl.zeros((COUNT * BLOCK_H, BLOCK_B) if SWAP else (BLOCK_B, COUNT * BLOCK_H), tl.float32)
    if BIAS:
        columns = tl.arange(0, COUNT * BLOCK_H)
        gate = FIRST + columns // BLOCK_H
        unit = first_unit + columns % BLOCK_H
        mask = (gate < GATES) & (unit < UNITS)
        bias = tl.load(b_ptr + (gate * BLOCKS + block) * UNITS + unit, mask=mask, other=0.0).to(tl.float32)
        acc += across(bias, AXIS)
    return acc


@triton.jit
def split_gates(acc, COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, SWAP: tl.constexpr):
    """COUNT (1, 2, 4 or 8) gates' tiles out of one accumulator, gate-major along the units."""
    if COUNT == 1:
        gates = (acc,)
    else:
        HALF: tl.constexpr = COUNT // 2
        if SWAP:
            halves = tl.reshape(acc, (2, HALF * BLOCK_H, BLOCK_B)).permute(1, 2, 0)
        else:
            halves = tl.reshape(acc, (BLOCK_B, 2, HALF * BLOCK_H)).permute(0, 2, 1)
        low, high = tl.split(halves)
        gates = split_gates(low, HALF, BLOCK_B, BLOCK_H, SWAP) + split_gates(high, HALF, BLOCK_B, BLOCK_H, SWAP)
    return gates


@triton.jit
def unit_weights(
    w_ptr,  # [GATES, BLOCKS, UNITS, UNITS]
    block,
    first_unit,
    tile,
    FOLD: tl.constexpr,
    GATES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """A tile of what leads from all gates to these units: [FOLD, BLOCK_K, BLOCK_H], or standing, transposed."""
    AXIS: tl.constexpr = 1 if SWAP else 0
    place = _places(tile, AXIS, FOLD, BLOCK_K)
    unit = first_unit + _along(tl.arange(0, BLOCK_H), 1 - AXIS, FOLD)
    row = _far((place // UNITS * BLOCKS + block) * UNITS + place % UNITS, GATES * BLOCKS * UNITS * UNITS)
    ptrs = w_ptr + row * UNITS + unit
    return tl.load(ptrs, mask=(place < GATES * UNITS) & (unit < UNITS), other=0.0)


@triton.jit
def load_rows(
    row_ptrs,  # [BLOCK_B], at the first gate's first unit of the block
    present,
    tile,
    FOLD: tl.constexpr,
    GATES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    """A tile of rows [GATES, BLOCKS, UNITS], of one block: [FOLD, BLOCK_B, BLOCK_K], or standing, transposed.

    Zeros where a row is not ``present``.
    """
    AXIS: tl.constexpr = 0 if SWAP else 1
    place = _places(tile, AXIS, FOLD, BLOCK_K)
    offs = place if BLOCKS == 1 else place // UNITS * (BLOCKS * UNITS) + place % UNITS
    mask = _along(present, 1 - AXIS, FOLD)
    if GATES * UNITS % (FOLD * BLOCK_K):
        mask = mask & (place < GATES * UNITS)
    # Past the first-level cache: other multiprocessors may have written this a moment ago.
    return tl.load(_along(row_ptrs, 1 - AXIS, FOLD) + offs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def folded_zeros(FOLD: tl.constexpr, BLOCK_B: tl.constexpr, OUTPUTS: tl.constexpr, SWAP: tl.constexpr):
    """An accumulator for products of such tiles."""
    ROWS: tl.constexpr = OUTPUTS if SWAP else BLOCK_B
    COLUMNS: tl.constexpr = BLOCK_B if SWAP else OUTPUTS
    return tl.zeros((ROWS, COLUMNS) if FOLD == 1 else (FOLD, ROWS, COLUMNS), tl.float32)


@triton.jit
def folded_sum(acc, FOLD: tl.constexpr):
    """Its sum over the folds.

    By halves: a reduction's result would stand in a layout that has every thread hold all folds' places, and pull
    the pointwise math that follows into it, with a conversion for each of its operands.
    """
    if FOLD == 1:
        total = acc
    else:
        HALF: tl.constexpr = FOLD // 2
        low, high = tl.split(tl.reshape(acc, (2, HALF, acc.shape[1], acc.shape[2])).permute(1, 2, 3, 0))
        if HALF == 1:
            total = tl.reshape(low + high, (acc.shape[1], acc.shape[2]))
        else:
            total = folded_sum(low + high, HALF)
    return total


settle(globals())
