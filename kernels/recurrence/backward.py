"""A whole sequence in one launch, backward: the walk of ``forward.py`` in reverse, with the same teams and slices.

At each step a program turns the gradient of its own units' h into gradients of their gates, stores these, passes the
barrier, reads the whole team's, and multiplies them with its stationary slice of W_hh, whose units are now the
output. So one barrier a step, no atomics on data, and the same bits at every repeat. The gradients of the weights
and of x are large products over all steps, for the library, afterwards.
"""

import triton
import triton.language as tl

from ..grid import COUNTER_STRIDE, signal, wait
from ..settled import settle
from .layout import PAST, entering_rows, locate
from .products import (
    across,
    chains,
    dot,
    dot_in_turn,
    folded_sum,
    folded_zeros,
    issued,
    joined,
    load_gates,
    load_rows,
    store_gates,
    unit_weights,
)


@triton.jit
def _load_step(
    rows,
    exists,
    source,
    columns,
    own,
    saved_ptr,
    y_ptr,
    cells_ptr,
    h_init_ptr,
    c_init_ptr,
    dy_ptr,
    dcells_ptr,
    stride_saved,
    stride_y,
    R,
    H,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DCELLS: tl.constexpr,
    ROW: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """What a step reads that no other program writes: (saved…), state, new state, gradients from outside."""
    mask = across(exists, ROW) & own
    entering = across(source >= 0, ROW) & own
    saved = load_gates(saved_ptr, rows, stride_saved, columns, H, mask, SAVED, ROW)
    columns = across(columns, 1 - ROW)
    row_offs = across(rows * stride_y, ROW) + columns
    h_rows = entering_rows(source, R, y_ptr, stride_y, h_init_ptr, H, NATIVE)
    state = (tl.load(across(h_rows, ROW) + columns, mask=entering, other=0.0).to(tl.float32),)
    new_state = (tl.load(y_ptr + row_offs, mask=mask, other=0.0).to(tl.float32),)
    if HAS_C:
        c_rows = entering_rows(source, R, cells_ptr, stride_y, c_init_ptr, H, NATIVE)
        state = state + (tl.load(across(c_rows, ROW) + columns, mask=entering, other=0.0).to(tl.float32),)
        new_state = new_state + (tl.load(cells_ptr + row_offs, mask=mask, other=0.0).to(tl.float32),)
    dstate = (tl.zeros_like(new_state[0]),)
    if HAS_DY:
        dstate = (tl.load(dy_ptr + row_offs, mask=mask, other=0.0).to(tl.float32),)
    if HAS_C:
        if HAS_DCELLS:
            dstate = dstate + (tl.load(dcells_ptr + row_offs, mask=mask, other=0.0).to(tl.float32),)
        else:
            dstate = dstate + (tl.zeros_like(new_state[0]),)
    return saved, state, new_state, dstate


@triton.jit
def _bounded(tiles, valid, clip, COUNT: tl.constexpr, CLIP: tl.constexpr):
    """Gradients of pre-activations as they travel on: none past a sequence's end, none beyond ``clip``."""
    bounded = ()
    for k in tl.static_range(COUNT):
        # By selecting, not multiplying: what stands past the end may be NaN.
        tile = tl.where(valid, tiles[k], 0.0)
        if CLIP:
            tile = tl.clamp(tile, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
        bounded = bounded + (tile,)
    return bounded


@triton.jit(do_not_specialize=["clip", "T", "B", "R", "first_group", "groups", "initial_rows", "saved_direction"])
def recurrence_backward_kernel(
    saved_ptr,  # [D, R, SAVED * H] in rows of saved_width * H, directions saved_direction * H
    w_hh_ptr,  # [D, GATES, BLOCKS, UNITS, UNITS]
    y_ptr,  # [R, D * H]: y_width is D
    cells_ptr,  # [R, D * H]; unread unless HAS_C
    h_init_ptr,  # [D, B or 2B, H]: initial_rows
    c_init_ptr,  # [D, B or 2B, H]; unread unless HAS_C
    dy_ptr,  # [R, D * H]; unread unless HAS_DY
    dcells_ptr,  # [R, D * H]; unread unless HAS_DCELLS
    dh_n_ptr,  # [D, B, H]; unread unless HAS_DH_N
    dc_n_ptr,  # [D, B, H]; unread unless HAS_DC_N
    dx_gates_ptr,  # [D, R, GATES * H]; unwritten unless APART
    dh_gates_ptr,  # [D, R, GATES * H]
    dh_init_ptr,  # [D, B or 2B, H]; sequences of no steps are left as they are
    dc_init_ptr,  # [D, B or 2B, H], likewise; unwritten unless HAS_C
    offset_ptr,  # these five as in forward.py
    active_ptr,
    source_ptr,
    last_ptr,
    steps_ptr,
    counter_ptr,
    clip,
    T,
    B,
    R,
    first_group,
    groups,
    initial_rows,
    saved_width,  # of rows and of directions, in H
    saved_direction,
    y_width,
    STEP_BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    APART: tl.constexpr,  # the two pre-activations have gradients of their own
    HAS_C: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DCELLS: tl.constexpr,
    HAS_DH_N: tl.constexpr,
    HAS_DC_N: tl.constexpr,
    CLIP: tl.constexpr,
    MAPPED: tl.constexpr,
    RESETS: tl.constexpr,  # given states are put in: there are 2B initial ones
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    SLICES: tl.constexpr,
    HOLD: tl.constexpr,
    SWAP: tl.constexpr,
    FOLD: tl.constexpr,  # parts of the contraction multiplied side by side
    STAGE: tl.constexpr,
    CHAINS: tl.constexpr,  # accumulators that take turns
    PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,  # compiled for an NVIDIA GPU
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    H: tl.constexpr = BLOCKS * UNITS
    stride_saved, stride_y = saved_width * H, y_width * H
    ROW: tl.constexpr = 0 if SWAP else 1
    TILES: tl.constexpr = (GATES * UNITS + FOLD * BLOCK_K - 1) // (FOLD * BLOCK_K)

    team = tl.program_id(0) // SLICES
    first_unit = tl.program_id(0) % SLICES * BLOCK_H
    units = first_unit + tl.arange(0, BLOCK_H)
    direction, block = team // (groups * BLOCKS), team // groups % BLOCKS
    group = first_group + team % groups
    offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    columns = block * UNITS + units
    counter_ptr += team * COUNTER_STRIDE

    saved_ptr += direction.to(tl.int64) * saved_direction * H
    y_ptr += direction * H
    cells_ptr += direction * H
    dy_ptr += direction * H
    dcells_ptr += direction * H
    w_hh_ptr += direction.to(tl.int64) * GATES * UNITS * H
    dx_gates_ptr += direction.to(tl.int64) * R * GATES * H
    dh_gates_ptr += direction.to(tl.int64) * R * GATES * H
    initial = direction.to(tl.int64) * initial_rows * H
    h_init_ptr += initial
    c_init_ptr += initial
    dh_init_ptr += initial
    dc_init_ptr += initial
    own = across(units < UNITS, 1 - ROW)
    exists_b = across(offs_b < B, ROW)
    state_offs = across(offs_b * H, ROW) + across(columns, 1 - ROW)
    final_offs = direction.to(tl.int64) * B * H + state_offs

    if MAPPED:
        steps = tl.load(steps_ptr + group).to(tl.int32)
        last = tl.load(last_ptr + direction * B + offs_b, mask=offs_b < B, other=-1)
    else:
        steps = T

    weights = ()
    if HOLD:
        for i in tl.static_range(TILES):
            weights = weights + (
                unit_weights(w_hh_ptr, block, first_unit, i, FOLD, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_K, SWAP),
            )

    dh = tl.zeros((BLOCK_H, BLOCK_B) if SWAP else (BLOCK_B, BLOCK_H), tl.float32)
    dc = tl.zeros_like(dh)
    dh_n = dh
    dc_n = dh
    if HAS_DH_N:
        dh_n = tl.load(dh_n_ptr + final_offs, mask=exists_b & own, other=0.0).to(tl.float32)
    if HAS_DC_N:
        dc_n = tl.load(dc_n_ptr + final_offs, mask=exists_b & own, other=0.0).to(tl.float32)
    if not MAPPED:
        dh, dc = dh_n, dc_n
    dh_reset = tl.zeros_like(dh)
    dc_reset = tl.zeros_like(dh)

    rows, exists, source = locate(
        steps - 1, steps, direction, offs_b, offset_ptr, active_ptr, source_ptr, B, R, MAPPED
    )
    saved, state, new_state, dout = _load_step(
        rows, exists, source, columns, own, saved_ptr, y_ptr, cells_ptr, h_init_ptr, c_init_ptr, dy_ptr, dcells_ptr,
        stride_saved, stride_y, R, H, SAVED, HAS_C, HAS_DY, HAS_DCELLS, ROW, NATIVE,
    )  # fmt: skip

    for walked in range(steps):
        dh += dout[0]
        if HAS_C:
            dc += dout[1]
        if MAPPED:
            ends = across(rows == last, ROW)
            if HAS_DH_N:
                dh += tl.where(ends, dh_n, 0.0)
            if HAS_DC_N:
                dc += tl.where(ends, dc_n, 0.0)
        if HAS_C:
            dx_gates, dh_gates, dstate = STEP_BACKWARD(saved, state, new_state, (dh, dc))
        else:
            dx_gates, dh_gates, dstate = STEP_BACKWARD(saved, state, new_state, (dh,))

        valid = across(source != PAST, ROW)
        mask = across(exists, ROW) & own
        dh_gates = _bounded(dh_gates, valid, clip, GATES, CLIP)
        store_gates(dh_gates_ptr, rows, GATES * H, columns, H, mask, dh_gates, GATES, ROW)
        # Everything that the team does not wait for comes after the signal.
        if SLICES > 1:
            signal(counter_ptr)
        else:
            tl.debug_barrier()
        if APART:
            dx_gates = _bounded(dx_gates, valid, clip, GATES, CLIP)
            store_gates(dx_gates_ptr, rows, GATES * H, columns, H, mask, dx_gates, GATES, ROW)

        before = tl.maximum(steps - 2 - walked, 0)
        next_rows, next_exists, next_source = locate(
            before, steps, direction, offs_b, offset_ptr, active_ptr, source_ptr, B, R, MAPPED
        )
        saved, state, new_state, dout = _load_step(
            next_rows, next_exists, next_source, columns, own, saved_ptr, y_ptr, cells_ptr, h_init_ptr, c_init_ptr,
            dy_ptr, dcells_ptr, stride_saved, stride_y, R, H, SAVED, HAS_C, HAS_DY, HAS_DCELLS, ROW, NATIVE,
        )  # fmt: skip

        if SLICES > 1:
            wait(counter_ptr, (walked + 1) * SLICES)
        row_ptrs = dh_gates_ptr + rows * (GATES * H) + block * UNITS
        acc = folded_zeros(FOLD, BLOCK_B, BLOCK_H, SWAP)
        if HOLD:
            accs = chains(acc, CHAINS)
            for i in tl.static_range(0, TILES, STAGE):
                tiles = ()
                for j in tl.static_range(STAGE):
                    if i + j < TILES:
                        tiles = tiles + (
                            load_rows(row_ptrs, exists, i + j, FOLD, GATES, BLOCKS, UNITS, BLOCK_K, SWAP),
                        )
                tiles = issued(tiles, NATIVE)
                for j in tl.static_range(STAGE):
                    if i + j < TILES:
                        accs = dot_in_turn(tiles[j], weights[i + j], accs, (i + j) % CHAINS, SWAP, PRECISION)
            acc = joined(accs)
        else:
            for i in tl.range(TILES, num_stages=STAGE):
                tile = load_rows(row_ptrs, exists, i, FOLD, GATES, BLOCKS, UNITS, BLOCK_K, SWAP)
                w = unit_weights(w_hh_ptr, block, first_unit, i, FOLD, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_K, SWAP)
                acc = dot(tile, w, acc, SWAP, PRECISION)

        # What enters this step's state goes on to the step before, or ends in the initial state, or at a cut.
        dh = tl.where(valid, folded_sum(acc, FOLD) + dstate[0], 0.0)
        if HAS_C:
            dc = tl.where(valid, dstate[1], 0.0)
        if MAPPED:
            starts = across((source >= R) & (source < R + B), ROW) & own
            tl.store(dh_init_ptr + state_offs, dh.to(dh_init_ptr.dtype.element_ty), mask=starts)
            going = across((source >= 0) & (source < R), ROW)
            if RESETS:
                put_in = across(source >= R + B, ROW)
                dh_reset += tl.where(put_in, dh, 0.0)
                if HAS_C:
                    dc_reset += tl.where(put_in, dc, 0.0)
            dh = tl.where(going, dh, 0.0)
            if HAS_C:
                tl.store(dc_init_ptr + state_offs, dc.to(dc_init_ptr.dtype.element_ty), mask=starts)
                dc = tl.where(going, dc, 0.0)
        rows, exists, source = next_rows, next_exists, next_source

    if not MAPPED:
        tl.store(dh_init_ptr + state_offs, dh.to(dh_init_ptr.dtype.element_ty), mask=exists_b & own)
        if HAS_C:
            tl.store(dc_init_ptr + state_offs, dc.to(dc_init_ptr.dtype.element_ty), mask=exists_b & own)
    if RESETS:
        reset_offs = state_offs + B.to(tl.int64) * H
        tl.store(dh_init_ptr + reset_offs, dh_reset.to(dh_init_ptr.dtype.element_ty), mask=exists_b & own)
        if HAS_C:
            tl.store(dc_init_ptr + reset_offs, dc_reset.to(dc_init_ptr.dtype.element_ty), mask=exists_b & own)


settle(globals())
