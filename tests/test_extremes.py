"""Very long sequences in plain PyTorch: what is added up over all steps errs no more than torch's own does."""

import pytest
import torch

from .comparisons import on_another_draw
from .effort import effort, tried
from .recurrence_twins import assert_alike, ours, problem

# Of torch's switch for oneDNN.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")

# A night has time for one of them in full.
STEPS = {"rnn_tanh": effort(1_000, 10_000), "gru": effort(1_000, 10_000), "lstm": effort(1_000, 100_000)}


def long_memory(cell, T, device=None):
    """A recurrence that adds up over as many steps as it can, and an input for it."""
    twin, x, hx = problem(cell, T=T, B=16, I=3, H=8, device=device)
    with torch.no_grad():
        if cell == "lstm":
            twin.bias_ih_l0[8:16] = 6.0  # the forget gate's: it keeps 0.998 of c a step
        if cell == "gru":
            twin.bias_ih_l0[8:16] = 4.0  # z: it keeps 0.98 of h
    return twin, x, hx


@pytest.fixture(autouse=True)
def _plain_yardstick():
    """oneDNN's fused step rounds less often than PyTorch's does."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("cell", STEPS)
def test_nothing_drifts_over_a_long_sequence(cell):
    def judge(seed):
        torch.manual_seed(seed)
        twin, x, hx = long_memory(cell, STEPS[cell])
        assert_alike(ours(twin, "reference"), twin, x, hx)
        tried()

    on_another_draw(judge, 0)
