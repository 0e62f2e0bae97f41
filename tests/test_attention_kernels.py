"""The attention kernels against torch's attention: outputs, log-sum-exp and gradients within the error budget."""

import pytest
import torch
import torch.nn.functional as F

from seqcore import functional
from seqcore.testing.budget import assert_within_budget

from .attention_twins import assert_like_torch, doubled, kernels, operands, qkv, reference, results
from .comparisons import assert_within

pytestmark = pytest.mark.kernels

INFINITY = float("inf")
GRADIENTS = ("gradient of query", "gradient of key", "gradient of value")


# Heads, M, N, D, DV. With one query or key the errors of a whole head hang on one rounding: many heads even it out.
SHAPES = [
    (2, 1, 1, 1, 1),
    (16, 1, 33, 20, 20),
    (16, 70, 1, 3, 3),
    (2, 5, 17, 3, 3),
    (2, 45, 70, 20, 64),
    (2, 70, 45, 64, 20),
    (2, 32, 16, 16, 16),
    (2, 5, 17, 256, 256),
    (2, 17, 21, 1, 64),
    (2, 9, 21, 256, 1),
]


@pytest.mark.parametrize("heads, m, n, d, dv", SHAPES, ids=lambda size: str(size))
def test_shapes(heads, m, n, d, dv, kernel_dtype, device):
    assert_like_torch(kernels, *qkv(1, heads, M=m, N=n, D=d, DV=dv, dtype=kernel_dtype, device=device))


@pytest.mark.parametrize("batch, heads, m, n", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_sizes_of_zero(batch, heads, m, n, device):
    inputs = qkv(batch, heads, M=m, N=n, DV=4, device=device)
    found = results(kernels, *inputs)
    assert found["out"].shape == (batch, heads, m, 4)
    assert not found["out"].any() and (found["lse"] == -INFINITY).all()
    for name, tensor in zip(GRADIENTS, inputs, strict=True):
        assert found[name].shape == tensor.shape and not found[name].any()


@pytest.mark.parametrize(
    "query, key, value",
    [
        ((4, 3, 8), (2, 4, 6, 8), (2, 4, 6, 8)),
        ((2, 1, 3, 8), (1, 4, 6, 8), (4, 6, 5)),
        ((3, 8), (6, 8), (6, 8)),
        ((3, 8), (2, 6, 8), (2, 1, 6, 1)),
        ((2, 1, 2, 3, 1), (2, 2, 1, 2, 1), (2, 7)),
    ],
    ids=str,
)
def test_leading_dimensions_broadcast_as_in_torch(query, key, value, device):
    inputs = [torch.randn(shape, device=device) for shape in (query, key, value)]
    lead = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])

    def out_only(*arguments):
        out, lse = kernels(*arguments)
        assert lse.shape == (*lead, query[-2])
        return out

    assert_like_torch(out_only, *inputs, weigh=("out",))


@pytest.mark.parametrize("causal", [None, "lower_right"])
@pytest.mark.parametrize("heads, heads_kv", [(4, 2), (3, 1)])
def test_groups_of_query_heads_share_a_key_head(heads, heads_kv, causal, kernel_dtype, device):
    inputs = qkv(2, heads, heads_kv=heads_kv, M=17, N=21, D=8, dtype=kernel_dtype, device=device)
    assert_like_torch(kernels, *inputs, causal=causal, enable_gqa=True)


def test_groups_with_a_batch_that_broadcasts(device):
    query, key, value = qkv(2, 4, heads_kv=2, device=device)
    assert_like_torch(kernels, query, key[:1], value, enable_gqa=True)


