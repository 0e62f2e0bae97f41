"""The operators seqcore::attention_* and the autograd Functions over them, on CPU tensors."""

import pytest
import torch

from seqcore.autograd.attention import AttentionFunction, AverageWeightsFunction
from seqcore.ops import attention as ops
from seqcore.reference.attention import attention as reference

from .attention_twins import FEATURES, ends, features, operands, qkv, results, torch_attention
from .comparisons import assert_equal_in_float64, cotangents

DOUBLE = {"dtype": torch.float64}
B, H, H_KV, M, N, D, DV = 2, 4, 2, 3, 5, 2, 3
SEQUENCES = {"cu_seqlens_q": ends(1, 0, 2), "cu_seqlens_k": ends(2, 1, 2)}
PROBLEMS = (*FEATURES, "packed", "packed everything")


def problem(name, **options):
    """query, key and value, and a feature's options."""
    B_ = 1 if name.startswith("packed") else B
    found = features(B_, H, M, N, **options).get(name.removeprefix("packed ").replace("packed", "plain"))
    if B_ == 1:
        found = {key: value for key, value in found.items() if not key.endswith("lengths")} | SEQUENCES
    if name == "additive mask":
        found["attn_mask"] = torch.randn(1, H, 1, N, **options).requires_grad_()
    return qkv(B_, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **options), found


def function(query, key, value, attn_mask=None, **options):
    settings, tensors = operands(query, key, value, attn_mask=attn_mask, **options)
    return AttentionFunction.apply(settings, *tensors)[:2]


def average_weights(query, key, value, attn_mask=None, **options):
    settings, tensors = operands(query, key, value, attn_mask=attn_mask, **options)
    rows = AttentionFunction.apply(settings, *tensors)[2]
    return AverageWeightsFunction.apply(settings, rows, *tensors)


def by_the_reference(query, key, value, attn_mask=None, **options):
    return reference(query, key, value, attn_mask=attn_mask, scale=0.6, **options)[:2]


