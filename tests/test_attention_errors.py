"""Bad input to attention raises InvalidInput before anything runs, and says what it got and what is allowed."""

import pytest
import torch

import seqcore
from seqcore import InvalidInput, functional

B, H, M, N, D = 2, 4, 5, 7, 6
QKV = ((B, H, M, D), (B, H, N, D), (B, H, N, D))
FLOAT64, HALF, META = {"dtype": torch.float64}, {"dtype": torch.float16}, {"device": "meta"}


def call(query=QKV[0], key=QKV[1], value=QKV[2], function=functional.attention, **options):
    """``function`` of random tensors; a shape may come with options, as in ((2, 3), {"dtype": ...})."""

    def tensor(given):
        if not isinstance(given, tuple):
            return given
        shape, keywords = given if given and isinstance(given[-1], dict) else (given, {})
        return torch.randn(shape, **keywords)

    return function(tensor(query), tensor(key), tensor(value), **options)


TENSORS = {
    "not a tensor": ({"query": [[1.0]]}, "query must be a Tensor, got list"),
    "None": ({"key": None}, "key must be a Tensor, got NoneType"),
    "rank": ({"value": (N,)}, r"value must be at least 2-D, \[\*, rows, head dim\], got \[7\]"),
    "integers": ({"query": torch.ones(M, D, dtype=torch.int64)}, "query must be floating point, got torch.int64"),
    "float8": (
        dict.fromkeys(("query", "key", "value"), torch.ones(M, D).to(torch.float8_e4m3fn)),
        "query must be floating point, got torch.float8_e4m3fn; float32",
    ),
    "head dims": ({"key": (B, H, N, D + 1)}, "query and key need the same positive head dim, got 6 and 7"),
    "no head dim": ({"query": (B, H, M, 0), "key": (B, H, N, 0)}, "the same positive head dim, got 0 and 0"),
    "rows": ({"value": (B, H, N + 1, D)}, "key and value need the same number of rows, got 7 and 8"),
    "dtypes": ({"key": (QKV[1], FLOAT64)}, "one dtype, got query torch.float32 on cpu, key torch.float64 on cpu"),
    "devices": ({"value": (QKV[2], META)}, "one device, got .*value torch.float32 on meta"),
    "leading dimensions": (
        {"key": (3, H, N, D)},
        r"leading dimensions do not broadcast, got query \[2, 4, 5, 6\], key \[3, 4, 7, 6\], value \[2, 4, 7, 6\]",
    ),
    "heads": ({"key": (B, 2, N, D), "value": (B, 2, N, D)}, "enable_gqa=True lets groups of query heads share"),
    "groups": (
        {"key": (B, 3, N, D), "value": (B, 3, N, D), "enable_gqa": True},
        "the number of query heads must be a multiple of that of key heads, which value shares, got 4, 3 and 3",
    ),
    "groups of values": (
        {"key": (B, 2, N, D), "value": (B, 4, N, D), "enable_gqa": True}, "which value shares, got 4, 2 and 4",
    ),
    "groups of none": ({"key": (B, 0, N, D), "value": (B, 0, N, D), "enable_gqa": True}, "got 4, 0 and 0"),
}  # fmt: skip

