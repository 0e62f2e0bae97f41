"""Odd requests that once went wrong, each by its name."""

import pytest
import torch
import torch.nn.functional as F

from seqcore import InvalidInput, UnsupportedInput, explain, functional, replace_sdpa
from seqcore.kernels import tuning
from seqcore.kernels.tuning import Device
from seqcore.nn import MultiheadAttention
from seqcore.ops import attention as ops
from seqcore.ops.attention_arguments import Arguments

from .attention_twins import qkv
from .comparisons import assert_equal_in_float64

DOUBLE = {"dtype": torch.float64}


def reference(*tensors, **options):
    found = functional.attention(*tensors, **options, return_lse=True, backend="reference")
    return dict(zip(("out", "lse", "weights"), found, strict=False))


@pytest.mark.parametrize("key_shape", [(4, 11, 8), (1, 2, 4, 11, 8), (1, 1, 1, 11, 8), (11, 8)], ids=str)
def test_lengths_of_sequences_that_share_their_keys(key_shape):
    query, key = torch.randn(2, 2, 4, 9, 8, **DOUBLE), torch.randn(key_shape, **DOUBLE)
    lengths = {"key_lengths": torch.tensor([11, 3]), "query_lengths": torch.tensor([2, 9])}
    whole = key.expand(2, 2, 4, 11, 8)
    assert_equal_in_float64(reference(query, key, key, **lengths), reference(query, whole, whole, **lengths))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.uint32], ids=str)
def test_lengths_too_narrow_to_count_with(dtype):
    query, key, value = qkv(2, 2)
    with pytest.raises(InvalidInput, match="must be int32 or int64"):
        functional.attention(query, key, value, key_lengths=torch.ones(2).to(dtype))


@pytest.mark.parametrize("m, n", [(8192, 0), (8192, 1), (1, 32768)])
def test_heads_worked_on_together_are_no_more_than_there_are(m, n):
    """More of them would overflow the 32 bits in which tiles are counted."""
    q, k = torch.empty(2, 8, m, 1), torch.empty(2, 1, n, 1)
    given = Arguments(q, k, k, None, None, None, None, None, None, False, "lower_right", None, None, 1.0, 0.0, 0.0)
    assert given.section() <= 16 and given.section(over_keys=True) <= 2


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_no_scale_sends_causal_attention_where_it_is_nan(scale):
    """torch's own operator gives NaN there."""
    inputs = qkv(1, 2)
    options = {"scale": scale, "causal": "top_left"}
    (explanation,) = explain(functional.attention, *inputs, **options)
    assert explanation.chosen == "reference" and "scale that is not positive" in explanation.notes["aten"]
    assert functional.attention(*inputs, **options).isfinite().all()


@pytest.mark.parametrize("options", [{"sinks": torch.zeros(1)}, {"alibi_slopes": torch.ones(1)}, {"dropout_p": 0.5}])
def test_a_query_without_heads_keeps_its_shape(options):
    query, key, value = torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 3)
    found = reference(query, key, value, return_weights="per_head", **options)
    assert [tuple(t.shape) for t in found.values()] == [(5, 3), (5,), (5, 7)]


def test_values_alone_may_differ_between_sequences():
    query, key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(3, 2, 7, 4)
    found = reference(query, key, value, return_weights="average")
    assert [tuple(t.shape) for t in found.values()] == [(3, 2, 5, 4), (3, 2, 5), (3, 5, 7)]


def test_autocast_does_not_excuse_float64():
    query, key, value = qkv(1, 2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InvalidInput, match="one dtype"):
        functional.attention(query, key.double(), value)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"window": (2**31, 0)}, r"2\^31 - 1"),
        ({"scale": 1e300}, "float32 holds"),
        ({"scale": "1"}, "float32 holds"),
        ({"softcap": None}, "softcap must be"),
        ({"softcap": 1e300}, "softcap must be"),
        ({"dropout_p": None}, "dropout_p must be a number"),
    ],
    ids=str,
)
def test_numbers_that_no_kernel_takes(options, said):
    with pytest.raises(InvalidInput, match=said):
        functional.attention(*qkv(1, 2), **options)


@pytest.mark.kernels
def test_sinks_of_rows_that_belong_to_no_sequence(device):
    q, k, v = (torch.randn(1, 1, 8, 4, device=device) for _ in range(3))
    ends, sinks = torch.tensor([0, 5], device=device), torch.tensor([100.0], device=device)
    problem = (None, None, sinks, ends, ends, None, True, "top_left", None, None, 1.0, 0.0, 0.0)
    out, _, rows = ops.forward(q, k, v, *problem)
    assert not out[:, :, 5:].any()
    dsinks = ops.backward(out, None, out, rows, [False] * 4 + [True], q, k, v, *problem)[4]
    assert dsinks.isfinite().all()


