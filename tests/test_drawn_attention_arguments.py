"""Attention called with arguments that nobody would pass: an answer, or a refusal that helps."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

from seqcore import functional, nn

from .arbitrary import attempt, each_replaced, refused, replaced
from .attention_twins import doubled
from .comparisons import assert_equal_in_float64
from .effort import drawn, seeded

E, HEADS = 6, 2
with seeded():
    QUERY, KEY, VALUE = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)
    SLOPES, SINKS, WIDE = torch.rand(2), torch.rand(2), torch.randn(2, 4, 6)
    X, MEMORY = torch.randn(4, 2, E), torch.randn(5, 2, E)
QKV = {"query": QUERY, "key": KEY, "value": VALUE}
EVERYTHING = QKV | {
    "attn_mask": torch.ones(4, 5).bool(), "causal": "lower_right", "scale": 0.5, "window": (2, 1), "softcap": 1.0,
    "alibi_slopes": SLOPES, "sinks": SINKS, "query_lengths": torch.tensor([4, 2]),
    "key_lengths": torch.tensor([3, 5]), "dropout_p": 0.2, "dropout_seed": 5, "enable_gqa": True, "return_lse": True,
    "return_weights": "average",
}  # fmt: skip
PACKED = {
    "query": QUERY[0], "key": KEY[0], "value": VALUE[0], "cu_seqlens_q": torch.tensor([0, 2, 4]),
    "cu_seqlens_k": torch.tensor([0, 2, 5]),
}  # fmt: skip
OPTIONS = (*list(EVERYTHING)[3:], "cu_seqlens_q", "cu_seqlens_k", "backend")
SDPA = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "backend")

ATTENTION = {
    "attention": (functional.attention, QKV, OPTIONS),
    "attention with everything": (functional.attention, EVERYTHING, ()),
    "attention over packed sequences": (functional.attention, PACKED, ("attn_mask", "sinks", "return_lse")),
    "scaled_dot_product_attention": (functional.scaled_dot_product_attention, QKV, SDPA),
}


def ordinary(given: dict) -> bool:
    """Whether these arguments make numbers of ordinary size that are the same in each call, and no others."""
    tensors = [t for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()]
    if any(t.is_meta for t in tensors):
        return False
    values = [t for t in tensors if not t.isneginf().all()]
    plain = all(bool((t.abs() < 1e3).logical_or(t.isneginf()).all()) for t in values)
    seeded = not given.get("dropout_p") or given.get("dropout_seed") is not None
    scale = given.get("scale")
    return plain and seeded and (scale is None or abs(scale) < 1e3) and given["query"].dtype == torch.float32


def named(found: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Results by number."""
    return {str(i): t.detach() for i, t in enumerate(found if isinstance(found, tuple) else (found,))}


@pytest.mark.parametrize("name", ATTENTION)
@drawn(25, 500, data=st.data())
def test_attention(name, data):
    function, valid, optional = ATTENTION[name]
    given = data.draw(replaced(valid, optional))
    found = attempt(function, **given)
    if not refused(found) and ordinary(given):
        # Of so few numbers one may be outside float32's budget by chance.
        given = {key: doubled(value) for key, value in given.items()}
        assert_equal_in_float64(named(function(**given)), named(function(**given | {"backend": "reference"})))


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_with_each_argument_replaced(name):
    function, valid, optional = ATTENTION[name]
    for given in each_replaced(valid, optional):
        attempt(function, **given)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor(list(QUERY), layout=torch.jagged)
    assert refused(attempt(functional.attention, nested, KEY, VALUE))


