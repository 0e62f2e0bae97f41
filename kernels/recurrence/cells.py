"""The pointwise math of ONE time step of each cell, forward and backward, and the kernels that apply it.

A cell is a pair of device functions over float32 tiles, and a tuple stands for whatever a cell has several of:

``step(x_gates, h_gates, state) -> (state, saved)``
    ``x_gates = x W_ih^T + b_ih`` and ``h_gates = h W_hh^T + b_hh``, one tile a gate, in torch's gate order;
    ``state`` is (h,) or (h, c) entering the step and, returned, leaving it; ``saved`` is what backward needs.

``step_backward(saved, state, new_state, dstate) -> (dx_gates, dh_gates, dstate)``
    Gradients of both pre-activations, and the part of the entering state's gradient that does not pass through
    ``W_hh`` (that product is the caller's).

The formulas stand here once; every kernel of the recurrence calls them.
"""

import triton
import triton.language as tl

from ..activations import sigmoid, tanh


@triton.jit
def rnn_tanh_step(x_gates, h_gates, state):
    """h' = tanh(a)."""
    h = tanh(x_gates[0] + h_gates[0])
    return (h,), (h,)


@triton.jit
def rnn_tanh_step_backward(saved, state, new_state, dstate):
    da = dstate[0] * (1.0 - saved[0] * saved[0])
    return (da,), (da,), (da * 0.0,)


@triton.jit
def rnn_relu_step(x_gates, h_gates, state):
    """h' = max(a, 0), letting NaN through as torch does."""
    a = x_gates[0] + h_gates[0]
    h = tl.where(a < 0.0, 0.0, a)
    return (h,), (h,)


@triton.jit
def rnn_relu_step_backward(saved, state, new_state, dstate):
    da = tl.where(saved[0] > 0.0, dstate[0], 0.0)
    return (da,), (da,), (da * 0.0,)


@triton.jit
def gru_step(x_gates, h_gates, state):
    """h' = (1 - z) n + z h with n = tanh(x_n + r h_n): torch's GRU, which resets after the product."""
    r = sigmoid(x_gates[0] + h_gates[0])
    z = sigmoid(x_gates[1] + h_gates[1])
    n = tanh(x_gates[2] + r * h_gates[2])
    h = n + z * (state[0] - n)
    return (h,), (r, z, n, h_gates[2])


