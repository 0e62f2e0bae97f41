"""The sequence kernels with one part of a step left out, so that a profiler can tell what the part costs.

Their results are wrong. The kernels themselves know nothing of this: a variant is the same source with other device
functions behind its names, or is launched with another step.
"""

import functools
import types

import triton
import triton.language as tl

from ..settled import settle
from .products import joined

# Keeps what goes round and round from growing.
SMALL: tl.constexpr = tl.constexpr(1 / 256)


@triton.jit
def _arrived(tile):
    """Wait for a tile's loads and do nothing with it: an instruction that cannot be left out looks at four registers
    at a time, and acts (a pause of no length) where their bits add up to a pattern that none should."""
    return tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t;
        xor.b32 t, $4, $5; xor.b32 t, t, $6; xor.b32 t, t, $7;
        setp.eq.b32 p, t, 0xfbad1eaf; @p nanosleep.u32 0;
        mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }""",
        "=r,=r,=r,=r,r,r,r,r",
        [tile],
        dtype=tile.dtype,
        is_pure=False,
        pack=4 * 32 // tile.dtype.primitive_bitwidth,
    )


@triton.jit
def _no_dot(rows, weights, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """In place of ``dot``: the rows are read and not multiplied, the weights not even read."""
    _arrived(rows)
    return acc


@triton.jit
def _no_dot_in_turn(rows, weights, accs, TURN: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    return accs[:TURN] + (_no_dot(rows, weights, accs[TURN], SWAP, PRECISION),) + accs[TURN + 1 :]


@functools.cache
def without_products(kernel: triton.JITFunction) -> triton.JITFunction:
    """The forward or backward kernel without its matrix products, for an NVIDIA GPU."""
    source = kernel.fn
    names = source.__globals__ | {"dot": _no_dot, "dot_in_turn": _no_dot_in_turn}
    copy = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__, source.__closure__)
    # Which parameters are compile-time constants stands there.
    copy.__annotations__ = source.__annotations__
    copy.__module__, copy.__qualname__ = __name__, f"{source.__qualname__}_without_products"
    return triton.jit(copy, do_not_specialize=kernel.do_not_specialize)


@triton.jit
def touching_step(x_gates, h_gates, state):
    """In place of any built-in cell's step: its inputs are read, and next to nothing is computed."""
    h = (joined(x_gates) + joined(h_gates) + joined(state)) * SMALL
    return (h, h), (h, h, h, h)


@triton.jit
def touching_rnn_tanh_step_backward(saved, state, new_state, dstate):
    da = (saved[0] + dstate[0]) * SMALL
    return (da,), (da,), (da,)


@triton.jit
def touching_gru_step_backward(saved, state, new_state, dstate):
    da = (joined(saved) + state[0] + dstate[0]) * SMALL
    return (da, da, da), (da, da, da), (da,)


@triton.jit
def touching_lstm_step_backward(saved, state, new_state, dstate):
    da = (joined(saved) + state[1] + new_state[1] + joined(dstate)) * SMALL
    return (da, da, da, da), (da, da, da, da), (da, da)


settle(globals())
