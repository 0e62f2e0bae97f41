"""What a time step costs before a single product is made: kernels that only wait for each other and exchange rows.

They have the barrier, the teams and the slices of the sequence kernels, and nothing else. The benchmarks measure them
as the floor that a step of a recurrence cannot go below.
"""

import triton
import triton.language as tl

from .grid import COUNTER_STRIDE, signal, wait
from .settled import settle


@triton.jit
def empty_kernel():
    """What launching anything costs."""
    pass


@triton.jit(do_not_specialize=["T"])
def barrier_kernel(
    counter_ptr,  # [teams * COUNTER_STRIDE] int32 zeros
    T,
    SLICES: tl.constexpr,  # programs that wait for one another
):
    """T barriers among the SLICES programs of each team."""
    counter_ptr += tl.program_id(0) // SLICES * COUNTER_STRIDE
    for step in range(T):
        signal(counter_ptr)
        wait(counter_ptr, (step + 1) * SLICES)


@triton.jit(do_not_specialize=["T", "teams"])
def exchange_kernel(
    rows_ptr,  # [T + 1, teams * BLOCK_B, WIDTH] int32; those of step 0 are given, all others are written
    counter_ptr,  # [teams * COUNTER_STRIDE] int32 zeros
    T,
    teams,
    SLICES: tl.constexpr,
    WIDTH: tl.constexpr,  # columns that a team exchanges
    SHARE: tl.constexpr,  # columns of them that one program writes
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """T times: read all of the team's rows, write this program's share of the next step's, pass the barrier.

    What is written is one more than the sum over the tiles that were read, at the same place of each tile: a step
    cannot begin before the last has arrived, yet no value moves between threads, which would take time of its own.
    """
    team, first_column = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES * SHARE
    offs_b = (team * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    ptrs = rows_ptr + offs_b[:, None] * WIDTH + offs_k[None, :]
    stride_step = teams.to(tl.int64) * (BLOCK_B * WIDTH)
    counter_ptr += team * COUNTER_STRIDE
    for step in range(T):
        total = tl.full((BLOCK_B, BLOCK_K), 1, tl.int32)  # [BLOCK_B, BLOCK_K]
        for i in tl.static_range((WIDTH + BLOCK_K - 1) // BLOCK_K):
            mask_k = i * BLOCK_K + offs_k < WIDTH
            # Past the first-level cache, as the sequence kernels read what other multiprocessors wrote.
            total += tl.load(ptrs + i * BLOCK_K, mask=mask_k[None, :], other=0, cache_modifier=".cg")
        ptrs += stride_step
        for i in tl.static_range((SHARE + BLOCK_K - 1) // BLOCK_K):
            offs_own = i * BLOCK_K + offs_k
            mask_own = (offs_own < SHARE) & (first_column + offs_own < WIDTH)
            tl.store(ptrs + first_column + i * BLOCK_K, total, mask=mask_own[None, :])
        signal(counter_ptr)
        wait(counter_ptr, (step + 1) * SLICES)


settle(globals())
