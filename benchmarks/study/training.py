"""Training, as all experiments do it: on batches that a task draws anew."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.experiment import finite


@dataclass(frozen=True)
class Batch:
    """Input, what should come out, and, for each [T, B] step that counts, True; all steps if None."""

    x: Tensor
    target: Tensor
    counts: Tensor | None = None


Draw = Callable[[int], Batch]


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy where the target is classes, mean squared error where it is numbers, over what counts."""
    target = batch.target
    if batch.counts is not None:
        output, target = output[batch.counts], target[batch.counts]
    if target.is_floating_point():
        return F.mse_loss(output.squeeze(-1), target)
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


@torch.no_grad()
def accuracy(output: Tensor, batch: Batch) -> float:
    """The share of what counts that is right; of numbers, that is within 0.1 of the target (0.04 is usual for sums)."""
    target = batch.target
    if batch.counts is not None:
        output, target = output[batch.counts], target[batch.counts]
    if target.is_floating_point():
        return ((output.squeeze(-1) - target).abs() < 0.1).double().mean().item()
    return (output.argmax(-1) == target).double().mean().item()


@dataclass
class Trainer:
    """A model in training, and what became of it.

    Args:
        draw: makes the batch of the n-th update.
        clip: the bound on the norm of all gradients together, None for no bound.
    """

    model: nn.Module
    draw: Draw
    learning_rate: float
    clip: float | None = 1.0
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam

    def __post_init__(self) -> None:
        self.optimizer = self.optimizer_class(self.model.parameters(), lr=self.learning_rate)
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []

    def step(self) -> None:
        batch = self.draw(len(self.losses))
        loss = loss_of(self.model(batch.x), batch)
        self.optimizer.zero_grad()
        loss.backward()
        bound = float("inf") if self.clip is None else self.clip
        self.gradient_norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), bound).item())
        self.optimizer.step()
        self.losses.append(loss.item())

    def run(self, steps: int, enough: Callable[[], bool] = lambda: False, every: int = 50) -> None:
        """That many steps, or fewer if ``enough``, asked now and then, says so."""
        for count in range(1, steps + 1):
            self.step()
            if count % every == 0 and enough():
                return

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, float | None]:
        """Loss and accuracy on a batch of its own."""
        was_training = self.model.training
        self.model.eval()
        output = self.model(batch.x)
        self.model.train(was_training)
        return {"loss": finite(loss_of(output, batch).item()), "accuracy": accuracy(output, batch)}