INTEGERS = torch.tensor([3, 5])
OPTIONS = {
    "causal": ({"causal": True}, "causal must be None, 'top_left' or 'lower_right', got True"),
    "scale": ({"scale": float("nan")}, "scale must be a number that float32 holds, or None, got nan"),
    "dropout_p": ({"dropout_p": 1.5}, "dropout_p must be a number in 0 … 1, got 1.5"),
    "dropout_p nan": ({"dropout_p": float("nan")}, "dropout_p must be a number in 0 … 1, got nan"),
    "seed too large": (
        {"dropout_seed": 2**63},
        "dropout_seed must be an integer of 64 bits, .* got 9223372036854775808",
    ),
    "seed dtype": ({"dropout_seed": torch.tensor(1.0)}, r"int64 Tensor of one element on cpu, got \[\] torch.float32"),
    "seed size": ({"dropout_seed": INTEGERS}, r"one element on cpu, got \[2\] torch.int64 on cpu"),
    "softcap": ({"softcap": -1.0}, r"softcap must be 0 for none, or in 2\^-126 … 2\^126 .* got -1.0 with scale 0.4"),
    "softcap inf": ({"softcap": float("inf")}, "softcap must be 0 for none, or in .* got inf"),
    "softcap denormal": ({"softcap": 1e-39}, "softcap must be 0 for none, or in .* got 1e-39"),
    "softcap large": ({"softcap": 1e38}, r"softcap must be 0 for none, or in .* got 1e\+38"),
    "softcap small beside the scale": (
        {"softcap": 1e-30, "scale": 1e20}, r"at least 2\^-126 \|scale\|, got 1e-30 with scale 1e\+20",
    ),
    "window": ({"window": (1, -2)}, r"window must be \(left, right\), each None, .* integer in 0 … .* got \(1, -2\)"),
    "window size": ({"window": 4}, r"window must be \(left, right\), .* got 4"),
    "window floats": ({"window": (1.5, None)}, r"window must be .* got \(1.5, None\)"),
    "mask": ({"attn_mask": [[True]]}, "attn_mask must be a Tensor or None, got list"),
    "mask shape": ({"attn_mask": torch.zeros(M, M)}, r"attn_mask must broadcast to \[2, 4, 5, 7\], got \[5, 5\]"),
    "mask rank": ({"attn_mask": torch.zeros(1, B, H, M, N)}, r"broadcast to \[2, 4, 5, 7\], got \[1, 2, 4, 5, 7\]"),
    "mask dtype": (
        {"attn_mask": torch.zeros(M, N, **FLOAT64)},
        "attn_mask must be bool, torch.float32 like the query, or float32, got torch.float64",
    ),
    "mask integers": ({"attn_mask": torch.zeros(M, N, dtype=torch.int8)}, "must be bool, .* got torch.int8"),
    "mask device": ({"attn_mask": torch.zeros(M, N, **META)}, "on the query's device cpu, got meta"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must be a Tensor of shape \[4\], got \[3\]"),
    "slopes list": ({"alibi_slopes": [1.0] * H}, r"alibi_slopes must be a Tensor of shape \[4\], got list"),
    "sinks dtype": ({"sinks": torch.zeros(H, dtype=torch.int64)}, "sinks must be floating point, got torch.int64"),
    "sinks device": ({"sinks": torch.zeros(H, **META)}, "sinks must be on the query's device cpu, got meta"),
    "return_weights": ({"return_weights": True}, "return_weights must be None, 'average' or 'per_head', got True"),
    "lengths shape": ({"key_lengths": INTEGERS[:1]}, r"key_lengths must be a Tensor of shape \[2\], got \[1\]"),
    "lengths dtype": ({"query_lengths": torch.zeros(B)}, "query_lengths must be int32 or int64, got torch.float32"),
    "lengths bool": ({"query_lengths": INTEGERS > 3}, "query_lengths must be int32 or int64, got torch.bool"),
    "lengths device": ({"key_lengths": INTEGERS.to("meta")}, "key_lengths must be on the query's device cpu, got meta"),
    "lengths above": ({"query_lengths": INTEGERS + 1}, "query_lengths must lie in 0 … 5, got 4 … 6"),
    "lengths below": ({"key_lengths": INTEGERS - 4}, "key_lengths must lie in 0 … 7, got -1 … 1"),
    "lengths unbatched": (
        {"query": (H, M, D), "key": (H, N, D), "value": (H, N, D), "key_lengths": INTEGERS},
        r"key_lengths need query \[B, H, M, D\], got \[4, 5, 6\]",
    ),
}

PACKED = {"query": (H, M, D), "key": (H, N, D), "value": (H, N, D)}
ENDS = {"cu_seqlens_q": torch.tensor([0, 3, M]), "cu_seqlens_k": torch.tensor([0, 3, N])}
SEQUENCES = {
    "one of them": ({"cu_seqlens_k": None}, "cu_seqlens_q and cu_seqlens_k go together, got only one of them"),
    "lengths too": ({"key_lengths": INTEGERS}, "cu_seqlens and lengths exclude each other"),
    "weights": ({"return_weights": "average"}, "return_weights='average' does not go with cu_seqlens"),
    "rank": ({"key": QKV[1]}, r"must be \[H, M, D\], .*, got \[4, 5, 6\], \[2, 4, 7, 6\] and \[4, 7, 6\]"),
    "list": ({"cu_seqlens_q": [0, 3, M]}, r"Tensors of shape \[S \+ 1\] for S >= 1 sequences, got list and \[3\]"),
    "number": ({"cu_seqlens_q": torch.tensor(M)}, r"for S >= 1 sequences, got \[\] and \[3\]"),
    "sizes": ({"cu_seqlens_k": torch.tensor([0, N])}, r"for S >= 1 sequences, got \[3\] and \[2\]"),
    "none": ({"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])}, r"S >= 1 sequences, got \[1\]"),
    "dtype": ({"cu_seqlens_k": ENDS["cu_seqlens_k"].float()}, "cu_seqlens_k must be int32 or int64, got torch.float32"),
    "device": ({"cu_seqlens_k": ENDS["cu_seqlens_k"].to("meta")}, "on the query's device cpu, got meta"),
    "first": ({"cu_seqlens_q": torch.tensor([1, 3, M])}, r"cu_seqlens_q must rise from 0 to 5, got \[1, 3, 5\]"),
    "last": ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, r"cu_seqlens_k must rise from 0 to 7, got \[0, 3, 6\]"),
    "falling": ({"cu_seqlens_q": torch.tensor([0, 6, M])}, r"cu_seqlens_q must rise from 0 to 5, got \[0, 6, 5\]"),
}


@pytest.mark.parametrize("given, message", (TENSORS | OPTIONS).values(), ids=[*TENSORS, *OPTIONS])
def test_attention(given, message):
    with pytest.raises(InvalidInput, match=f"^attention: .*{message}"):
        call(**given)


@pytest.mark.parametrize("given, message", SEQUENCES.values(), ids=SEQUENCES)
def test_attention_over_packed_sequences(given, message):
    call(**PACKED | ENDS)
    with pytest.raises(InvalidInput, match=f"^attention: .*{message}"):
        call(**PACKED | ENDS | given)


@pytest.mark.parametrize("name", ["head dims", "rows", "dtypes", "heads"])
@pytest.mark.parametrize("backend", ["aten", "triton", "reference"])
def test_input_is_judged_before_the_backend(name, backend):
    given, message = TENSORS[name]
    with pytest.raises(InvalidInput, match=message):
        call(**given, backend=backend)


def test_scaled_dot_product_attention_takes_a_mask_or_causality():
    with pytest.raises(InvalidInput, match=r"attn_mask should not be set when is_causal=True; .*attention\(causal="):
        call(function=functional.scaled_dot_product_attention, is_causal=True, attn_mask=torch.zeros(M, N))


def test_a_float32_mask_is_welcome_at_half_precision():
    half = {"query": (QKV[0], HALF), "key": (QKV[1], HALF), "value": (QKV[2], HALF)}
    assert call(**half, attn_mask=torch.zeros(M, N)).dtype == torch.float16
    with pytest.raises(InvalidInput, match=r"must be bool, torch\.float16 like the query"):
        call(**half, attn_mask=torch.zeros(M, N, dtype=torch.bfloat16))


def test_meta_tensors_are_served():
    meta = {"query": (QKV[0], META), "key": (QKV[1], META), "value": (QKV[2], META)}
    for backend in ("auto", "aten", "reference"):
        out = call(**meta, backend=backend)
        assert out.shape == (B, H, M, D) and out.device.type == "meta"


# The module, over [rows, batch, width].
E = 12
ROWS = {"query": (M, B, E), "key": (N, B, E), "value": (N, B, E)}
MODULE = {
    "not a tensor": ({"key": None}, "key must be a Tensor, got NoneType"),
    "rank": ({"query": (1, M, B, E)}, r"must all be 3-D, or 2-D unbatched, got \(4, 3, 3\) dimensions"),
    "ranks": ({"query": (M, E)}, r"must all be 3-D, or 2-D unbatched, got \(2, 3, 3\) dimensions"),
    "widths": ({"value": (N, B, E + 1)}, r"last dimensions .* must be \(12, 12, 12\), got \(12, 12, 13\)"),
    "rows": (
        {"value": (N + 1, B, E)}, r"key and value need the same length and batch, got \[7, 2, 12\] and \[8, 2, 12\]"
    ),
    "batch": ({"query": (M, 3, E)}, r"the same batch, dimension 1, got \[5, 3, 12\] and \[7, 2, 12\]"),
    "dtype": ({"query": ((M, B, E), FLOAT64)}, "query must have the parameters' dtype torch.float32, got"),
    "device": ({"key": ((N, B, E), META)}, "key must be on the parameters' device cpu, got meta"),
    "mask shape": ({"attn_mask": torch.zeros(M, M)}, r"attn_mask must be \[5, 7\] or \[8, 5, 7\], got \[5, 5\]"),
    "mask batch": ({"attn_mask": torch.zeros(B, M, N)}, r"attn_mask must be \[5, 7\] or \[8, 5, 7\], got \[2, 5, 7\]"),
    "mask dtype": ({"attn_mask": torch.zeros(M, N, dtype=torch.int8)}, "bool or floating point, got torch.int8"),
    "mask of float8": (
        {"attn_mask": torch.zeros(M, N).to(torch.float8_e5m2)}, "bool or floating point, got torch.float8_e5m2",
    ),
    "nested mask": (
        {"attn_mask": torch.nested.nested_tensor([torch.zeros(N)], layout=torch.jagged)}, "a dense .*got a nested one",
    ),
    "sparse mask": ({"attn_mask": torch.zeros(M, N).to_sparse()}, "attn_mask must be a dense .*got a sparse_coo one"),
    "nested": (
        {"query": torch.nested.nested_tensor([torch.zeros(B, E)], layout=torch.jagged)},
        "query must be a dense Tensor, got a nested one; .*use_nested_tensor",
    ),
    "sparse": (
        {name: torch.zeros(shape).to_sparse() for name, shape in ROWS.items()},
        "query must be a dense Tensor, got a sparse_coo one",
    ),
    "integers": ({"query": torch.ones(M, B, E).long()}, "query must be floating point, got torch.int64"),
    "mask list": ({"attn_mask": [[True]]}, "attn_mask must be a Tensor or None, got list"),
    "padding shape": ({"key_padding_mask": torch.zeros(N, B)}, r"key_padding_mask must be \[2, 7\], got \[7, 2\]"),
    "is_causal": ({"is_causal": True}, "is_causal is a hint about attn_mask, got attn_mask=None"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "auto", "triton"])
@pytest.mark.parametrize("given, message", MODULE.values(), ids=MODULE)
def test_multihead_attention(given, message, backend):
    module = seqcore.nn.MultiheadAttention(E, H, backend=backend)
    with pytest.raises(InvalidInput, match=f"^MultiheadAttention: .*{message}"):
        call(function=module, **ROWS | given)


def test_multihead_attention_unbatched():
    module = seqcore.nn.MultiheadAttention(E, H)
    given = {"query": (M, E), "key": (N, E), "value": (N, E)}
    with pytest.raises(InvalidInput, match=r"key_padding_mask must be \[7\], got \[1, 7\]"):
        call(function=module, **given, key_padding_mask=torch.zeros(1, N))
    with pytest.raises(InvalidInput, match=r"attn_mask must be \[5, 7\] or \[4, 5, 7\], got \[5, 5\]"):
        call(function=module, **given, attn_mask=torch.zeros(M, M))


@pytest.mark.parametrize("options", [{"embed_dim": 12, "num_heads": 5}, {"embed_dim": 0, "num_heads": 1}], ids=str)
def test_the_constructor_raises_what_torchs_does(options):
    errors = []
    for module in (torch.nn.MultiheadAttention, seqcore.nn.MultiheadAttention):
        with pytest.raises((AssertionError, ValueError)) as caught:
            module(**options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_code_that_catches_torchs_errors_goes_on_working(error):
    with pytest.raises(error):
        call(key=(B, H, N, D + 1))
