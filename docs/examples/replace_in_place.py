"""A model of torch.nn modules gets seqcore's between two steps of training, and torch's back for an export.

The optimizer and its state stay as they are; the same training without the swap ends at the same parameters.
``python docs/examples/replace_in_place.py`` runs anywhere, in seconds.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqcore


class Summariser(nn.Module):
    """An LSTM reads; queries of its last state attend to all that it read, as a module and as a function."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.reader = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        read = self.reader(x)[0]  # [B, T, width]
        last = read[:, -1:]
        by_module = self.attention(last, read, read, need_weights=False)[0]
        by_function = F.scaled_dot_product_attention(last, read, read)
        return self.head(torch.cat([by_module, by_function], -1)).squeeze(1)


def train(model: Summariser, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (model(x) - x.mean((1, 2))[:, None]).square().mean().backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    plain = Summariser()
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in (plain, model)]

    train(model, optimizers[1], range(3))
    print(seqcore.replace(model))
    with seqcore.replace_sdpa():
        train(model, optimizers[1], range(3, 6))
    print(seqcore.restore(model))

    train(plain, optimizers[0], range(6))
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    print("the parameters equal those of training without the swap")


if __name__ == "__main__":
    main()
