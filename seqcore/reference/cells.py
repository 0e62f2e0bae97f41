"""ONE step's pointwise math of each built-in cell in plain PyTorch, forward and backward.

The contract is that of ``kernels/recurrence/cells.py``: gates, states and what is saved are tuples of tensors [B, H],
and the two pre-activations come apart, since the GRU resets after the product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def rnn_tanh(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    h = torch.tanh(x_gates[0] + h_gates[0])
    return (h,), (h,)


def rnn_tanh_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    da = dstate[0] * (1 - saved[0] * saved[0])
    return (da,), (da,), (torch.zeros_like(da),)


def rnn_relu(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    h = torch.relu(x_gates[0] + h_gates[0])
    return (h,), (h,)


def rnn_relu_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    da = torch.where(saved[0] <= 0, 0, dstate[0])
    return (da,), (da,), (torch.zeros_like(da),)


def gru(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    r, z = torch.sigmoid(x_gates[0] + h_gates[0]), torch.sigmoid(x_gates[1] + h_gates[1])
    n = torch.tanh(x_gates[2] + r * h_gates[2])
    return (n + z * (state[0] - n),), (r, z, n, h_gates[2])


def gru_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    r, z, n, h_n = saved
    dn = dstate[0] * (1 - z) * (1 - n * n)
    dz = dstate[0] * (state[0] - n) * z * (1 - z)
    dr = dn * h_n * r * (1 - r)
    return (dr, dz, dn), (dr, dz, dn * r), (dstate[0] * z,)


def lstm(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    i, f, g, o = (x + h for x, h in zip(x_gates, h_gates, strict=True))
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * state[1] + i * g
    return (o * torch.tanh(c), c), (i, f, g, o)


def lstm_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    i, f, g, o = saved
    tanh_c = torch.tanh(new_state[1])
    dc = dstate[1] + dstate[0] * o * (1 - tanh_c * tanh_c)
    di, df, dg = dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g * g)
    dgates = di, df, dg, dstate[0] * tanh_c * o * (1 - o)
    return dgates, dgates, (torch.zeros_like(dc), dc * f)


# Zoneout around each of these, each state of a step being keep * old + (1 - keep) * new: Krueger et al., "Zoneout:
# Regularizing RNNs by Randomly Preserving Hidden Activations" (2017). ``keep`` stands behind the gates in ``x_gates``,
# a tensor for each state: zeros and ones in training, the expectation p in evaluation, where p > 1/2 is written p - 1,
# so that 1 - p survives 16 bits. The h that an LSTM computes is made of the c that it computes, kept or not.


def _computed_share(keep: Tensor) -> Tensor:
    return torch.where(keep < 0, -keep, 1 - keep)


def _zoned(step: Step, x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    keep = x_gates[len(h_gates) :]
    computed, saved = step(x_gates[: len(h_gates)], h_gates, state)
    shares = map(_computed_share, keep)
    mixed = tuple((1 - s) * old + s * new for s, old, new in zip(shares, state, computed, strict=True))
    return mixed, (*saved, *computed[1:], *keep)


def _zoned_backward(step_backward, saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    states = len(state)
    keep, computed, saved = saved[-states:], saved[1 - 2 * states : -states], saved[: 1 - 2 * states]
    shares = [_computed_share(k) for k in keep]
    into = tuple(s * d for s, d in zip(shares, dstate, strict=True))
    dx_gates, dh_gates, through = step_backward(saved, state, (new_state[0], *computed), into)
    return dx_gates, dh_gates, tuple(t + (1 - s) * d for t, s, d in zip(through, shares, dstate, strict=True))


def rnn_tanh_zoneout(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return _zoned(rnn_tanh, x_gates, h_gates, state)


def rnn_tanh_zoneout_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    return _zoned_backward(rnn_tanh_backward, saved, state, new_state, dstate)


def rnn_relu_zoneout(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return _zoned(rnn_relu, x_gates, h_gates, state)


def rnn_relu_zoneout_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    return _zoned_backward(rnn_relu_backward, saved, state, new_state, dstate)


def gru_zoneout(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return _zoned(gru, x_gates, h_gates, state)


def gru_zoneout_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    return _zoned_backward(gru_backward, saved, state, new_state, dstate)


def lstm_zoneout(x_gates: Tensors, h_gates: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return _zoned(lstm, x_gates, h_gates, state)


def lstm_zoneout_backward(saved: Tensors, state: Tensors, new_state: Tensors, dstate: Tensors):
    return _zoned_backward(lstm_backward, saved, state, new_state, dstate)
