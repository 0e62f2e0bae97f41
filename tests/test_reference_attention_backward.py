"""What the reference writes out by hand, its backward and a head's weights, against autograd and itself in float64."""

import pytest
import torch

from seqcore.reference.attention import attention, average_weights
from seqcore.reference.attention_backward import average_weights_backward, backward

from .attention_twins import FEATURES, ends, features, qkv, results
from .comparisons import assert_equal_in_float64, cotangents

DOUBLE = {"dtype": torch.float64}
B, H, M, N = 3, 4, 5, 7
INFINITY = float("inf")
MASK_SHAPES = [(M, N), (1, N), (M, 1), (1, 1), (B, 1, 1, N), (1, H, M, 1), (B, H, M, N), (B, H, 1, 1)]

# What the hand-written forms want to be told even where there is none.
ABSENT = dict.fromkeys(
    ("attn_mask", "causal", "window", "alibi_slopes", "sinks", "dropout_seed", "query_lengths", "key_lengths",
     "cu_seqlens_q", "cu_seqlens_k")
) | {"softcap": 0.0, "dropout_p": 0.0, "scale": 0.7}  # fmt: skip


def problem(name):
    """query, key and value, and options of a feature; "packed" ones as the operators take them, of batch 1."""
    if not name.startswith("packed"):
        return qkv(B, H, heads_kv=2, M=M, N=N, DV=3, **DOUBLE), features(B, H, M, N, **DOUBLE)[name]
    options = features(1, H, M, N, **DOUBLE)[name.removeprefix("packed ")]
    options = {key: value for key, value in options.items() if not key.endswith("lengths")}
    sequences = {"cu_seqlens_q": ends(3, 0, 2), "cu_seqlens_k": ends(2, 1, 4)}
    return qkv(1, H, heads_kv=2, M=M, N=N, DV=3, **DOUBLE), options | sequences


@pytest.mark.parametrize("weigh", [("out",), ("lse",), ("out", "lse")], ids=str)
@pytest.mark.parametrize("name", [*FEATURES, "packed plain", "packed everything"])
def test_backward_written_out_is_autograd(name, weigh):
    inputs, options = problem(name)
    expected = results(lambda *t, **o: attention(*t, **o, scale=0.7)[:2], *inputs, weigh=weigh, **options)
    rows = attention(*inputs, **options, scale=0.7).rows
    found = {name: expected[name] for name in ("out", "lse")}
    weights = dict(zip(weigh, cotangents([found[name] for name in weigh]), strict=True))
    gradients = backward(weights.get("out"), weights.get("lse"), *inputs, found["out"], rows, **ABSENT | options)
    gradients = dict(zip(("query", "key", "value", "attn_mask", "sinks"), gradients, strict=True))
    actual = {f"gradient of {name}": g for name, g in gradients.items() if g is not None}
    assert_equal_in_float64(found | actual, expected)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_backward_written_out_sums_a_masks_gradient_to_its_shape(shape):
    inputs, mask = qkv(B, H, M=M, N=N, **DOUBLE), torch.randn((1,) * (4 - len(shape)) + shape, **DOUBLE)
    expected = results(lambda *t: attention(*t[:3], attn_mask=t[3], scale=0.7)[:2], *inputs, mask)
    dout, dlse = cotangents([expected["out"], expected["lse"]])
    rows = attention(*inputs, attn_mask=mask, scale=0.7).rows
    found = backward(dout, dlse, *inputs, expected["out"], rows, **ABSENT | {"attn_mask": mask}).mask
    torch.testing.assert_close(found, expected["gradient of attn_mask"])


@pytest.mark.parametrize("name", FEATURES)
def test_weights_a_head_at_a_time(name):
    (query, key, value), options = problem(name)
    if "attn_mask" in options:
        # Query 2 of the first sequence sees nothing.
        blind = torch.zeros(B, 1, M, N, dtype=torch.bool)
        blind[0, 0, 2] = True
        mask = options["attn_mask"]
        filled = mask & ~blind if mask.dtype == torch.bool else torch.where(blind, -INFINITY, mask)
        options = options | {"attn_mask": filled}
    expected = attention(query, key, value, scale=0.7, **options).weights
    found = average_weights(query, key, **ABSENT | options)
    assert "attn_mask" not in options or not found[0, 2].any()
    torch.testing.assert_close(found, expected.mean(1))


@pytest.mark.parametrize("name", FEATURES)
def test_backward_of_weights_written_out_is_autograd(name):
    inputs, options = problem(name)
    expected = results(lambda *t, **o: attention(*t, **o, scale=0.7).weights.mean(1), *inputs, **options)
    (dweights,) = cotangents([expected.pop("out")])
    gradients = average_weights_backward(dweights, *inputs[:2], **ABSENT | options)
    names = ("query", "key", "value", "attn_mask", "sinks")
    actual = {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True) if g is not None}
    # Of values there is nothing in the weights.
    actual["gradient of value"] = torch.zeros_like(inputs[2])
    assert_equal_in_float64(actual, expected)


def test_autocast_around_it_changes_nothing():
    query, key, value = qkv(B, H, dtype=torch.bfloat16)

    def everything():
        out, lse, weights, rows = attention(query, key, value, causal="lower_right")
        gradients = backward(out, lse, query, key, value, out, rows, **ABSENT | {"causal": "lower_right"})
        return out, lse, weights, average_weights(query, key, **ABSENT), *(t for t in gradients if t is not None)

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        actual = everything()
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
