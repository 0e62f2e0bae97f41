"""Sizes beyond 65,535, and more memory than there is, on a GPU."""

import pytest
import torch

import seqcore.nn
from seqcore.devices import INTERPRETED

from .attention_twins import assert_like_reference, kernels, qkv
from .exhaustion import surroundings
from .recurrence_twins import assert_alike, ours, problem

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(INTERPRETED, reason="interpreted, so many programs would take hours, and memory has no end"),
]

MANY = 70_000


@pytest.fixture(autouse=True)
def _exact_products():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dim", range(4), ids=["batch", "heads", "queries", "keys"])
def test_attention_of_many(dim, device):
    B, H, M, N = (MANY if index == dim else size for index, size in enumerate((1, 2, 3, 5)))
    assert_like_reference(*qkv(B, H, M=M, N=N, D=16, device=device))


@pytest.mark.parametrize("sizes", [{"T": MANY, "B": 1}, {"T": 2, "B": MANY}], ids=["steps", "batch"])
def test_recurrence_of_many(sizes, device):
    twin, x, hx = problem("rnn_tanh", I=4, H=3, **sizes, device=device)
    assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_recurrence_of_many_blocks(T, recompute, device):
    module = seqcore.nn.GRU(3, MANY, blocks=MANY, recompute=recompute, backend="triton", device=device)
    assert_alike(module, ours(module, "reference"), torch.randn(T, 2, 3, device=device))


def test_a_request_that_is_too_large(device):
    small = qkv(1, 2, M=64, N=64, D=64, device=device)
    expected, before = kernels(*small), surroundings()
    # A terabyte to be written, of next to nothing that is read.
    large = [t[:, :1, :1].expand(2**16, 2**4, rows, 64) for t, rows in zip(small, (2**12, 64, 64), strict=True)]
    with pytest.raises(torch.OutOfMemoryError):
        kernels(*large)
    assert surroundings() == before
    assert all(torch.equal(a, b) for a, b in zip(kernels(*small), expected, strict=True))
