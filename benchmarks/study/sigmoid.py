"""A plain RNN with sigmoids, which torch.nn has not."""

import math

import torch
from torch import Tensor, nn


class SigmoidRNN(nn.Module):
    """h_t = s(W_ih x_t + W_hh h_{t-1} + b), in a loop of its own: no module of torch.nn has this nonlinearity."""

    def __init__(self, I: int, H: int):
        super().__init__()
        self.cell = SigmoidCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.cell.recurrent.in_features)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


class SigmoidCell(nn.Module):
    """One step of it, with the initial weights of ``torch.nn.RNN``."""

    def __init__(self, I: int, H: int):
        super().__init__()
        self.input, self.recurrent = nn.Linear(I, H), nn.Linear(H, H)
        for weight in self.parameters():
            nn.init.uniform_(weight, -1 / math.sqrt(H), 1 / math.sqrt(H))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(self.input(x) + self.recurrent(h))
