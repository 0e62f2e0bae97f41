"""A critic of sequences, trained with a penalty on its own gradient: a derivative of a derivative through a GRU.

A Wasserstein critic scores true sequences above false ones, while the slope of its score is held near 1 between them:

    loss = mean D(false) - mean D(true) + 10 mean (|dD/dx| - 1)^2,      x anywhere between a false and a true one

Gulrajani et al., "Improved Training of Wasserstein GANs" (2017). The penalty is a gradient, and training differentiates
it once more. cuDNN's recurrences cannot do that; seqcore's can: docs/derivatives.md says how, and at what cost.
"""

import torch
from torch import Tensor, nn

import seqcore


class Critic(nn.Module):
    """One number for each sequence [T, B, 1]."""

    def __init__(self, hidden: int, backend: str) -> None:
        super().__init__()
        self.gru = seqcore.nn.GRU(1, hidden, backend=backend)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.gru(x)
        return self.score(h_n[-1]).squeeze(-1)


def true(T: int, B: int, device: str) -> Tensor:
    """Sines of random frequency and phase."""
    frequency, phase = 0.2 + 0.4 * torch.rand(2, B, 1, device=device)
    return torch.sin(frequency * torch.arange(T, device=device)[:, None, None] + 6 * phase)


def slopes(critic: Critic, x: Tensor) -> Tensor:
    """|dD/dx| of each sequence, itself differentiable."""
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.square().sum((0, 2)).sqrt()


def main(weight: float = 10.0, rounds: int = 60, T: int = 24, B: int = 32) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    critic = Critic(16, backend="triton" if device == "cuda" else "auto").to(device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01, betas=(0.0, 0.9))
    losses, steepness = [], []
    for _ in range(rounds):
        real, fake = true(T, B, device), torch.randn(T, B, 1, device=device)
        mixed = torch.lerp(fake, real, torch.rand(B, 1, device=device))
        slope = slopes(critic, mixed)
        loss = critic(fake).mean() - critic(real).mean() + weight * (slope - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        steepness.append(slope.mean().item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, mean slope {steepness[0]:.2f} -> {steepness[-1]:.2f}")
    assert losses[-1] < losses[0] and abs(steepness[-1] - 1) < 0.2, "the critic did not learn under its penalty"
    print("the loss fell, and the slope is near 1")


if __name__ == "__main__":
    main()
