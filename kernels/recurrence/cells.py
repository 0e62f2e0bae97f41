"""The pointwise math of ONE time step of each built-in cell, forward and backward; ``seqcore.Cell`` makes them cells.

A cell is a pair of device functions over float32 tiles, and a tuple stands for whatever a cell has several of:

``step(x_gates, h_gates, state) -> (state, saved)``
    ``x_gates = x W_ih^T + b_ih`` and ``h_gates = h W_hh^T + b_hh``, one tile a gate, in torch's gate order; behind
    them in ``x_gates`` whatever else a step takes of each unit (``Cell.extra``);
    ``state`` is (h,) or (h, c) entering the step and, returned, leaving it; ``saved`` is what backward needs.

``step_backward(saved, state, new_state, dstate) -> (dx_gates, dh_gates, dstate)``
    Gradients of both pre-activations, and the part of the entering state's gradient that does not pass through
    ``W_hh`` (that product is the caller's).

The formulas stand here once; every kernel of the recurrence calls them.
"""

import triton
import triton.language as tl

from ..activations import sigmoid, tanh
from ..settled import settle


@triton.jit
def rnn_tanh_step(x_gates, h_gates, state):
    """h' = tanh(a)."""
    h = tanh(x_gates[0] + h_gates[0])
    return (h,), (h,)


@triton.jit
def rnn_tanh_step_backward(saved, state, new_state, dstate):
    da = dstate[0] * (1.0 - saved[0] * saved[0])
    return (da,), (da,), (tl.zeros_like(da),)


@triton.jit
def rnn_relu_step(x_gates, h_gates, state):
    """h' = max(a, 0), letting NaN through as torch does."""
    a = x_gates[0] + h_gates[0]
    h = tl.where(a < 0.0, 0.0, a)
    return (h,), (h,)


@triton.jit
def rnn_relu_step_backward(saved, state, new_state, dstate):
    da = tl.where(saved[0] <= 0.0, 0.0, dstate[0])
    return (da,), (da,), (tl.zeros_like(da),)


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
    return dgates, dgates, (tl.zeros_like(dh), dc * f)


# Zoneout (Krueger et al., 2017) around each of these: behind the gates in ``x_gates`` stands ``keep``, a tile for each
# state: 1 where a unit keeps what entered, 0 where it takes what the cell computed, and between the two in expectation;
# there p > 1/2 is written p - 1, since the tiles come in the input's dtype, and 16 bits of p say little of 1 - p.


@triton.jit
def _computed_share(keep):
    return tl.where(keep < 0.0, -keep, 1.0 - keep)


@triton.jit
def _mixed(keep, old, new):
    mixed = ()
    for k in tl.static_range(len(keep)):
        share = _computed_share(keep[k])
        mixed = mixed + ((1.0 - share) * old[k] + share * new[k],)
    return mixed


@triton.jit
def _to_computed(keep, dstate):
    """Of the gradients of what ``_mixed`` gives, those of what the cell computed."""
    found = ()
    for k in tl.static_range(len(keep)):
        found = found + (_computed_share(keep[k]) * dstate[k],)
    return found


@triton.jit
def _with_kept(through_cell, keep, dstate):
    """Gradients of the entering state: what came through the cell, and what came past it."""
    found = ()
    for k in tl.static_range(len(keep)):
        found = found + (through_cell[k] + (1.0 - _computed_share(keep[k])) * dstate[k],)
    return found


@triton.jit
def rnn_tanh_zoneout_step(x_gates, h_gates, state):
    computed, saved = rnn_tanh_step(x_gates, h_gates, state)
    return _mixed(x_gates[1:], state, computed), saved + x_gates[1:]


@triton.jit
def rnn_tanh_zoneout_step_backward(saved, state, new_state, dstate):
    keep = saved[1:]
    da, _, through = rnn_tanh_step_backward(saved, state, new_state, _to_computed(keep, dstate))
    return da, da, _with_kept(through, keep, dstate)


@triton.jit
def rnn_relu_zoneout_step(x_gates, h_gates, state):
    computed, saved = rnn_relu_step(x_gates, h_gates, state)
    return _mixed(x_gates[1:], state, computed), saved + x_gates[1:]


@triton.jit
def rnn_relu_zoneout_step_backward(saved, state, new_state, dstate):
    keep = saved[1:]
    da, _, through = rnn_relu_step_backward(saved, state, new_state, _to_computed(keep, dstate))
    return da, da, _with_kept(through, keep, dstate)


@triton.jit
def gru_zoneout_step(x_gates, h_gates, state):
    computed, saved = gru_step(x_gates, h_gates, state)
    return _mixed(x_gates[3:], state, computed), saved + x_gates[3:]


@triton.jit
def gru_zoneout_step_backward(saved, state, new_state, dstate):
    keep = saved[4:]
    dx, dh, through = gru_step_backward(saved[:4], state, new_state, _to_computed(keep, dstate))
    return dx, dh, _with_kept(through, keep, dstate)


@triton.jit
def lstm_zoneout_step(x_gates, h_gates, state):
    """h is computed from the c that was, not from the one that is kept."""
    computed, saved = lstm_step(x_gates, h_gates, state)
    return _mixed(x_gates[4:], state, computed), saved + (computed[1],) + x_gates[4:]


@triton.jit
def lstm_zoneout_step_backward(saved, state, new_state, dstate):
    keep = saved[5:]
    computed = (new_state[0], saved[4])
    dgates, _, through = lstm_step_backward(saved[:4], state, computed, _to_computed(keep, dstate))
    return dgates, dgates, _with_kept(through, keep, dstate)


settle(globals())
