"""Every step's gates at once, from both pre-activations: what ``recompute`` saves for backward after the fact."""

import triton
import triton.language as tl

from ..settled import settle
from .products import load_gates, store_gates


@triton.jit(do_not_specialize=["R"])
def pointwise_kernel(
    x_gates_ptr,  # [R, (GATES + EXTRA) * H], rows stride_x
    h_gates_ptr,  # [R, GATES * H], contiguous
    h_ptr,  # [R, H] entering each step, contiguous
    c_ptr,  # [R, H] likewise; unread unless HAS_C
    saved_ptr,  # [R, SAVED * H], rows stride_saved; may be x_gates itself
    R,
    H,
    stride_x,
    stride_saved,
    STEP: tl.constexpr,
    GATES: tl.constexpr,
    EXTRA: tl.constexpr,  # tiles that belong to no product, behind the gates
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The cell's step on independent rows, of which only what backward needs is kept; grid (tiles,), rows first."""
    groups = tl.cdiv(R, BLOCK_B)
    rows = (tl.program_id(0) % groups * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    columns = tl.program_id(0) // groups * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < R)[:, None] & (columns < H)[None, :]
    offs = rows[:, None] * H + columns[None, :]

    x_gates = load_gates(x_gates_ptr, rows, stride_x, columns, H, mask, GATES + EXTRA, 1)
    h_gates = load_gates(h_gates_ptr, rows, GATES * H, columns, H, mask, GATES, 1)
    state = (tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32),)
    if HAS_C:
        state = state + (tl.load(c_ptr + offs, mask=mask, other=0.0).to(tl.float32),)
    _, saved = STEP(x_gates, h_gates, state)
    store_gates(saved_ptr, rows, stride_saved, columns, H, mask, saved, SAVED, 1)


settle(globals())
