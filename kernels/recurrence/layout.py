"""Which row each sequence stands on at a step, and where the state entering that step comes from.

One mechanism serves every kind of input. Sequence b's row at step t is ``offset[t] + b``, there are ``active[t]`` of
them, and ``source`` says for each row where its entering state stands:

    0 … R-1      that row of y (the sequence's previous step, seen in the direction of the walk)
    R … R+B-1    row ``source - R`` of the initial state
    R+B … R+2B-1 the same row of its second half: a given state, put in by ``reset``
    CUT          nowhere: the state is zeros (``reset`` without given states)
    PAST         the row is no step of its sequence: it is past ``lengths``

A padded batch without any of that needs no map: its rows are computed (MAPPED False).
"""

import triton
import triton.language as tl

from ..settled import settle

CUT = tl.constexpr(-1)
PAST = tl.constexpr(-2)


@triton.jit
def locate(
    step,  # of the walk: the reverse direction, 1, walks backward in time
    steps,
    direction,
    offs_b,  # [BLOCK_B]
    offset_ptr,  # [T] int64
    active_ptr,  # [T] int64
    source_ptr,  # [D, R] int64
    B,
    R,
    MAPPED: tl.constexpr,
):
    """The rows of a step, whether they exist, and their sources; rows that do not exist are PAST."""
    t = tl.where(direction == 0, step, steps - 1 - step)
    if MAPPED:
        rows = tl.load(offset_ptr + t) + offs_b
        exists = offs_b < tl.load(active_ptr + t)
        source = tl.load(source_ptr + direction.to(tl.int64) * R + rows, mask=exists, other=PAST)
    else:
        rows = t.to(tl.int64) * B + offs_b
        exists = offs_b < B
        before = tl.where(direction == 0, rows - B, rows + B)
        source = tl.where(exists, tl.where(step == 0, R + offs_b, before), PAST)
    return rows, exists, source


@triton.jit
def entering_rows(source, R, values_ptr, stride, initial_ptr, initial_stride, NATIVE: tl.constexpr):
    """Pointers to the rows the sources name, in ``values`` or ``initial``; to be masked where ``source < 0``."""
    rows, initial_rows = values_ptr + source * stride, initial_ptr + (source - R) * initial_stride
    if NATIVE:
        found = tl.where(source < R, rows, initial_rows)
    else:
        # Triton's passes for AMD follow pointers to the one tensor they point into; an address they leave alone.
        found = tl.where(source < R, rows.to(tl.int64), initial_rows.to(tl.int64)).to(values_ptr.dtype)
    return found


settle(globals())
