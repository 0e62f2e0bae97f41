"""A Lightning Trainer, which trains a model whose modules are swapped before it fits, or while it does."""

import pytest
import torch
from torch import Tensor, nn

import seqcore

from .comparisons import Results, assert_equal_in_float64

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

# Lightning uses what torch has since renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

B, T, I, H, STEPS = 4, 5, 3, 8, 6


class Forecaster(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(I, H, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(H, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, target = batch
        return (self.head(self.lstm(x)[0][:, -1]) - target).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Swap(lightning.Callback):
    """Replaces at one step and restores two steps later."""

    def __init__(self, step: int) -> None:
        self.step, self.kinds = step, []

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if index == self.step:
            seqcore.replace(module)
        elif index == self.step + 2:
            seqcore.restore(module)
        self.kinds.append(type(module.lstm))


def fitted(*callbacks: lightning.Callback, before: bool = False) -> Results:
    lightning.seed_everything(0, verbose=False)
    module, data = Forecaster(), [(torch.randn(B, T, I).double(), torch.randn(B, 1).double()) for _ in range(STEPS)]
    if before:
        assert list(seqcore.replace(module).swapped) == ["lstm"]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision="64-true", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    assert trainer.global_step == STEPS
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def test_fitting_gives_the_same_parameters():
    expected, swap = fitted(), Swap(2)
    assert_equal_in_float64(fitted(before=True), expected)
    assert_equal_in_float64(fitted(swap), expected)
    assert swap.kinds == [nn.LSTM] * 2 + [seqcore.nn.LSTM] * 2 + [nn.LSTM] * 2