@triton.jit
def gru_step_backward(saved, state, new_state, dstate):
    r, z, n, h_n = saved
    dh = dstate[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (state[0] - n) * z * (1.0 - z)
    dr = dn * h_n * r * (1.0 - r)
    return (dr, dz, dn), (dr, dz, dn * r), (dh * z,)


@triton.jit
def lstm_step(x_gates, h_gates, state):
    """c' = f c + i g and h' = o tanh(c')."""
    i = sigmoid(x_gates[0] + h_gates[0])
    f = sigmoid(x_gates[1] + h_gates[1])
    g = tanh(x_gates[2] + h_gates[2])
    o = sigmoid(x_gates[3] + h_gates[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


@triton.jit
def lstm_step_backward(saved, state, new_state, dstate):
    i, f, g, o = saved
    tanh_c = tanh(new_state[1])
    dh = dstate[0]
    dc = dstate[1] + dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * state[1] * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    dgates = (di, df, dg, do)
    return dgates, dgates, (dh * 0.0, dc * f)


@triton.jit
def _load_gates(ptr, offs_b, stride_b, offs_h, H, mask, COUNT: tl.constexpr):
    """COUNT tiles of [BLOCK_B, BLOCK_H] standing side by side in rows of COUNT * H."""
    tiles = ()
    for k in tl.static_range(COUNT):
        ptrs = ptr + offs_b[:, None] * stride_b + (k * H + offs_h)[None, :]
        tiles = tiles + (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store_gates(ptr, offs_b, stride_b, offs_h, H, mask, tiles, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        ptrs = ptr + offs_b[:, None] * stride_b + (k * H + offs_h)[None, :]
        tl.store(ptrs, tiles[k].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_2d(ptr, offs_b, stride_b, offs_h):
    return ptr + offs_b[:, None] * stride_b + offs_h[None, :]


@triton.jit(do_not_specialize=["B"])
def pointwise_forward_kernel(
    x_gates_ptr,  # [B, GATES * H], rows stride_x
    h_gates_ptr,  # [B, GATES * H], contiguous
    h_ptr,  # [B, H] entering, rows stride_h
    c_ptr,  # [B, H] entering, float32, contiguous; unread unless HAS_C
    h_out_ptr,  # [B, H], rows stride_h_out
    c_out_ptr,  # [B, H] float32, contiguous; unwritten unless HAS_C
    saved_ptr,  # [B, SAVED * H], contiguous; unwritten unless SAVE
    B,
    H,
    stride_x,
    stride_h,
    stride_h_out,
    STEP: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One cell step after the two library products; grid (blocks of B, blocks of H)."""
    offs_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_b < B)[:, None] & (offs_h < H)[None, :]

    x_gates = _load_gates(x_gates_ptr, offs_b, stride_x, offs_h, H, mask, GATES)
    h_gates = _load_gates(h_gates_ptr, offs_b, GATES * H, offs_h, H, mask, GATES)
    h = tl.load(_tile_2d(h_ptr, offs_b, stride_h, offs_h), mask=mask, other=0.0).to(tl.float32)
    if HAS_C:
        state = (h, tl.load(_tile_2d(c_ptr, offs_b, H, offs_h), mask=mask, other=0.0))
    else:
        state = (h,)

    new_state, saved = STEP(x_gates, h_gates, state)

    h_out_ptrs = _tile_2d(h_out_ptr, offs_b, stride_h_out, offs_h)
    tl.store(h_out_ptrs, new_state[0].to(h_out_ptr.dtype.element_ty), mask=mask)
    if HAS_C:
        tl.store(_tile_2d(c_out_ptr, offs_b, H, offs_h), new_state[1], mask=mask)
    if SAVE:
        _store_gates(saved_ptr, offs_b, SAVED * H, offs_h, H, mask, saved, SAVED)


@triton.jit(do_not_specialize=["B"])
def pointwise_backward_kernel(
    saved_ptr,  # [B, SAVED * H], contiguous
    h_ptr,  # [B, H] entering, rows stride_h
    c_ptr,  # [B, H] entering, float32, contiguous; unread unless HAS_C
    c_new_ptr,  # [B, H] leaving, float32, contiguous; unread unless HAS_C
    dh_ptr,  # [B, H] float32: gradient of the leaving h
    dc_ptr,  # [B, H] float32: gradient of the leaving c; unread unless HAS_C
    dx_gates_ptr,  # [B, GATES * H], contiguous
    dh_gates_ptr,  # [B, GATES * H], contiguous; unwritten unless SPLIT
    dh_out_ptr,  # [B, H] float32: the part of the entering h's gradient that bypasses W_hh
    dc_out_ptr,  # [B, H] float32; unwritten unless HAS_C
    B,
    H,
    stride_h,
    STEP_BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Backward of one cell step, before the library products; grid (blocks of B, blocks of H)."""
    offs_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (offs_b < B)[:, None] & (offs_h < H)[None, :]

    saved = _load_gates(saved_ptr, offs_b, SAVED * H, offs_h, H, mask, SAVED)
    h = tl.load(_tile_2d(h_ptr, offs_b, stride_h, offs_h), mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(_tile_2d(dh_ptr, offs_b, H, offs_h), mask=mask, other=0.0)
    if HAS_C:
        state = (h, tl.load(_tile_2d(c_ptr, offs_b, H, offs_h), mask=mask, other=0.0))
        new_state = (h, tl.load(_tile_2d(c_new_ptr, offs_b, H, offs_h), mask=mask, other=0.0))
        dstate = (dh, tl.load(_tile_2d(dc_ptr, offs_b, H, offs_h), mask=mask, other=0.0))
    else:
        state = (h,)
        new_state = (h,)
        dstate = (dh,)

    dx_gates, dh_gates, dstate = STEP_BACKWARD(saved, state, new_state, dstate)

    _store_gates(dx_gates_ptr, offs_b, GATES * H, offs_h, H, mask, dx_gates, GATES)
    if SPLIT:
        _store_gates(dh_gates_ptr, offs_b, GATES * H, offs_h, H, mask, dh_gates, GATES)
    tl.store(_tile_2d(dh_out_ptr, offs_b, H, offs_h), dstate[0], mask=mask)
    if HAS_C:
        tl.store(_tile_2d(dc_out_ptr, offs_b, H, offs_h), dstate[1], mask=mask)
