"""One time step in one launch: both products and the pointwise math. For Cells and for decoding step by step.

Nothing is kept on chip between launches, so both weights are streamed once, and each program's share of them is what
bounds it: programs own BLOCK_H units for BLOCK_B sequences, and no program waits for another.
"""

import triton
import triton.language as tl

from ..settled import settle
from .products import across, dot, gate_bias, gate_weights, load_rows, split_gates, store_gates


@triton.jit
def _product(
    acc_main,
    acc_rest,
    rows_ptr,
    exists,
    w_ptr,
    block,
    first_unit,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    GATES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    for i in tl.range((K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        rows = load_rows(rows_ptr, exists, i, 1, 1, 1, K, BLOCK_K, SWAP)
        w = gate_weights(w_ptr, block, first_unit, i, 1, 0, MAIN, GATES, BLOCKS, UNITS, K, BLOCK_H, BLOCK_K, SWAP)
        acc_main = dot(rows, w, acc_main, SWAP, PRECISION)
        if REST:
            w = gate_weights(
                w_ptr, block, first_unit, i, 1, MAIN, REST, GATES, BLOCKS, UNITS, K, BLOCK_H, BLOCK_K, SWAP
            )
            acc_rest = dot(rows, w, acc_rest, SWAP, PRECISION)
    return acc_main, acc_rest


@triton.jit(do_not_specialize=["B"])
def recurrence_step_kernel(
    x_ptr,  # [B, I], rows stride_x
    w_ih_ptr,  # [GATES, BLOCKS, UNITS, I]
    b_ih_ptr,  # [GATES * H]; unread unless BIAS
    w_hh_ptr,  # [GATES, BLOCKS, UNITS, UNITS]
    b_hh_ptr,  # [GATES * H]; unread unless BIAS
    h_ptr,  # [B, H], rows stride_h
    c_ptr,  # [B, H], rows stride_c; unread unless HAS_C
    y_ptr,  # [B, H], contiguous, as all that follows
    h_n_ptr,  # [B, H], the same once more
    c_n_ptr,  # [B, H]; unwritten unless HAS_C
    cells_ptr,  # [B, H], the same once more; unwritten unless SAVE_CELLS
    saved_ptr,  # [B, SAVED * H]; unwritten unless SAVE
    B,
    stride_x,
    stride_h,
    stride_c,
    STEP: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,  # H = BLOCKS * UNITS
    SLICES: tl.constexpr,
    MAIN: tl.constexpr,  # gates in the first product, a power of two
    REST: tl.constexpr,  # gates in the second, a power of two or 0
    SWAP: tl.constexpr,
    STAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One step of one direction of one layer; grid (blocks of B * BLOCKS * SLICES,), along batches first."""
    H: tl.constexpr = BLOCKS * UNITS
    ROW: tl.constexpr = 0 if SWAP else 1
    groups = tl.cdiv(B, BLOCK_B)
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    block, first_unit = part // SLICES, part % SLICES * BLOCK_H
    units = first_unit + tl.arange(0, BLOCK_H)
    columns = block * UNITS + units
    offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    exists = offs_b < B
    mask = across(exists, ROW) & across(units < UNITS, 1 - ROW)

    x_main = gate_bias(b_ih_ptr, block, first_unit, 0, MAIN, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP)
    h_main = gate_bias(b_hh_ptr, block, first_unit, 0, MAIN, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP)
    x_rest, h_rest = x_main, h_main
    if REST:
        x_rest = gate_bias(b_ih_ptr, block, first_unit, MAIN, REST, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP)
        h_rest = gate_bias(b_hh_ptr, block, first_unit, MAIN, REST, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP)
    x_main, x_rest = _product(
        x_main, x_rest, x_ptr + offs_b * stride_x, exists, w_ih_ptr, block, first_unit, INPUTS, MAIN, REST, GATES,
        BLOCKS, UNITS, STAGE, PRECISION, BLOCK_H, BLOCK_K, SWAP,
    )  # fmt: skip
    h_main, h_rest = _product(
        h_main, h_rest, h_ptr + offs_b * stride_h + block * UNITS, exists, w_hh_ptr, block, first_unit, UNITS, MAIN,
        REST, GATES, BLOCKS, UNITS, STAGE, PRECISION, BLOCK_H, BLOCK_K, SWAP,
    )  # fmt: skip
    x_gates = split_gates(x_main, MAIN, BLOCK_B, BLOCK_H, SWAP)
    h_gates = split_gates(h_main, MAIN, BLOCK_B, BLOCK_H, SWAP)
    if REST:
        x_gates = x_gates + split_gates(x_rest, REST, BLOCK_B, BLOCK_H, SWAP)
        h_gates = h_gates + split_gates(h_rest, REST, BLOCK_B, BLOCK_H, SWAP)

    columns_2d = across(columns, 1 - ROW)
    state = (tl.load(across(h_ptr + offs_b * stride_h, ROW) + columns_2d, mask=mask, other=0.0).to(tl.float32),)
    if HAS_C:
        c = tl.load(across(c_ptr + offs_b * stride_c, ROW) + columns_2d, mask=mask, other=0.0)
        state = state + (c.to(tl.float32),)
    new_state, saved = STEP(x_gates, h_gates, state)

    offs = across(offs_b * H, ROW) + columns_2d
    tl.store(y_ptr + offs, new_state[0].to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(h_n_ptr + offs, new_state[0].to(h_n_ptr.dtype.element_ty), mask=mask)
    if HAS_C:
        tl.store(c_n_ptr + offs, new_state[1].to(c_n_ptr.dtype.element_ty), mask=mask)
    if SAVE_CELLS:
        tl.store(cells_ptr + offs, new_state[1].to(cells_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        store_gates(saved_ptr, offs_b, SAVED * H, columns, H, mask, saved, SAVED, ROW)


settle(globals())
