"""The reference attention against torch's, and what torch lacks against its definition, in float64."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from seqcore.reference.attention import attention, dense_grid

from .attention_twins import ends, qkv, results, seen, torch_attention
from .comparisons import assert_equal_in_float64, cotangents

DOUBLE = {"dtype": torch.float64}
B, H, M, N = 3, 4, 5, 7
INFINITY = float("inf")


def reference(query, key, value, attn_mask=None, **options):
    return attention(query, key, value, attn_mask=attn_mask, **options)[:2]


def random_mask(kind, *shape):
    """True, or finite, in about two of three places."""
    if kind == "bool":
        return torch.rand(shape) < 0.7
    return torch.where(torch.rand(shape) < 0.7, torch.randn(shape, **DOUBLE), -INFINITY)


MASK_SHAPES = [(M, N), (1, N), (M, 1), (1, 1), (B, 1, 1, N), (1, H, M, 1), (B, H, M, N), (B, H, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_broadcast_over_any_dimension_and_take_gradients(kind, shape):
    inputs = qkv(B, H, M=M, N=N, **DOUBLE)
    mask = random_mask(kind, *shape)
    if kind == "bool":
        expected = results(torch_attention, *inputs, attn_mask=mask)
        assert_equal_in_float64(results(reference, *inputs, attn_mask=mask), expected)
    else:
        mask = mask.clamp(min=-30)
        assert_equal_in_float64(results(reference, *inputs, mask), results(torch_attention, *inputs, mask))


def test_an_additive_mask_may_hold_infinities():
    inputs, mask = qkv(B, H, M=M, N=N, **DOUBLE), random_mask("additive", B, 1, M, N)
    expected = results(torch_attention, *inputs, attn_mask=mask)
    assert_equal_in_float64(results(reference, *inputs, attn_mask=mask), expected)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
@pytest.mark.parametrize("m, n", [(5, 7), (7, 5), (6, 6), (1, 7), (7, 1)])
def test_causal_in_both_alignments(m, n, causal, masked):
    inputs, mask = qkv(B, H, M=m, N=n, **DOUBLE), torch.rand(m, n) < 0.7 if masked else None
    expected = results(torch_attention, *inputs, attn_mask=mask, causal=causal)
    assert_equal_in_float64(results(reference, *inputs, attn_mask=mask, causal=causal), expected)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_groups_of_query_heads_share_a_key_head(heads_kv):
    inputs = qkv(B, H, heads_kv=heads_kv, DV=3, **DOUBLE)
    assert_equal_in_float64(
        results(reference, *inputs, scale=0.3), results(torch_attention, *inputs, scale=0.3, enable_gqa=True)
    )


@pytest.mark.parametrize(
    "query, key, value",
    [
        ((4, 3, 8), (4, 4, 6, 8), (4, 4, 6, 8)),
        ((2, 1, 3, 8), (1, 4, 6, 8), (4, 6, 5)),
        ((3, 8), (6, 8), (6, 8)),
        ((3, 8), (2, 6, 8), (2, 1, 6, 1)),
        ((2, 1, 3, 3, 1), (2, 4, 1, 2, 1), (2, 7)),
    ],
    ids=str,
)
def test_leading_dimensions_broadcast_as_in_torch(query, key, value):
    inputs = [torch.randn(shape, **DOUBLE) for shape in (query, key, value)]
    ours, theirs = (results(f, *inputs, weigh=("out",)) for f in (reference, torch_attention))
    lse = ours.pop("lse")
    torch.testing.assert_close(lse, theirs.pop("lse").expand(lse.shape))
    assert_equal_in_float64(ours, theirs)


def by_definition(query, key, value, *, visible=None, bias=0.0, cap=lambda s: s, sink=None):
    """out and lse of attention over ``cap(scores) + bias`` where ``visible``, with one more key of value 0 per head."""
    scores = cap(query @ key.mT * query.shape[-1] ** -0.5) + bias
    scores = scores if visible is None else scores.masked_fill(~visible, -INFINITY)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def assert_defined_by(definition, inputs, **options):
    actual = results(reference, *inputs, **options)
    assert_equal_in_float64(actual, results(by_definition, *inputs, **definition))


@pytest.mark.parametrize("left, right", [(0, 0), (2, 1), (None, 1), (2, None), (None, None), (100, 100)])
@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
@pytest.mark.parametrize("m, n", [(4, 6), (6, 6)])
def test_window(m, n, causal, left, right):
    diagonal = 0 if causal == "top_left" else n - m

    def rule(row, column):
        past = column - row - diagonal
        return (
            (left is None or past >= -left)
            and (right is None or past <= right)
            and (causal is None or past <= 0)
        )  # fmt: skip

    inputs = qkv(B, H, M=m, N=n, **DOUBLE)
    assert_defined_by({"visible": seen(m, n, rule)}, inputs, window=(left, right), causal=causal)


@pytest.mark.parametrize("softcap", [0.1, 1.0, 20.0])
def test_softcap_comes_before_the_mask(softcap):
    bias = torch.randn(M, N, **DOUBLE)
    definition = {"cap": lambda s: softcap * torch.tanh(s / softcap), "bias": bias}
    assert_defined_by(definition, qkv(B, H, **DOUBLE), softcap=softcap, attn_mask=bias)


@pytest.mark.parametrize("causal, diagonal", [(None, 2), ("top_left", 0), ("lower_right", 2)])
def test_alibi_subtracts_slope_times_distance(causal, diagonal):
    slopes = torch.tensor([0.5, 0.25, 0.125, 3.0], **DOUBLE)
    distance = torch.tensor([[abs(n - m - diagonal) for n in range(7)] for m in range(5)], **DOUBLE)
    visible = None if causal is None else seen(5, 7, lambda m, n: n <= m + diagonal)
    definition = {"bias": -slopes[:, None, None] * distance, "visible": visible}
    assert_defined_by(definition, qkv(B, H, M=5, N=7, **DOUBLE), alibi_slopes=slopes, causal=causal)


def test_sinks_are_one_more_key_of_value_zero_and_take_gradients():
    sinks = torch.tensor([0.0, -3.0, 5.0, -INFINITY], **DOUBLE)
    inputs, visible = qkv(B, H, **DOUBLE), seen(5, 7, lambda m, n: n <= m)

    def gradients(function):
        sink = sinks.clone().requires_grad_()
        outputs = function(sink)
        return torch.autograd.grad(outputs, sink, cotangents(outputs))

    assert_defined_by({"sink": sinks, "visible": visible}, inputs, sinks=sinks, causal="top_left")
    torch.testing.assert_close(
        gradients(lambda sink: reference(*inputs, sinks=sink, causal="top_left")),
        gradients(lambda sink: by_definition(*inputs, sink=sink, visible=visible)),
    )


def test_a_row_that_sees_only_a_sink_gives_zeros_and_the_sink():
    sinks = torch.randn(H, **DOUBLE)
    out, lse = reference(*qkv(B, H, **DOUBLE), sinks=sinks, attn_mask=torch.zeros(M, N, dtype=torch.bool))
    assert not out.any()
    torch.testing.assert_close(lse, sinks[:, None].expand(B, H, M))


POSITIONAL = {
    "plain": {},
    "top_left": {"causal": "top_left"},
    "lower_right": {"causal": "lower_right"},
    "window": {"window": (2, 1)},
    "causal window": {"causal": "lower_right", "window": (3, None)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1], **DOUBLE)},
    "everything": {
        "causal": "lower_right", "window": (3, 0), "alibi_slopes": torch.tensor([0.5, 0.1], **DOUBLE),
        "sinks": torch.tensor([0.3, -1.0], **DOUBLE), "softcap": 2.0,
    },
}  # fmt: skip
LENGTHS_Q, LENGTHS_K = [4, 5, 1, 2], [7, 3, 6, 1]


@pytest.mark.parametrize("options", POSITIONAL.values(), ids=POSITIONAL)
def test_lengths_are_each_sequence_alone(options):
    inputs = qkv(4, 2, M=5, N=7, **DOUBLE)
    lengths = {"query_lengths": torch.tensor(LENGTHS_Q), "key_lengths": torch.tensor(LENGTHS_K)}

    def each_alone(query, key, value):
        rows = zip(query, key, value, LENGTHS_Q, LENGTHS_K, strict=True)
        alone = [reference(q[:, :m], k[:, :n], v[:, :n], **options) for q, k, v, m, n in rows]
        out = pad_sequence([out.transpose(0, 1) for out, _ in alone], batch_first=True).transpose(1, 2)
        lse = pad_sequence([lse.transpose(0, 1) for _, lse in alone], batch_first=True, padding_value=-INFINITY)
        return out, lse.transpose(1, 2)

    # The log-sum-exp of padding is -inf, or the sink: of no interest, and weighing it would say nothing.
    actual = results(reference, *inputs, weigh=("out",), **lengths, **options)
    expected = results(each_alone, *inputs, weigh=("out",))
    inside = (torch.arange(5) < lengths["query_lengths"][:, None])[:, None].expand(4, 2, 5)
    for found in (actual, expected):
        found["lse"] = found["lse"][inside]
    assert not actual["out"][:, :, 4][torch.tensor(LENGTHS_Q) < 5].any()
    assert_equal_in_float64(actual, expected)


@pytest.mark.parametrize("name", ["query_lengths", "key_lengths"])
def test_lengths_of_one_side_only(name):
    inputs = qkv(4, 2, M=5, N=7, **DOUBLE)
    lengths = torch.tensor([5, 3, 0, 1])
    counted = torch.arange(5 if name == "query_lengths" else 7) < lengths[:, None]
    mask = counted[:, None, :, None] if name == "query_lengths" else counted[:, None, None, :]
    assert_equal_in_float64(
        results(reference, *inputs, **{name: lengths}), results(torch_attention, *inputs, attn_mask=mask)
    )


@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("options", POSITIONAL.values(), ids=POSITIONAL)
def test_cu_seqlens_are_each_sequence_alone(options, heads_kv):
    lengths_q, lengths_k = [4, 5, 0, 2], [6, 3, 6, 1]
    inputs = qkv(2, heads_kv=heads_kv, M=sum(lengths_q), N=sum(lengths_k), DV=3, **DOUBLE)

    def each_alone(query, key, value):
        pieces = (query.split(lengths_q, 1), key.split(lengths_k, 1), value.split(lengths_k, 1))
        alone = [reference(*piece, **options) for piece in zip(*pieces, strict=True)]
        return torch.cat([out for out, _ in alone], 1), torch.cat([lse for _, lse in alone], 1)

    sequences = {"cu_seqlens_q": ends(*lengths_q), "cu_seqlens_k": ends(*lengths_k)}
    assert_equal_in_float64(results(reference, *inputs, **sequences, **options), results(each_alone, *inputs))


BLIND = {
    "bool mask": {"attn_mask": torch.arange(M)[:, None] != 2},
    "additive mask": {"attn_mask": torch.zeros(M, 1, **DOUBLE).index_fill(0, torch.tensor(2), -INFINITY)},
    "lengths": {"query_lengths": torch.tensor([2]), "key_lengths": torch.tensor([3])},
    "no keys": {"key_lengths": torch.tensor([0])},
    "lower_right": {"causal": "lower_right"},
    "window": {"window": (0, 0), "causal": "top_left"},
}


@pytest.mark.parametrize("options", BLIND.values(), ids=BLIND)
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(options):
    n = 2 if options.get("causal") else N
    found = results(reference, *qkv(1, H, M=M, N=n, **DOUBLE), **options)
    blind = found["lse"] == -INFINITY
    assert blind.any()
    assert not found["out"][blind].any()
    assert not found["gradient of query"][blind].any()
    assert all(found[f"gradient of {name}"].isfinite().all() for name in ("query", "key", "value"))


def test_no_keys_at_all():
    found = results(reference, *qkv(1, H, N=0, **DOUBLE))
    assert (found["lse"] == -INFINITY).all()
    assert not found["out"].any() and not found["gradient of query"].any()


SEED = torch.tensor([7])


def test_dropout_is_a_fixed_mask_on_the_weights():
    inputs = qkv(2, H, **DOUBLE)
    dropped = attention(*inputs, dropout_p=0.4, dropout_seed=SEED).weights
    kept = dropped != 0

    def fixed(query, key, value):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.softmax(-1).where(kept, 0) / 0.6 @ value, scores.logsumexp(-1)

    assert 0 < kept.double().mean() < 1
    actual = results(reference, *inputs, dropout_p=0.4, dropout_seed=SEED)
    assert_equal_in_float64(actual, results(fixed, *inputs))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_by_its_seed(probability):
    inputs = qkv(2, 3, M=60, N=60, D=1)

    def kept(seed):
        return attention(*inputs, dropout_p=probability, dropout_seed=torch.tensor([seed])).weights != 0

    first = kept(1)
    deviation = (probability * (1 - probability) / first.numel()) ** 0.5
    assert abs(1 - first.double().mean().item() - probability) < 4 * deviation
    assert torch.equal(first, kept(1))
    for other in (2, 1 + 2**32, -1):
        assert not torch.equal(first, kept(other))
    # No two heads of any two sequences share their randomness.
    assert len({tuple(head) for head in first.flatten(0, 1).flatten(1).tolist()}) == 2 * 3


def test_dropout_of_everything_gives_zeros_and_finite_gradients():
    found = results(reference, *qkv(2, H, **DOUBLE), weigh=("out",), dropout_p=1.0, dropout_seed=SEED)
    assert not found["out"].any()
    assert not any(found[f"gradient of {name}"].any() for name in ("query", "key", "value"))


def test_dropout_is_the_same_in_a_padded_batch_and_packed():
    lengths, options = [4, 2, 5], {"dropout_p": 0.5, "dropout_seed": SEED, "causal": "top_left"}
    packed = attention(*qkv(2, M=11, N=11), cu_seqlens_q=ends(*lengths), cu_seqlens_k=ends(*lengths), **options)
    padded = attention(*qkv(3, 2, M=5, N=5), query_lengths=torch.tensor(lengths), **options)
    for batch, (begin, length) in enumerate(zip(ends(*lengths).tolist(), lengths, strict=False)):
        own = slice(begin, begin + length)
        assert torch.equal(packed.weights[:, own, own] != 0, padded.weights[batch, :, :length, :length] != 0)


DIFFERENTIABLE = {
    "plain": {},
    "causal mask": {"causal": "lower_right", "attn_mask": torch.randn(3, 4, **DOUBLE)},
    "everything": {
        "window": (1, 2), "softcap": 1.5, "alibi_slopes": torch.tensor([0.5, 0.1], **DOUBLE),
        "key_lengths": torch.tensor([3]), "dropout_p": 0.3, "dropout_seed": SEED,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_differentiable_twice_in_every_argument(check, options):
    inputs = qkv(1, 2, heads_kv=1, M=3, N=4, D=2, DV=3, **DOUBLE)
    sinks, bias = torch.randn(2, **DOUBLE), torch.randn(1, 4, **DOUBLE)
    options = {name: value for name, value in options.items() if name != "attn_mask"}

    def function(query, key, value, sinks, bias):
        return reference(query, key, value, bias, sinks=sinks, **options)

    assert check(function, [t.requires_grad_() for t in (*inputs, sinks, bias)])


def test_half_precision_is_computed_in_float32():
    query, key, value = qkv(B, H, D=64, dtype=torch.float16)
    out, lse, weights, _ = attention(query, key, value)
    exact = attention(query.float(), key.float(), value.float())
    assert (out.dtype, lse.dtype, weights.dtype) == (torch.float16, torch.float32, torch.float32)
    assert torch.equal(out, exact.out.half()) and torch.equal(lse, exact.lse) and torch.equal(weights, exact.weights)


def test_positions_count_the_batch_in_every_leading_dimension():
    grid = dense_grid((2, 3, H), M, N, torch.device("cpu"))
    assert torch.equal(grid.batch.flatten(), torch.arange(6))


def test_nothing_in_the_padding_matters():
    inputs = qkv(4, 2, M=5, N=7, **DOUBLE)
    lengths = {"query_lengths": torch.tensor(LENGTHS_Q), "key_lengths": torch.tensor(LENGTHS_K)}
    past_q = (torch.arange(5) >= lengths["query_lengths"][:, None])[:, None, :, None]
    past_k = (torch.arange(7) >= lengths["key_lengths"][:, None])[:, None, :, None]

    def filled(filling):
        tensors = [t.masked_fill(past, filling) for t, past in zip(inputs, (past_q, past_k, past_k), strict=True)]
        return results(reference, *tensors, **lengths)

    found, expected = filled(float("nan")), filled(0.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
