"""Attention's kernels, interpreted, on tensors of more than 2^31 elements."""

from types import SimpleNamespace

import pytest
import torch

from seqcore.kernels import tuning
from seqcore.ops import attention_arguments, attention_launch

from .attention_twins import kernels, operands, qkv
from .vast import FAR, ON_THEM, at_both_ends, at_the_end, corner, running, vast

pytestmark = ON_THEM

# Of no whole units of 16 bytes, which would divide strides by four.
m, n, D = 3, 5, 5
# Batch, heads, queries and keys, one of them so many that offsets along it pass 2^31 elements.
VAST = {
    "batch": (2**28 + 1, 3, m, n),
    "heads": (3, 2**28 + 1, m, n),
    "queries": (1, 2, 2**29 + m, n),
    "keys": (1, 2, m, 2**29 + n),
}
# Decoding numbers rows in 32 bits, and the parts of them in 64.
DECODED = {"batch": (2**27 + 1, 3, m, n), "heads": (3, 2**27 + 1, m, n), "keys": VAST["keys"]}
# So that of many queries and keys only the last meet.
LAST_MEET = {"causal": "lower_right", "window": (1, 0)}


@pytest.fixture
def small():
    """q, k, v, the gradients of out and lse, and a mask, of one head."""
    q, k, v = qkv(1, 1, M=m, N=n, D=D)
    return q, k, v, torch.randn(1, 1, m, D), torch.randn(1, 1, m), torch.randn(1, 1, m, n)


@pytest.fixture
def far_allocations(monkeypatch):
    """What attention's operators allocate is zeros that nobody has touched."""

    def empty(*shape, dtype, device):
        return vast(*(shape[0] if isinstance(shape[0], tuple) else shape), dtype=dtype)

    namespace = SimpleNamespace(**vars(torch) | {"empty": empty, "full": lambda shape, fill, **o: empty(shape, **o)})
    monkeypatch.setattr(attention_launch, "torch", namespace)
    monkeypatch.setattr(attention_arguments, "torch", namespace)


def trained(q, k, v, dout, dlse, mask=None, **options):
    """Everything that the operators return, by name; of the mask's gradient what was made."""
    settings, tensors = operands(q, k, v, attn_mask=mask, **LAST_MEET, **options)
    out, lse, rows = attention_launch.forward(*tensors, *settings)
    wanted = [True, True, True, mask is not None, False]
    gradients = attention_launch.backward(dout, dlse, out, rows, wanted, *tensors, *settings)
    return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv", "dmask"), gradients[:4], strict=True))


def assert_same_corners(found, expected):
    for name, tensor in expected.items():
        if tensor is not None:
            assert tensor.any() and torch.equal(corner(found[name], tensor.shape), tensor), name


CASES = [(size, way) for way, sizes in (("forward", VAST), ("decode", DECODED)) for size in sizes]


@pytest.mark.parametrize("size, way", CASES, ids=map("-".join, CASES))
def test_attention(size, way, small, far_allocations, monkeypatch):
    (B, H, M, N), (q, k, v, dout, dlse, mask) = (VAST if way == "forward" else DECODED)[size], small
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: 0 if way == "forward" else 2)
    expected = trained(*small)
    tensors = [at_the_end(t, B, H, N, D) for t in (k, v)]
    far = (at_the_end(q, B, H, M, D), *tensors, at_the_end(dout, B, H, M, D), at_the_end(dlse, B, H, M))
    with running(at_both_ends) as launched:
        found = trained(*far, at_the_end(mask, B, H, M, N))
    assert f"attention_{way}_kernel" in launched
    assert any(t is not None and t.numel() > FAR for t in found.values())
    assert_same_corners(found, expected)


def test_packed_attention(small, far_allocations):
    """Two sequences end to end, of which the last begins far away."""
    H, M, N = 2, 2**29 + m, 2**29 + n
    *tensors, dlse, _ = small
    ends = {"cu_seqlens_q": torch.tensor([0, M - m, M]), "cu_seqlens_k": torch.tensor([0, N - n, N])}
    alone = {"cu_seqlens_q": torch.tensor([0, m]), "cu_seqlens_k": torch.tensor([0, n])}
    sizes = (M, N, N, M)
    expected = trained(*tensors, dlse, **alone)
    far = [at_the_end(t, 1, H, rows, D) for t, rows in zip(tensors, sizes, strict=True)]
    with running(at_both_ends):
        found = trained(*far, at_the_end(dlse, 1, H, M), **ends)
    assert_same_corners(found, expected)


@pytest.mark.parametrize("size", ["batch", "queries", "keys"])
def test_averaged_weights(size, small, far_allocations):
    (B, _, M, N), (q, k, v, *_) = VAST[size], small
    B = 3 * B

    def weights(q, k, v):
        settings, tensors = operands(q, k, v, **LAST_MEET)
        rows = attention_launch.forward(*tensors, *settings)[2]
        return {"weights": attention_launch.weights(rows, *tensors, *settings)}

    expected = weights(q, k, v)
    with running(at_both_ends):
        found = weights(at_the_end(q, B, 1, M, D), *(at_the_end(t, B, 1, N, D) for t in (k, v)))
    assert found["weights"].numel() > FAR
    assert_same_corners(found, expected)


@pytest.mark.parametrize("moved", range(5), ids=["query", "key", "value", "mask", "gradient"])
def test_strides(moved):
    """Each tensor in turn with steps of more than 2^31 elements along one dimension; of rows, steps of whole units."""
    tensors = [*qkv(2, 2, M=m, N=n, D=8), torch.randn(2, 2, m, n), torch.randn(2, 2, m, 8)]

    def run(q, k, v, mask, dout):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, mask)]
        out, lse = kernels(*leaves)
        return [out, lse, *torch.autograd.grad([out], leaves, [dout])]

    expected = run(*tensors)
    for dim in range(3):
        tensor, steps = tensors[moved], list(tensors[moved].stride())
        steps[dim] = FAR + (dim < 2)
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=True))
        far = vast(span).as_strided(tensor.shape, steps).copy_(tensor)
        found = run(*tensors[:moved], far, *tensors[moved + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"dimension {dim}"