def test_little_shared_memory_gets_small_tiles():
    few, many = (tuning.attention_tiles("attention_forward", 128, 16, Device(arch)) for arch in ("sm_89", "sm_80"))
    assert few.rows * few.columns < many.rows * many.columns
    assert tuning.attention_tiles("attention_forward", 64, 16, Device("gfx90a")).num_warps == 4


@pytest.mark.parametrize("m, n, width", [(0, 5, 4), (5, 0, 4), (5, 7, 0)], ids=["queries", "keys", "width"])
@pytest.mark.parametrize("lead", [((1, 2), (3, 2)), ((2,), (3, 1)), ((3, 1), (2,))], ids=str)
def test_of_nothing_leading_dimensions_broadcast_too(m, n, width, lead):
    """torch's own operator gives an out in the query's."""
    shapes = (*lead[0], m, 4), (*lead[1], n, 4), (*lead[1], n, width)
    inputs = [torch.ones(shape, requires_grad=True) for shape in shapes]
    for backend in ("auto", "aten", "reference"):
        out = functional.attention(*inputs, backend=backend)
        assert out.shape == (3, 2, m, width) and not out.any()
        assert tuple(t.shape for t in torch.autograd.grad(out.sum(), inputs)) == shapes


@pytest.fixture(params=["causal_upper_left", "causal_lower_right"])
def causal_bias(request):
    # Not imported above: it brings torch's compiler with it.
    from torch.nn.attention import bias

    return getattr(bias, request.param)


@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")
@pytest.mark.parametrize("m, n", [(3, 5), (5, 5), (5, 3)])
def test_a_causal_bias_is_what_it_stands_for(causal_bias, m, n):
    """Its elements are whatever was in its memory."""
    query, key, value = qkv(2, 2, M=m, N=n, **DOUBLE)
    bias = causal_bias(m, n)
    expected = F.scaled_dot_product_attention(query, key, value, bias._materialize())
    for backend in ("auto", "reference"):
        out = functional.attention(query, key, value, attn_mask=bias, backend=backend)
        same = functional.scaled_dot_product_attention(query, key, value, bias, backend=backend)
        with replace_sdpa(backend):
            replaced = F.scaled_dot_product_attention(query, key, value, bias)
        for found in (out, same, replaced):
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, expected)


def test_torchs_own_operator_takes_a_causal_bias_as_causality(causal_bias):
    query, key, value = qkv(2, 2, M=3, N=5)
    if causal_bias.__name__ == "causal_lower_right":
        with pytest.raises(UnsupportedInput, match="no causal lower_right"):
            functional.attention(query, key, value, attn_mask=causal_bias(3, 5), backend="aten")
    else:
        out = functional.attention(query, key, value, attn_mask=causal_bias(3, 5), backend="aten")
        assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.kernels
def test_kernels_take_a_causal_bias_as_causality(causal_bias, device):
    inputs, causal = qkv(1, 2, M=9, N=11, device=device), causal_bias.__name__.removeprefix("causal_")
    found = functional.attention(*inputs, attn_mask=causal_bias(9, 11), backend="triton")
    causal = causal.replace("upper", "top")
    assert torch.equal(found, functional.attention(*inputs, causal=causal, backend="triton"))


@pytest.mark.parametrize(
    "size, options, said",
    [
        ((5, 6), {}, "of 5 queries and 7 keys, got 5 and 6"),
        ((5, 7), {"causal": "top_left"}, "goes with no causal"),
        ((5, 7), {"window": (1, 1)}, "goes with no causal, window"),
        ((5, 7), {"key_lengths": torch.tensor([3])}, "pass causal= instead"),
    ],
    ids=["size", "causal", "window", "lengths"],
)
def test_a_causal_bias_that_says_something_else_is_refused(causal_bias, size, options, said):
    with pytest.raises(InvalidInput, match=said):
        functional.attention(*qkv(1, 2), attn_mask=causal_bias(*size), **options)


def test_the_module_refuses_a_causal_bias(causal_bias):
    x = torch.randn(5, 1, 6)
    with pytest.raises(InvalidInput, match="attn_mask must be a Tensor that holds a mask, got torch's CausalBias"):
        MultiheadAttention(6, 2, backend="reference")(x, x, x, attn_mask=causal_bias(5, 5))