LAYOUTS = {
    "heads behind rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "columns not contiguous": lambda t: t.mT.contiguous().mT,
    "every other row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "wider rows": lambda t: F.pad(t, (3, 2), value=float("nan"))[..., 3:-2],
    "batch of stride 0": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(layout, device):
    inputs = [layout(t) for t in qkv(2, 2, M=17, N=21, D=6, DV=5, device=device)]
    assert_like_torch(kernels, *inputs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_the_outputs_gradient(layout, device):
    leaves = [t.requires_grad_() for t in qkv(2, 2, M=17, N=21, D=6, device=device)]
    out, lse = kernels(*leaves)
    dout, dlse = layout(torch.randn_like(out)), torch.randn_like(lse.mT).mT
    strided = torch.autograd.grad((out, lse), leaves, (dout, dlse), retain_graph=True)
    plain = torch.autograd.grad((out, lse), leaves, (dout.contiguous(), dlse.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("causal", ["top_left", "lower_right"])
@pytest.mark.parametrize("m, n", [(45, 70), (70, 45), (33, 33), (2, 40)])
def test_causal(m, n, causal, kernel_dtype, device):
    assert_like_torch(kernels, *qkv(1, 1, M=m, N=n, D=8, dtype=kernel_dtype, device=device), causal=causal)


B, H, M, N = 2, 2, 21, 18
MASK_SHAPES = [(M, N), (1, N), (M, 1), (N,), (B, 1, 1, N), (1, H, M, 1), (B, H, M, N)]


def bool_mask(*shape):
    return torch.rand(shape) < 0.7


def additive_mask(*shape):
    return torch.where(torch.rand(shape) < 0.7, torch.randn(shape), -INFINITY)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks_broadcast_over_any_dimension(shape, device):
    mask = bool_mask(*shape).to(device)
    assert_like_torch(kernels, *qkv(B, H, M=M, N=N, device=device), attn_mask=torch.atleast_2d(mask))
    if mask.dim() == 1:
        inputs = qkv(1, 1, M=M, N=N, device=device)
        assert torch.equal(kernels(*inputs, mask)[0], kernels(*inputs, mask[None])[0])


@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
@pytest.mark.parametrize("mask", [bool_mask, additive_mask])
def test_masks_with_causality(mask, causal, kernel_dtype, device):
    mask = mask(B, 1, M, N).to(device)
    mask = mask.to(kernel_dtype) if mask.is_floating_point() else mask
    inputs = qkv(B, H, M=M, N=N, dtype=kernel_dtype, device=device)
    assert_like_torch(kernels, *inputs, attn_mask=mask, causal=causal)


def test_a_float32_mask_with_queries_of_another_dtype(kernel_dtype, device):
    """PyTorch issue 191612: read as half, of which 1e6 is beyond the range, it gives other results or none."""
    mask = (additive_mask(B, 1, M, N) + torch.where(torch.arange(M) % 2 == 1, 1e6, 0)[:, None]).to(device)
    assert_like_torch(kernels, *qkv(B, H, M=M, N=N, dtype=kernel_dtype, device=device), attn_mask=mask)


@pytest.mark.parametrize("mask", [bool_mask, additive_mask])
@pytest.mark.parametrize("view", [lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(3, -1)[..., ::3]])
def test_strides_of_the_mask(mask, view, device):
    mask = mask(B, H, M, N).to(device)
    inputs = qkv(B, H, M=M, N=N, device=device)
    found, expected = (results(kernels, *inputs, attn_mask=m) for m in (view(mask), mask))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("causal", [None, "lower_right"])
@pytest.mark.parametrize("mask", [bool_mask, additive_mask])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(mask, causal, kernel_dtype, device):
    mask = mask(B, 1, M, N).to(device)
    mask[:, :, 3], mask[1] = (0, 0) if mask.dtype == torch.bool else (-INFINITY, -INFINITY)
    inputs = qkv(B, H, M=M, N=N, dtype=kernel_dtype, device=device)
    found = assert_like_torch(kernels, *inputs, attn_mask=mask, causal=causal)
    blind = found["lse"] == -INFINITY
    assert blind[:, :, 3].all() and blind[1].all()
    assert causal is None or blind[:, :, : M - N].all()
    assert not found["out"][blind].any() and not found["gradient of query"][blind].any()


def test_masks_of_the_lowest_finite_number(kernel_dtype, device):
    mask = torch.where(bool_mask(B, 1, M, N), 0.0, torch.finfo(kernel_dtype).min).to(device, kernel_dtype)
    assert_like_torch(kernels, *qkv(B, H, M=M, N=N, dtype=kernel_dtype, device=device), attn_mask=mask)


def test_rows_masked_by_the_lowest_finite_number_are_plain_means(kernel_dtype, device):
    """As libraries of transformers mask padding: no gradient may be NaN."""
    query, key, value = qkv(B, H, M=M, N=N, dtype=kernel_dtype, device=device)
    mask = torch.full((M, N), torch.finfo(torch.float32).min, device=device)
    found = results(kernels, query, key, value, attn_mask=mask)
    assert all(tensor.isfinite().all() for tensor in found.values())
    mean, exact = (t.mean(-2, keepdim=True).expand_as(found["out"]) for t in (value, value.double()))
    assert_within_budget(found["out"], exact, mean)


@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0])
def test_a_log_sum_exp_far_from_zero(shift, device):
    mask = torch.full((M, N), shift, device=device)
    assert_like_torch(kernels, *qkv(B, H, M=M, N=N, device=device), attn_mask=mask)


def test_a_log_sum_exp_far_from_zero_with_a_tile_half_full(kernel_dtype, device):
    """PyTorch issue 196678: NaN gradients of queries behind a mask, where lengths modulo 128 are 64."""
    mask = torch.where(bool_mask(192, 192), -1e4, -2e4).to(device)
    inputs = qkv(1, 1, M=192, N=192, D=4, dtype=kernel_dtype, device=device)
    found = assert_like_torch(kernels, *inputs, attn_mask=mask)
    assert (found["lse"] < -9e3).all() and found["gradient of query"].any()


def test_logits_that_would_overflow_without_the_running_maximum(kernel_dtype, device):
    query, key, value = qkv(B, H, M=M, N=N, D=20, dtype=kernel_dtype, device=device)
    assert_like_torch(kernels, query * 10, key * 10, value)


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.5])
def test_scale(scale, kernel_dtype, device):
    assert_like_torch(kernels, *qkv(1, 2, M=17, N=21, dtype=kernel_dtype, device=device), scale=scale)


