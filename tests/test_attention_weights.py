"""Attention weights that are returned, averaged by a kernel or a head at a time, against the reference."""

import pytest
import torch

from seqcore import functional

from .attention_twins import assert_like_reference, features, kernels, qkv, results

pytestmark = pytest.mark.kernels

B, H, H_KV, M, N, D = 2, 2, 1, 37, 21, 4
NAMES = ["plain", "lower_right", "sinks", "lengths", "dropout", "bool mask"]


def inputs(**options):
    return qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, **options)


@pytest.mark.parametrize("name", NAMES)
def test_average(name, device):
    found = assert_like_reference(*inputs(device=device), **features(B, H, M, N)[name], return_weights="average")
    assert found["weights"].shape == (B, M, N)


def test_all_features_together(kernel_dtype, device):
    everything = features(B, H, M, N, dtype=kernel_dtype)["everything"]
    tensors = inputs(dtype=kernel_dtype, device=device)
    found = assert_like_reference(*tensors, **everything, return_weights="average")
    assert found["weights"].dtype == kernel_dtype


def test_per_head(device):
    everything = features(B, H, M, N)["everything"]
    found = assert_like_reference(*inputs(device=device), **everything, return_weights="per_head")
    assert found["weights"].shape == (B, H, M, N)


def test_a_loss_of_the_weights_alone(device):
    everything = features(B, H, M, N)["everything"]
    found = assert_like_reference(*inputs(device=device), **everything, return_weights="average", weigh=("weights",))
    assert found["gradient of attn_mask"].any() and not found["gradient of value"].any()


@pytest.mark.parametrize("kind", ["average", "per_head"])
@pytest.mark.parametrize("padding", ["bool mask", "additive mask", "lengths"])
def test_rows_of_nothing_but_padding_are_zeros(padding, kind, device):
    """PyTorch issue 152028: ``need_weights=True`` gives NaN where a query may see no key."""
    seen = torch.tensor([[True] * N, [False] * N], device=device)[:, None, None]
    options = {
        "bool mask": {"attn_mask": seen},
        "additive mask": {"attn_mask": torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf"))},
        "lengths": {"key_lengths": torch.tensor([N, 0], device=device)},
    }[padding]
    found = results(kernels, *inputs(device=device), **options, return_weights=kind, enable_gqa=True)
    assert not found["weights"][1].any() and not found["out"][1].any()
    torch.testing.assert_close(found["weights"][0].sum(-1), torch.ones_like(found["weights"][0, ..., 0]))
    assert all(t.isfinite().all() for name, t in found.items() if name != "lse")


def test_leading_dimensions(device):
    """Heads are averaged, of whatever is before them."""
    tensors = qkv(2, 3, 2, M=5, N=7, device=device)
    assert functional.attention(*tensors, return_weights="average", backend="triton")[1].shape == (2, 3, 5, 7)
    assert_like_reference(*tensors, return_weights="average")
    for lead in ((2,), ()):
        assert_like_reference(*qkv(*lead, M=17, N=21, device=device), return_weights="average")


@pytest.mark.parametrize("batch, heads, m, n", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_sizes_of_zero(batch, heads, m, n, device):
    found = results(kernels, *qkv(batch, heads, M=m, N=n, device=device), return_weights="average")
    assert found["weights"].shape == (batch, m, n) and not found["weights"].any()


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_as_query_key_and_value(create_graph, device):
    x = torch.randn(B, H, M, D, device=device)

    def gradients(*leaves):
        out, weights = functional.attention(*leaves, return_weights="average", backend="triton")
        return torch.autograd.grad((out + weights.sum(-1)[:, None, :, None] + weights.square().sum()).sum(),
                                   set(leaves), create_graph=create_graph)  # fmt: skip

    (found,) = gradients(*[x.clone().requires_grad_()] * 3)
    torch.testing.assert_close(found, sum(gradients(*(x.clone().requires_grad_() for _ in range(3)))))
