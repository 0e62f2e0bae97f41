"""The operators seqcore::attention_forward and _backward, and the autograd Function over them, on CPU tensors."""

import pytest
import torch

from seqcore.autograd.attention import AttentionFunction
from seqcore.ops import attention as ops

from .attention_twins import assert_equal_in_float64, cotangents, qkv, results, torch_attention

DOUBLE = {"dtype": torch.float64}
B, H, H_KV, M, N, D, DV = 2, 4, 2, 3, 5, 2, 3
MASKS = {
    "no mask": lambda: None,
    "bool": lambda: (torch.rand(B, 1, M, N) < 0.7).expand(B, H, M, N),
    "additive": lambda: torch.randn(1, H, 1, N, **DOUBLE).expand(B, H, M, N),
}
CAUSAL = {"none": None, "top_left": "top_left", "lower_right": "lower_right"}


def function(causal="none", mask=None, scale=0.6):
    return lambda q, k, v: AttentionFunction.apply(q, k, v, mask, causal, scale)[:2]


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_operators_keep_torchs_rules(mask, causal):
    q, k, v = qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **DOUBLE)
    mask = MASKS[mask]()
    torch.library.opcheck(ops.forward, (q, k, v, mask, causal, 0.6))
    out, lse, rows = ops.forward(q, k, v, mask, causal, 0.6)
    for dout, dlse in ((out, lse.nan_to_num(neginf=0)), (None, lse.nan_to_num(neginf=0)), (out, None)):
        torch.library.opcheck(ops.backward, (dout, dlse, q, k, v, mask, out, rows, causal, 0.6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes_promised_are_those_returned(dtype):
    q, k, v = qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, dtype=dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse, rows = real = ops.forward(q, k, v, None, "none", 1.0)
    real += ops.backward(out, lse, q, k, v, None, out, rows, "none", 1.0)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (q, k, v)]
        out, lse, rows = promised = ops.forward(*fake, None, "none", 1.0)
        promised += ops.backward(out, lse, *fake, None, out, rows, "none", 1.0)
    for ours, theirs in zip(real, promised, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_function_is_torchs_attention(mask, causal):
    inputs, mask = qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **DOUBLE), MASKS[mask]()
    expected = results(torch_attention, *inputs, attn_mask=mask, causal=CAUSAL[causal], scale=0.6, enable_gqa=True)
    assert_equal_in_float64(results(function(causal, mask), *inputs), expected)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_function_is_differentiable_twice(mask, causal, check):
    mask = MASKS[mask]()
    inputs = [t.requires_grad_() for t in qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **DOUBLE)]
    finite = function(causal, mask)(*inputs)[1].isfinite()

    def finite_only(q, k, v):
        out, lse = function(causal, mask)(q, k, v)
        return out, lse[finite]

    assert check(finite_only, inputs, fast_mode=True)


@pytest.mark.parametrize("weigh", [("out",), ("lse",)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_loss_of_one_output_only(weigh, create_graph):
    inputs = qkv(B, H, M=M, N=N, D=D, DV=DV, **DOUBLE)
    expected = results(torch_attention, *inputs, weigh=weigh, scale=0.6)
    leaves = [t.requires_grad_() for t in inputs]
    outputs = dict(zip(("out", "lse"), function()(*leaves), strict=True))
    weighed = [outputs[name] for name in weigh]
    gradients = torch.autograd.grad(
        weighed, leaves, cotangents(weighed), create_graph=create_graph, materialize_grads=True
    )
    names = ("gradient of query", "gradient of key", "gradient of value")
    assert_equal_in_float64(outputs | dict(zip(names, gradients, strict=True)), expected)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_of_one_input_only(wanted, create_graph):
    inputs = qkv(B, H, M=M, N=N, D=D, DV=DV, **DOUBLE)
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    outputs = function()(*leaves)
    gradient = torch.autograd.grad(outputs, leaves[wanted], cotangents(outputs), create_graph=create_graph)[0]
    name = ("query", "key", "value")[wanted]
    torch.testing.assert_close(gradient, results(function(), *inputs)[f"gradient of {name}"])


def test_a_graph_kept_gives_the_same_gradients_again():
    leaves = [t.requires_grad_() for t in qkv(B, H, M=M, N=N, D=D, DV=DV)]
    out, lse = function()(*leaves)
    loss = out.sum() + lse.square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("heads, heads_kv", [(0, 0), (0, 2), (3, 3)])
@pytest.mark.parametrize("batch, m, n", [(0, 2, 3), (2, 0, 3), (2, 2, 0), (2, 2, 3)])
def test_sizes_of_zero(batch, m, n, heads, heads_kv):
    inputs = qkv(batch, heads, heads_kv=heads_kv, M=m, N=n, DV=4)
    found = results(function(), *inputs)
    assert found["out"].shape == (batch, heads, m, 4) and found["lse"].shape == (batch, heads, m)
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        assert found[f"gradient of {name}"].shape == tensor.shape
        assert found[f"gradient of {name}"].isfinite().all()
    if n == 0:
        assert not found["out"].any() and (found["lse"] == float("-inf")).all()