@pytest.mark.parametrize("weigh", [("out",), ("lse",)], ids=str)
def test_a_loss_of_one_output_only(weigh, kernel_dtype, device):
    found = assert_like_torch(kernels, *qkv(1, 2, M=17, N=21, dtype=kernel_dtype, device=device), weigh=weigh)
    assert weigh == ("out",) or not found["gradient of value"].any()


def test_double_backward_follows_the_kernels(device):
    leaves = [t.requires_grad_() for t in qkv(1, 2, M=5, N=7, device=device)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]

    def penalty(function, inputs):
        (gradient,) = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs[0], create_graph=True)
        return dict(zip(GRADIENTS, torch.autograd.grad(gradient.square().sum(), inputs), strict=True))

    eager, exact = penalty(reference, leaves), penalty(reference, doubles)
    assert_within(penalty(kernels, leaves), exact, eager)


def test_repeats_are_bitwise_equal(kernel_dtype, device):
    inputs = qkv(1, 4, heads_kv=2, M=45, N=37, D=20, dtype=kernel_dtype, device=device)
    first, second = (results(kernels, *inputs, causal="top_left", enable_gqa=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(17, 21, dtype=torch.bool).tril(3)}],
    ids=["plain", "causal", "scale", "mask"],
)
def test_scaled_dot_product_attention_is_torchs(options, kernel_dtype, device):
    inputs = qkv(2, 2, M=17, N=21, dtype=kernel_dtype, device=device)
    options = {name: value.to(device) if name == "attn_mask" else value for name, value in options.items()}
    ours = results(functional.scaled_dot_product_attention, *inputs, **options, backend="triton")
    eager = results(F.scaled_dot_product_attention, *inputs, **options)
    exact = results(F.scaled_dot_product_attention, *map(doubled, inputs), **options)
    assert_within(ours, exact, eager)


def test_a_head_dim_above_the_limit_is_refused_by_the_operator_too(device):
    query, key, value = qkv(1, 1, D=257, device=device)
    settings, tensors = operands(query, key, value)
    with pytest.raises(NotImplementedError, match="at most 256, got 257"):
        torch.ops.seqcore.attention_forward(*tensors, *settings)