POSITIONS = torch.arange(8).reshape(2, 4)
CALLS = {
    "rotary": (functional.rotary, {"x": WIDE, "positions": torch.arange(4)}, ("base", "interleaved", "dims")),
    "rotary of each sequence": (
        functional.rotary, {"x": WIDE, "positions": POSITIONS, "base": 100.0, "interleaved": True, "dims": 4}, ()
    ),
    "sinusoidal_positions": (
        functional.sinusoidal_positions, {"positions": torch.arange(4), "dim": 4}, ("base", "dtype")
    ),
    "alibi_slopes": (functional.alibi_slopes, {"heads": 4}, ("device", "dtype")),
    "RotaryPositions": (nn.RotaryPositions, {"head_dim": 4}, ("base", "interleaved", "dims")),
    "SinusoidalPositions": (nn.SinusoidalPositions, {"dim": 4}, ("base", "batch_first")),
    "LearnedPositions": (
        nn.LearnedPositions, {"max_length": 5, "dim": 4}, ("batch_first", "device", "dtype")
    ),
    "rotated": (nn.RotaryPositions(6), {"x": WIDE[:, None]}, ("start",)),
    "added": (nn.SinusoidalPositions(6), {"x": WIDE}, ("start",)),
    "learned": (nn.LearnedPositions(9, 6), {"x": WIDE}, ("start",)),
    "KVCache": (
        nn.KVCache, {"batch_size": 2, "num_heads": 2, "max_length": 4, "head_dim": 3},
        ("value_head_dim", "device", "dtype"),
    ),
    "update": (lambda **given: nn.KVCache(2, 2, 8, 3).update(**given), {"key": KEY, "value": VALUE}, ("lengths",)),
    "reset": (lambda **given: nn.KVCache(2, 2, 8, 3).reset(**given), {"index": None}, ()),
    "reorder": (lambda **given: nn.KVCache(2, 2, 8, 3).reorder(**given), {"index": torch.tensor([0, 1])}, ()),
    "truncate": (lambda **given: nn.KVCache(2, 2, 8, 3).truncate(**given), {"lengths": 2}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@drawn(10, 200, data=st.data())
def test_positions_and_caches(name, data):
    function, valid, optional = CALLS[name]
    found = attempt(function, **data.draw(replaced(valid, optional)))
    for tensor in found if isinstance(found, tuple) else (found,):
        assert not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.int64


@pytest.mark.parametrize("name", CALLS)
def test_positions_and_caches_with_each_argument_replaced(name):
    function, valid, optional = CALLS[name]
    for given in each_replaced(valid, optional):
        attempt(function, **given)


MODULE = {
    "self-attention": ({"query": X, "key": X, "value": X}, ("key_padding_mask", "attn_mask", "cache")),
    "with masks": (
        {"query": X, "key": MEMORY, "value": MEMORY, "key_padding_mask": torch.zeros(2, 5), "need_weights": False,
         "attn_mask": torch.zeros(4, 5).bool()}, ("is_causal", "average_attn_weights", "need_weights"),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("name", MODULE)
@drawn(25, 500, data=st.data())
def test_multihead_attention(name, data):
    """As torch's module raises, or refused; where both answer, the answers have the same shapes."""
    valid, optional = MODULE[name]
    given = data.draw(replaced(valid, optional))
    module = nn.MultiheadAttention(E, HEADS, backend="reference")
    found, expected = answer(module, given), None
    if "cache" not in given:
        expected = answer(torch.nn.MultiheadAttention(E, HEADS), given)
    if isinstance(found, Exception) and not refused(found):
        assert type(found) is type(expected), found
    elif isinstance(found, tuple) and isinstance(expected, tuple):
        assert [None if t is None else t.shape for t in found] == [None if t is None else t.shape for t in expected]


def answer(module, given):
    """The result, our refusal, or what Python or torch raise for flags that are neither true nor false."""
    try:
        return attempt(module, **given)
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, AttributeError) as e:
        return e


CONSTRUCTOR = ("dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first", "device", "dtype")


@drawn(40, 800, given=replaced({"embed_dim": 4, "num_heads": 2}, (*CONSTRUCTOR, "rotary", "alibi", "backend")))
def test_multihead_attention_is_made_or_refused_as_torch_does(given):
    found = answer(nn.MultiheadAttention, given)
    if isinstance(found, Exception) and not refused(found):
        plain = {name: value for name, value in given.items() if name not in ("rotary", "alibi", "backend")}
        assert type(found) is type(answer(torch.nn.MultiheadAttention, plain)), found
