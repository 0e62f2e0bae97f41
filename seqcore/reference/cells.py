"""ONE step's pointwise math of each built-in cell in plain PyTorch, forward and backward.

The contract is that of ``kernels/recurrence/cells.py``: gates, states and what is saved are tuples of tensors [B, H],
and the two pre-activations come apart, since the GRU resets after the product.
"""

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


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
    da = dstate[0] * (saved[0] > 0)
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