def detached(values):
    return [t.detach() if isinstance(t, torch.Tensor) else t for t in values]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_operators_keep_torchs_rules(name, dtype):
    inputs, options = problem(name, dtype=dtype)
    settings, tensors = operands(*inputs, **options)
    tensors = detached(tensors)
    torch.library.opcheck(ops.forward, (*tensors, *settings))
    out, lse, rows = ops.forward(*tensors, *settings)
    lse = lse.nan_to_num(neginf=0)
    learned = [t is not None and t.is_floating_point() for t in (*tensors[:4], tensors[5])]
    for dout, dlse, wanted in ((out, lse, learned), (None, lse, [True] * 3 + [False] * 2), (out, None, learned)):
        torch.library.opcheck(ops.backward, (dout, dlse, out, rows, wanted, *tensors, *settings))
    if not settings.packed:
        torch.library.opcheck(ops.weights, (rows, *tensors, *settings))
        dweights, wanted = ops.weights(rows, *tensors, *settings), [*learned[:2], False, *learned[3:]]
        torch.library.opcheck(torch.ops.seqcore.attention_weights_backward, (dweights, wanted, *tensors, *settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes_promised_are_those_returned(dtype):
    inputs, options = problem("everything", dtype=dtype)
    settings, tensors = operands(*inputs, **options)
    q, *rest = detached(tensors)
    tensors = [q.transpose(1, 2).contiguous().transpose(1, 2), *rest]
    wanted = [True, False, True, True, True]

    def everything(*tensors):
        out, lse, rows = found = ops.forward(*tensors, *settings)
        found += ops.backward(out, lse, out, rows, wanted, *tensors, *settings)
        return *found, ops.weights(rows, *tensors, *settings)

    real = everything(*tensors)
    with torch._subclasses.FakeTensorMode() as mode:
        promised = everything(*(t if t is None else mode.from_tensor(t) for t in tensors))
    for ours, theirs in zip(real, promised, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("name", ["plain", "top_left", "lower_right", "bool mask", "additive mask"])
def test_function_is_torchs_attention(name):
    inputs, options = problem(name, **DOUBLE)
    expected = results(torch_attention, *inputs, **options, scale=0.6, enable_gqa=True)
    assert_equal_in_float64(results(function, *inputs, **options), expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_function_is_the_reference(name):
    """Whose gradients torch's autograd finds, and the operator by formulas written out."""
    inputs, options = problem(name, **DOUBLE)
    assert_equal_in_float64(
        results(function, *inputs, **options), results(by_the_reference, *inputs, **options)
    )


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("apply", [function, average_weights])
@pytest.mark.parametrize("name", PROBLEMS)
def test_functions_are_differentiable_twice(name, apply, check):
    if apply is average_weights and name.startswith("packed"):
        pytest.skip("a packed batch has no weights to return")
    inputs, options = problem(name, **DOUBLE)
    learned = {name: t for name, t in options.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    # Behind lengths the log-sum-exp is -inf or, as a constant, the sink.
    counted = function(*inputs, **options)[1].isfinite()
    if "query_lengths" in options:
        counted &= torch.arange(counted.shape[-1]) < options["query_lengths"][:, None, None]

    def counted_only(*tensors):
        found = apply(*tensors[:3], **options | dict(zip(learned, tensors[3:], strict=True)))
        return (found[0], found[1][counted]) if isinstance(found, tuple) else found

    assert check(counted_only, [t.detach().requires_grad_() for t in (*inputs, *learned.values())], fast_mode=True)


@pytest.mark.parametrize("weigh", [("out",), ("lse",)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_loss_of_one_output_only(weigh, create_graph):
    inputs = qkv(B, H, M=M, N=N, D=D, DV=DV, **DOUBLE)
    expected = results(torch_attention, *inputs, weigh=weigh, scale=0.6)
    leaves = [t.requires_grad_() for t in inputs]
    outputs = dict(zip(("out", "lse"), function(*leaves), strict=True))
    weighed = [outputs[name] for name in weigh]
    gradients = torch.autograd.grad(
        weighed, leaves, cotangents(weighed), create_graph=create_graph, materialize_grads=True
    )
    names = ("gradient of query", "gradient of key", "gradient of value")
    assert_equal_in_float64(outputs | dict(zip(names, gradients, strict=True)), expected)


@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask", "sinks"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("apply", [function, average_weights])
def test_a_gradient_of_one_input_only(wanted, create_graph, apply):
    if apply is average_weights and wanted == "value":
        pytest.skip("of values there is nothing in the weights")
    inputs, options = problem("everything", **DOUBLE)
    everything = dict(zip(("query", "key", "value"), inputs, strict=True)) | options
    expected = results(apply, *inputs, **options)[f"gradient of {wanted}"]
    everything = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in everything.items()}
    everything[wanted] = leaf = everything[wanted].clone().requires_grad_()
    outputs = apply(**everything)
    outputs = outputs if isinstance(outputs, tuple) else [outputs]
    (gradient,) = torch.autograd.grad(outputs, leaf, cotangents(outputs), create_graph=create_graph)
    torch.testing.assert_close(gradient, expected)


def test_a_graph_kept_gives_the_same_gradients_again():
    leaves = [t.requires_grad_() for t in qkv(B, H, M=M, N=N, D=D, DV=DV)]
    out, lse = function(*leaves)
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
    found = results(function, *inputs)
    assert found["out"].shape == (batch, heads, m, 4) and found["lse"].shape == (batch, heads, m)
    for name, tensor in zip(("query", "key", "value"), inputs, strict=True):
        assert found[f"gradient of {name}"].shape == tensor.shape
        assert found[f"gradient of {name}"].isfinite().all()
    if n == 0:
        assert not found["out"].any() and (found["lse"] == float("-inf")).all()
