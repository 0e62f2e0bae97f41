"""A whole sequence in one launch, forward.

Programs are numbered slice by slice: SLICES programs share one *team*, that is one group of BLOCK_B sequences in one
block of the weights in one direction. Each owns BLOCK_H units, keeps its slice of the weights on chip (HOLD; else it
reads it again at every step), and needs the whole team's h at every step: y itself is where they exchange it, so
nothing is reused and the only hazard is the one the barrier removes. Teams never wait for each other. With one slice
no program waits for another, and if one tile holds all units h never leaves the program.
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
    gate_bias,
    gate_weights,
    issued,
    joined,
    load_gates,
    load_rows,
    split_gates,
    store_gates,
)


@triton.jit(do_not_specialize=["T", "B", "R", "first_group", "groups", "initial_rows"])
def recurrence_forward_kernel(
    x_gates_ptr,  # [D, R, (GATES + EXTRA) * H] in rows of x_width * H: x W_ih^T + b_ih, and what a step takes besides
    w_hh_ptr,  # [D, GATES, BLOCKS, UNITS, UNITS]
    b_hh_ptr,  # [D, GATES * H]; unread unless BIAS
    h_init_ptr,  # [D, B or 2B, H]: initial_rows
    c_init_ptr,  # [D, B or 2B, H]; unread unless HAS_C
    y_ptr,  # [R, D * H]: y_width is D
    cells_ptr,  # [R, D * H]; unwritten unless SAVE_CELLS
    saved_ptr,  # [D, R, SAVED * H] in rows of saved_width * H, may be x_gates itself; unwritten unless SAVE
    h_n_ptr,  # [D, B, H]; sequences of no steps are left as they are
    c_n_ptr,  # [D, B, H], likewise; unwritten unless HAS_C
    offset_ptr,  # see layout.py; the next four are unread unless MAPPED
    active_ptr,
    source_ptr,
    last_ptr,  # [D, B] int64: the row of each sequence's last step, or -1
    steps_ptr,  # [all groups] int64: how many steps the group's longest sequence has
    counter_ptr,  # [teams * COUNTER_STRIDE] int32 zeros; unread unless SLICES > 1
    T,
    B,
    R,
    first_group,
    groups,  # of this launch
    initial_rows,
    x_width,  # widths of rows in H, so that what H divides by is known of their addresses
    saved_width,
    y_width,
    STEP: tl.constexpr,
    GATES: tl.constexpr,
    EXTRA: tl.constexpr,  # tiles of a step that belong to no product, behind the gates
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_CELLS: tl.constexpr,
    MAPPED: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,  # H = BLOCKS * UNITS
    SLICES: tl.constexpr,
    MAIN: tl.constexpr,  # gates in the first product, a power of two
    REST: tl.constexpr,  # gates in the second, a power of two or 0
    HOLD: tl.constexpr,
    SWAP: tl.constexpr,
    FOLD: tl.constexpr,  # parts of the contraction multiplied side by side
    STAGE: tl.constexpr,  # tiles of h on their way at once
    CHAINS: tl.constexpr,  # accumulators that take turns
    PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,  # compiled for an NVIDIA GPU
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    H: tl.constexpr = BLOCKS * UNITS
    stride_x, stride_saved, stride_y = x_width * H, saved_width * H, y_width * H
    ROW: tl.constexpr = 0 if SWAP else 1
    TILES: tl.constexpr = (UNITS + FOLD * BLOCK_K - 1) // (FOLD * BLOCK_K)
    # All units in one tile: h goes from one step to the next without leaving the program.
    INSIDE: tl.constexpr = HOLD and SLICES == 1 and FOLD == 1 and BLOCK_K == BLOCK_H

    team = tl.program_id(0) // SLICES
    first_unit = tl.program_id(0) % SLICES * BLOCK_H
    units = first_unit + tl.arange(0, BLOCK_H)
    direction, block = team // (groups * BLOCKS), team // groups % BLOCKS
    group = first_group + team % groups
    offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    columns = block * UNITS + units
    counter_ptr += team * COUNTER_STRIDE

    x_gates_ptr += direction.to(tl.int64) * R * stride_x
    saved_ptr += direction.to(tl.int64) * R * stride_saved
    y_ptr += direction * H
    cells_ptr += direction * H
    w_hh_ptr += direction.to(tl.int64) * GATES * UNITS * H
    b_hh_ptr += direction * GATES * H
    final = direction.to(tl.int64) * B * H
    h_init_ptr += direction.to(tl.int64) * initial_rows * H
    c_init_ptr += direction.to(tl.int64) * initial_rows * H
    own = across(units < UNITS, 1 - ROW)
    exists_b = across(offs_b < B, ROW)
    state_offs = across(offs_b * H, ROW) + across(columns, 1 - ROW)

    if MAPPED:
        steps = tl.load(steps_ptr + group).to(tl.int32)
        last = tl.load(last_ptr + direction * B + offs_b, mask=offs_b < B, other=-1)
    else:
        steps = T

    w_main, w_rest = (), ()
    if HOLD:
        for i in tl.static_range(TILES):
            w = gate_weights(
                w_hh_ptr, block, first_unit, i, FOLD, 0, MAIN, GATES, BLOCKS, UNITS, UNITS, BLOCK_H, BLOCK_K, SWAP
            )
            w_main = w_main + (w,)
            if REST:
                w = gate_weights(
                    w_hh_ptr, block, first_unit, i, FOLD, MAIN, REST, GATES, BLOCKS, UNITS, UNITS, BLOCK_H, BLOCK_K,
                    SWAP,
                )  # fmt: skip
                w_rest = w_rest + (w,)

    h = tl.load(h_init_ptr + state_offs, mask=exists_b & own, other=0.0).to(tl.float32)
    if HAS_C:
        state = (h, tl.load(c_init_ptr + state_offs, mask=exists_b & own, other=0.0).to(tl.float32))
    else:
        state = (h,)
    rows, exists, source = locate(0, steps, direction, offs_b, offset_ptr, active_ptr, source_ptr, B, R, MAPPED)
    x_gates = load_gates(x_gates_ptr, rows, stride_x, columns, H, across(exists, ROW) & own, GATES + EXTRA, ROW)

    for step in range(steps):
        if MAPPED:
            # A sequence that starts here, or is cut off here, does not go on from what the registers hold.
            going = across((source >= 0) & (source < R), ROW)
            starts = across(source >= R, ROW) & own
            start_offs = across((source - R) * H, ROW) + across(columns, 1 - ROW)
            entering = (
                tl.where(going, state[0], tl.load(h_init_ptr + start_offs, mask=starts, other=0.0).to(tl.float32)),
            )
            if HAS_C:
                c_start = tl.load(c_init_ptr + start_offs, mask=starts, other=0.0).to(tl.float32)
                entering = entering + (tl.where(going, state[1], c_start),)
        else:
            entering = state

        main_bias = gate_bias(b_hh_ptr, block, first_unit, 0, MAIN, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP)
        if REST:
            rest_bias = gate_bias(
                b_hh_ptr, block, first_unit, MAIN, REST, BIAS, GATES, BLOCKS, UNITS, BLOCK_H, BLOCK_B, SWAP
            )

        if SLICES > 1:
            wait(counter_ptr, step * SLICES)
        main = main_bias if FOLD == 1 else folded_zeros(FOLD, BLOCK_B, MAIN * BLOCK_H, SWAP)
        if REST:
            rest = rest_bias if FOLD == 1 else folded_zeros(FOLD, BLOCK_B, REST * BLOCK_H, SWAP)
        row_ptrs = entering_rows(source, R, y_ptr, stride_y, h_init_ptr, H, NATIVE) + block * UNITS
        present = source >= 0
        if HOLD:
            mains = chains(main, CHAINS)
            if REST:
                rests = chains(rest, CHAINS)
            for i in tl.static_range(0, TILES, STAGE):
                h_tiles = ()
                for j in tl.static_range(STAGE):
                    if i + j < TILES:
                        if INSIDE:
                            h_tiles = h_tiles + (entering[0].to(y_ptr.dtype.element_ty),)
                        else:
                            h_tiles = h_tiles + (load_rows(row_ptrs, present, i + j, FOLD, 1, 1, UNITS, BLOCK_K, SWAP),)
                if not INSIDE:
                    h_tiles = issued(h_tiles, NATIVE)
                for j in tl.static_range(STAGE):
                    if i + j < TILES:
                        mains = dot_in_turn(h_tiles[j], w_main[i + j], mains, (i + j) % CHAINS, SWAP, PRECISION)
                        if REST:
                            rests = dot_in_turn(h_tiles[j], w_rest[i + j], rests, (i + j) % CHAINS, SWAP, PRECISION)
            main = joined(mains)
            if REST:
                rest = joined(rests)
        else:
            for i in tl.range(TILES, num_stages=STAGE):
                h_tile = load_rows(row_ptrs, present, i, FOLD, 1, 1, UNITS, BLOCK_K, SWAP)
                w = gate_weights(
                    w_hh_ptr, block, first_unit, i, FOLD, 0, MAIN, GATES, BLOCKS, UNITS, UNITS, BLOCK_H, BLOCK_K, SWAP
                )
                main = dot(h_tile, w, main, SWAP, PRECISION)
                if REST:
                    w = gate_weights(
                        w_hh_ptr, block, first_unit, i, FOLD, MAIN, REST, GATES, BLOCKS, UNITS, UNITS, BLOCK_H,
                        BLOCK_K, SWAP,
                    )  # fmt: skip
                    rest = dot(h_tile, w, rest, SWAP, PRECISION)
        if FOLD > 1:
            main = folded_sum(main, FOLD) + main_bias
            if REST:
                rest = folded_sum(rest, FOLD) + rest_bias
        h_gates = split_gates(main, MAIN, BLOCK_B, BLOCK_H, SWAP)
        if REST:
            h_gates = h_gates + split_gates(rest, REST, BLOCK_B, BLOCK_H, SWAP)

        new_state, saved = STEP(x_gates, h_gates, entering)

        mask = across(exists, ROW) & own
        new_h = new_state[0].to(y_ptr.dtype.element_ty)
        if MAPPED:
            new_h = tl.where(across(source != PAST, ROW), new_h, 0.0)
        row_offs = across(rows * stride_y, ROW) + across(columns, 1 - ROW)
        tl.store(y_ptr + row_offs, new_h, mask=mask)
        # Everything that the team does not wait for comes after the signal.
        if SLICES > 1:
            signal(counter_ptr)
        elif not INSIDE:
            tl.debug_barrier()
        if HAS_C:
            state = (new_h.to(tl.float32), new_state[1])
        else:
            state = (new_h.to(tl.float32),)
        if SAVE:
            store_gates(saved_ptr, rows, stride_saved, columns, H, mask, saved, SAVED, ROW)
        if SAVE_CELLS:
            new_c = state[1]
            if MAPPED:
                new_c = tl.where(across(source != PAST, ROW), new_c, 0.0)
            tl.store(cells_ptr + row_offs, new_c.to(cells_ptr.dtype.element_ty), mask=mask)
        if MAPPED:
            ends = across(rows == last, ROW) & mask
            tl.store(h_n_ptr + final + state_offs, new_h.to(h_n_ptr.dtype.element_ty), mask=ends)
            if HAS_C:
                tl.store(c_n_ptr + final + state_offs, state[1].to(c_n_ptr.dtype.element_ty), mask=ends)

        following = tl.minimum(step + 1, steps - 1)
        rows, exists, source = locate(
            following, steps, direction, offs_b, offset_ptr, active_ptr, source_ptr, B, R, MAPPED
        )
        x_gates = load_gates(x_gates_ptr, rows, stride_x, columns, H, across(exists, ROW) & own, GATES + EXTRA, ROW)

    if not MAPPED:
        tl.store(h_n_ptr + final + state_offs, state[0].to(h_n_ptr.dtype.element_ty), mask=exists_b & own)
        if HAS_C:
            tl.store(c_n_ptr + final + state_offs, state[1].to(c_n_ptr.dtype.element_ty), mask=exists_b & own)


settle(globals())
