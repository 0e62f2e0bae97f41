"""Sizes beyond 65,535, tensors of more than 2^31 elements, and more memory than there is, on a GPU."""

import pytest
import torch

import seqcore.nn
from seqcore.devices import INTERPRETED

from .attention_twins import assert_like_reference, assert_like_torch, kernels, qkv
from .exhaustion import surroundings
from .recurrence_twins import assert_alike, mapped, ours, problem

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(INTERPRETED, reason="interpreted, so many programs would take hours, and memory has no end"),
]

MANY = 70_000
FAR = 2**31


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


def needs(size):
    """Skip where not so many bytes of memory are free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size >> 30} GiB of free memory, there are {free >> 30}")


def last_of(count, tensor, dim=0):
    """``tensor`` as the last of ``count`` along ``dim``, behind zeros."""
    shape = list(tensor.shape)
    shape[dim] = count - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim)


def test_attention_of_more_elements_than_32_bits_count(device):
    inputs = qkv(1, 8, M=128, N=128, D=64, dtype=torch.float16, device=device)
    batch = FAR // inputs[0].numel() + 1
    needs(20 * 2 * FAR)

    def last_of_many(*inputs):
        return tuple(t[-1:] for t in kernels(*(last_of(batch, t) for t in inputs)))

    assert_like_torch(last_of_many, *inputs)


class LastOfMany(seqcore.nn.LSTM):
    """The recurrence on its batch as the last sequences of so many that y has more than 2^31 elements."""

    def forward(self, x, hx):
        (T, B, _), H = x.shape, self.hidden_size
        outputs = super().forward(*mapped(lambda t: last_of(FAR // (T * H) + B, t, 1), (x, hx)))
        return mapped(lambda t: t[:, -B:], outputs)


def test_recurrence_of_more_elements_than_32_bits_count(device):
    twin, x, hx = problem("lstm", B=2, I=16, H=256, dtype=torch.float16, device=device)
    needs(24 * 2 * FAR)
    module = ours(twin, "triton")
    module.__class__ = LastOfMany
    assert_alike(module, twin, x, hx)


def test_a_request_that_is_too_large(device):
    small = qkv(1, 2, M=64, N=64, D=64, device=device)
    expected, before = kernels(*small), surroundings()
    # A terabyte to be written, of next to nothing that is read.
    large = [t[:, :1, :1].expand(2**16, 2**4, rows, 64) for t, rows in zip(small, (2**12, 64, 64), strict=True)]
    with pytest.raises(torch.OutOfMemoryError):
        kernels(*large)
    assert surroundings() == before
    assert all(torch.equal(a, b) for a, b in zip(kernels(*small), expected, strict=True))
