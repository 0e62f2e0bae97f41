"""Counter-based random numbers, equal bit for bit to Triton's ``tl.philox``, in plain PyTorch.

Dropout is keyed by (batch and head, row, column), so that the mask is the same whatever the tiling, and the same here
as in a kernel; double backward would be wrong otherwise. Four columns share a counter, since Philox makes four words at
a time. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011), Philox-4x32-10.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps around without losing any of the 64."""
    product = x * by
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words at counter (c0, c1, c2, c3), as int64 in 0 … 2^32 - 1; seed is int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high_b, low_b = _multiply(c2, _MULTIPLIERS[1])
        high_a, low_a = _multiply(c0, _MULTIPLIERS[0])
        c0, c2 = high_b ^ c1 ^ k0, high_a ^ c3 ^ k1
        c1, c3 = low_b, low_a
        k0, k1 = (k0 + _KEYS[0]) & _MASK, (k1 + _KEYS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, batch_head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Float32 in [0, 1) at each (batch * heads + head, row, column); arguments are int64 and broadcast."""
    words = philox(seed, column // 4, row, batch_head, torch.zeros_like(column))
    turn = column % 4
    word = torch.where(turn < 2, torch.where(turn == 0, words[0], words[1]), torch.where(turn == 2, words[2], words[3]))
    signed = torch.where(word > 0x7FFFFFFF, word - (1 << 32), word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * 4.6566127342e-10
