"""What runs without copies from the host can be captured in a CUDA graph: single steps, padded and ragged sequences."""

import pytest
import torch
from torch import nn

from seqcore.backends import INTERPRETED

from .recurrence_twins import ours

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]


def calls(device):
    """Functions of x by name, each of a module that holds its weights and state."""
    h = torch.randn(5, 64, device=device), torch.randn(5, 64, device=device)
    lengths = torch.tensor([4, 1, 3, 0, 2], device=device)
    cell, layer = (ours(kind(8, 64, device=device), "triton") for kind in (nn.LSTMCell, nn.LSTM))
    return {
        "cell": lambda x: cell(x[0], h),
        "sequence": lambda x: layer(x)[1],
        "ragged": lambda x: layer(x, lengths=lengths)[1],
    }


@pytest.mark.parametrize("name", ["cell", "sequence", "ragged"])
@torch.no_grad()
def test_replay_follows_its_input(name, device):
    run, x = calls(device)[name], torch.randn(4, 5, 8, device=device)
    run(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for found, expected in zip(captured, run(x), strict=True):
            assert torch.equal(found, expected)
