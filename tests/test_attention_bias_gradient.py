"""The gradient of an additive mask, summed over what the mask is broadcast along, against the reference."""

import pytest
import torch

from .attention_twins import assert_like_reference, beside, ends, features, kernels, qkv, results

pytestmark = pytest.mark.kernels

B, H, M, N, D = 2, 2, 37, 21, 4


def bias(*shape, **options):
    """Of which about a quarter is -inf."""
    return torch.where(torch.rand(shape) < 0.75, torch.randn(shape), float("-inf")).to(**options).requires_grad_()


SHAPES = [
    (B, H, M, N), (1, H, M, N), (B, 1, M, N), (M, N),
    (B, H, 1, N), (1, H, 1, N), (B, 1, 1, N), (1, N), (N,),
    (B, H, M, 1), (1, H, M, 1), (M, 1),
    (H, 1, 1), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_to_broadcast(shape, device):
    # Sums over nearly everything have few elements, and those a finite bias each.
    mask = bias(*shape) if max(shape[-2:]) > 1 else torch.randn(shape).requires_grad_()
    found = assert_like_reference(*qkv(B, H, M=M, N=N, D=D, device=device), attn_mask=mask)
    assert found["gradient of attn_mask"].shape == mask.shape


@pytest.mark.parametrize("shape", [(M, N), (H, 1, N)], ids=str)
@pytest.mark.parametrize("causal", ["top_left", "lower_right"])
def test_with_causality(shape, causal, kernel_dtype, device):
    tensors = qkv(B, H, M=M, N=N, D=D, dtype=kernel_dtype, device=device)
    assert_like_reference(*tensors, attn_mask=bias(*shape, dtype=kernel_dtype), causal=causal)


@pytest.mark.parametrize("shape", [(1, H, M, N), (B, 1, 1, N), (H, M, 1)], ids=str)
def test_with_everything_else(shape, kernel_dtype, device):
    options = features(B, H, M, N, dtype=kernel_dtype)["everything"] | {"attn_mask": bias(*shape, dtype=kernel_dtype)}
    assert_like_reference(*qkv(B, H, heads_kv=1, M=M, N=N, D=D, dtype=kernel_dtype, device=device), **options)


@pytest.mark.parametrize("shape", [(H, M, N), (M, N), (H, 1, N), (1, N), (M, 1)], ids=str)
def test_of_packed_sequences(shape, device):
    sequences = {"cu_seqlens_q": ends(16, 0, 1, 20), "cu_seqlens_k": ends(5, 3, 0, 13)}
    tensors = qkv(H, M=M, N=N, D=D, device=device)
    mask = torch.randn(shape).requires_grad_()
    found = assert_like_reference(*tensors, **sequences, attn_mask=mask, causal="top_left")
    if shape[-2:] == (M, N):
        gradient = found["gradient of attn_mask"]
        assert gradient[..., :16, :5].any() and not gradient[..., :16, 5:].any() and not gradient[..., 16, :].any()


LONG_SHAPES = [(2, 1, 2, 5, 7), (3, 1, 5, 7), (2, 3, 1, 1, 7), (2, 1, 1, 5, 1), (1, 1, 1, 5, 7)]


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_leading_dimensions_of_three_and_more(shape, device):
    assert_like_reference(*qkv(2, 3, 2, M=5, N=7, device=device), attn_mask=torch.randn(shape).requires_grad_())


def test_leading_dimensions_only_of_the_mask(device):
    """Keys without heads, queries without a batch."""
    query, key, value = torch.randn(3, 5, 6), torch.randn(2, 1, 7, 6), torch.randn(7, 4)
    tensors = [t.to(device) for t in (query, key, value)]
    assert_like_reference(*tensors, attn_mask=torch.randn(2, 3, 5, 7).requires_grad_())


@pytest.mark.parametrize("wanted", ["attn_mask", "sinks"])
def test_only_it_requires_a_gradient(wanted, device):
    """PyTorch issue 148476: a crash when only the mask needs a gradient."""
    tensors = qkv(B, H, M=M, N=N, D=D, device=device)
    options = {"attn_mask": torch.randn(H, M, N, device=device), "sinks": torch.randn(H, device=device)}
    leaves = {name: t.clone().requires_grad_() for name, t in options.items()}
    expected = torch.autograd.grad(kernels(*tensors, **leaves)[0].square().sum(), leaves[wanted])
    options[wanted] = leaves[wanted]
    found = torch.autograd.grad(kernels(*tensors, **options)[0].square().sum(), leaves[wanted])
    assert torch.equal(found[0], expected[0]) and found[0].any()


def test_a_mask_that_requires_none_changes_no_other_gradient(device):
    tensors, mask = qkv(B, H, M=M, N=N, D=D, device=device), torch.randn(M, N, device=device)
    without = results(kernels, *tensors, attn_mask=mask)
    found = results(kernels, *tensors, attn_mask=mask.requires_grad_())
    assert all(torch.equal(found[name], without[name]) for name in without)


def test_a_mask_of_other_strides(device):
    tensors, mask = qkv(B, H, M=M, N=N, D=D, device=device), torch.randn(H, N, M, device=device)
    masks = [m.requires_grad_() for m in (mask.mT, mask.mT.contiguous())]
    found, expected = (results(kernels, *tensors, attn_mask=mask) for mask in masks)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("batch, heads, m, n", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_sizes_of_zero(batch, heads, m, n, device):
    mask = torch.zeros(1, m, n, device=device).requires_grad_()
    gradient = results(kernels, *qkv(batch, heads, M=m, N=n, device=device), attn_mask=mask)["gradient of attn_mask"]
    assert gradient.shape == mask.shape and not gradient.any()


def test_rows_that_see_nothing_give_none(device):
    mask = beside(bias(M, N), device)
    with torch.no_grad():
        mask[3] = float("-inf")
    found = results(kernels, *qkv(B, H, M=M, N=N, D=D, device=device), attn_mask=mask)
    gradient = found["gradient of attn_mask"]
    assert gradient.isfinite().all() and gradient[4].any() and not gradient[3].any()
