"""What the attention kernels have beyond torch's attention, against the reference: windows, caps, sinks, sequences."""

import pytest
import torch

from seqcore.kernels import tuning
from seqcore.kernels.tuning import Tiles
from seqcore.ops.attention_arguments import Arguments

from .attention_twins import (
    FEATURES,
    assert_like_reference,
    beside,
    doubled,
    ends,
    features,
    kernels,
    qkv,
    reference,
    results,
)
from .comparisons import assert_within

pytestmark = pytest.mark.kernels

INFINITY = float("inf")
# Both beyond one tile of the interpreter's, and so many queries that no group is packed for decoding.
B, H, H_KV, M, N, D, DV = 2, 2, 1, 37, 41, 8, 5


def inputs(**options):
    return qkv(B, H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **options)


def packed(**options):
    return qkv(H, heads_kv=H_KV, M=M, N=N, D=D, DV=DV, **options)


PACKED = {"cu_seqlens_q": ends(0, 20, 0, 1, 16, 0), "cu_seqlens_k": ends(0, 9, 3, 0, 29, 0)}


def packed_everything(**options):
    everything = features(1, H, M, N, **options)["everything"]
    everything = {name: value for name, value in everything.items() if not name.endswith("_lengths")} | PACKED
    # One mask for all: its rows and columns count through the whole batch.
    return everything | {"attn_mask": everything["attn_mask"].detach()[0].requires_grad_()}


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, device):
    assert_like_reference(*inputs(device=device), **features(B, H, M, N)[name])


def test_all_features_together(kernel_dtype, device):
    everything = features(B, H, M, N, dtype=kernel_dtype)["everything"]
    assert_like_reference(*inputs(dtype=kernel_dtype, device=device), **everything)


@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
def test_packed_sequences(causal, device):
    assert_like_reference(*packed(device=device), **PACKED, causal=causal)


def test_packed_sequences_with_all_features(kernel_dtype, device):
    assert_like_reference(*packed(dtype=kernel_dtype, device=device), **packed_everything(dtype=kernel_dtype))


def test_more_packed_sequences_than_are_searched_at_a_time(device):
    """Most of them empty; of both ends, a tile's sequence is found 128 at a time."""
    lengths = [0] * 132
    for place, length in ((3, 5), (127, 4), (128, 6), (130, 20)):
        lengths[place] = length
    sequences = {"cu_seqlens_q": ends(*lengths), "cu_seqlens_k": ends(*lengths)}
    assert_like_reference(*qkv(1, M=35, N=35, D=4, device=device), **sequences)


@pytest.mark.parametrize("window", [(0, 0), (5, 3), (30, None), (None, 4), (2**31 - 1, 2**31 - 1)], ids=str)
@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
def test_windows(window, causal, device):
    assert_like_reference(*qkv(1, 1, M=M, N=N, D=D, device=device), window=window, causal=causal)


@pytest.mark.parametrize("causal", [None, "lower_right"])
def test_windows_where_queries_outnumber_keys(causal, device):
    found = assert_like_reference(*qkv(1, 2, M=70, N=20, D=4, device=device), window=(5, 3), causal=causal)
    blind = found["lse"] == -INFINITY
    assert blind[:, :, :40].all() and not found["out"][blind].any() and not found["gradient of query"][blind].any()


# Far out the interpreter's tanh warns of the exponential that overflows on its way to 1.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("softcap", [0.1, 30.0])
def test_softcaps(softcap, kernel_dtype, device):
    query, key, value = qkv(1, 2, M=17, N=21, dtype=kernel_dtype, device=device)
    assert_like_reference(query * 4, key * 4, value, softcap=softcap)


@pytest.mark.parametrize("causal", ["top_left", "lower_right"])
def test_alibi_counts_from_the_diagonal(causal, kernel_dtype, device):
    slopes = torch.tensor([0.03125, 4.0])
    assert_like_reference(*inputs(dtype=kernel_dtype, device=device), alibi_slopes=slopes, causal=causal)


@pytest.mark.parametrize("blind", [False, True], ids=["", "seen alone"])
def test_sinks(blind, kernel_dtype, device):
    """Of 32 heads, so that the gradient of all sinks has elements enough to be judged."""
    sinks = torch.linspace(-4, 8, 32, dtype=kernel_dtype).index_fill(0, torch.tensor([5]), -INFINITY).requires_grad_()
    query, key, value = qkv(1, 32, M=7, N=5, D=4, dtype=kernel_dtype, device=device)
    found = assert_like_reference(query, key, value, sinks=sinks, causal="lower_right" if blind else None)
    assert found["gradient of sinks"][5] == 0 and found["gradient of sinks"].count_nonzero() == 31
    if blind:
        assert not found["out"][:, :, :2].any()
        expected = sinks.detach().float().to(device)[:, None].expand(32, 2)
        torch.testing.assert_close(found["lse"][0, :, :2], expected)


LENGTHS = {"query_lengths": torch.tensor([23, 37, 0, 1]), "key_lengths": torch.tensor([41, 17, 5, 0])}


@pytest.mark.parametrize("causal", [None, "top_left", "lower_right"])
@pytest.mark.parametrize("sides", [("query_lengths",), ("key_lengths",), tuple(LENGTHS)], ids=str)
def test_lengths(sides, causal, device):
    lengths = {name: LENGTHS[name] for name in sides}
    assert_like_reference(*qkv(4, 2, M=M, N=N, D=D, DV=DV, device=device), **lengths, causal=causal)


def test_lengths_are_of_the_first_of_several_batch_dimensions(device):
    lengths = {"query_lengths": torch.tensor([5, 3]), "key_lengths": torch.tensor([2, 7])}
    assert_like_reference(*qkv(2, 3, 2, device=device), **lengths)


@pytest.mark.parametrize("name", ["lengths", "everything"])
def test_nothing_in_the_padding_matters(name, device):
    options = {key: beside(value, device) for key, value in features(B, H, M, N)[name].items()}
    past_q = torch.arange(M, device=device) >= options["query_lengths"][:, None]
    past_k = torch.arange(N, device=device) >= options["key_lengths"][:, None]
    padding = [past[:, None, :, None] for past in (past_q, past_k, past_k)]
    tensors = [*inputs(device=device), torch.randn(B, H, M, N, device=device)]
    padding.append(past_q[:, None, :, None] | past_k[:, None, None, :])
    options.pop("attn_mask", None)
    found, expected = (
        results(kernels, *map(torch.masked_fill, tensors, padding, (filling,) * 4), **options, enable_gqa=True)
        for filling in (torch.tensor(float("nan"), device=device), torch.tensor(7.0, device=device))
    )
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    for name, past in zip(("query", "key", "value", "attn_mask"), padding, strict=True):
        gradient = found[f"gradient of {name}"]
        assert not gradient[past.expand_as(gradient)].any(), name
    assert not found["out"][past_q[:, None].expand(B, H, M)].any()


def test_sequences_of_a_packed_batch_do_not_meet(device):
    """Whatever another sequence holds, what is of this one keeps its bits."""
    options = {k: beside(v, device) for k, v in packed_everything().items() if k != "attn_mask"}
    tensors = packed(device=device)
    rows, columns = slice(21, 37), slice(12, 41)
    spoilt = [t.clone() for t in tensors]
    for tensor, own in zip(spoilt, (rows, columns, columns), strict=True):
        kept = tensor[:, own].clone()
        tensor.fill_(float("nan"))[:, own] = kept
    found, expected = (results(kernels, *t, **options, enable_gqa=True) for t in (spoilt, tensors))
    for name, own in (("out", rows), ("lse", rows), ("gradient of query", rows), ("gradient of key", columns)):
        assert torch.equal(found[name][:, own], expected[name][:, own]), name
        assert found[name][:, own].isfinite().all(), name


@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 64), (64, 32)])
@pytest.mark.parametrize("kind", ["plain", "everything", "packed"])
def test_any_tiles_will_do(rows, columns, kind, device, monkeypatch):
    monkeypatch.setattr(tuning, "attention_tiles", lambda *_: Tiles(rows, columns, num_warps=4, num_stages=2))
    if kind == "packed":
        assert_like_reference(*packed(device=device), **packed_everything())
    else:
        assert_like_reference(*inputs(device=device), **features(B, H, M, N)[kind], return_weights="average")


@pytest.fixture
def described(monkeypatch):
    """What each launch was given as descriptors."""
    found, descriptors = [], Arguments.descriptors
    monkeypatch.setattr(Arguments, "descriptors", lambda *given: found.append(descriptors(*given)) or found[-1])
    return found


@pytest.mark.parametrize("way", [{"persistent": 1}, {"descriptors": True}, {"persistent": 3, "descriptors": True}])
@pytest.mark.parametrize("kind", ["top_left", "lengths", "packed"])
def test_other_ways_to_run_forward_change_no_bit(way, kind, device, monkeypatch, described):
    lead, options = ((H,), PACKED) if kind == "packed" else ((B, H), features(B, H, M, N)[kind])
    options = {name: beside(value, device) for name, value in options.items()}
    # Head dims that fill their tiles, as descriptors need them.
    tensors = qkv(*lead, heads_kv=H_KV, M=M, N=N, D=16, DV=32, device=device)
    found = []
    for options_of_tiles in ({}, way):
        tiles = Tiles(16, 16, num_warps=4, num_stages=1, **options_of_tiles)
        monkeypatch.setattr(tuning, "attention_tiles", lambda *_, tiles=tiles: tiles)
        found.append(kernels(*tensors, **options, enable_gqa=True))
    assert [one is not None for one in described[1]] == [way.get("descriptors", False)] * 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_descriptors_give_way_where_memory_is_not_aligned(device, monkeypatch, described):
    tiles = Tiles(16, 16, num_warps=4, num_stages=1, descriptors=True)
    monkeypatch.setattr(tuning, "attention_tiles", lambda *_: tiles)
    query, *keys = qkv(1, 2, M=M, N=N, D=16, device=device)
    for shifted in (
        [torch.nn.functional.pad(t, (0, 3))[..., :-3] for t in keys],
        [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in keys],
        [t[:, :, :1].expand_as(t) for t in keys],
    ):
        assert_like_reference(query, *shifted)
        assert described.pop() == (None, None)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_repeats_are_bitwise_equal(kind, device):
    options = packed_everything() if kind == "packed" else features(B, H, M, N)["everything"]
    options = {name: beside(value, device) for name, value in options.items()} | {"enable_gqa": True}
    tensors = (packed if kind == "packed" else inputs)(device=device)
    first, second = (results(kernels, *tensors, **options) for _ in range(2))
    assert {"gradient of attn_mask", "gradient of sinks"} < first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_double_backward_follows_the_kernels_with_every_feature(device):
    options = {name: beside(value, device) for name, value in features(1, 2, 5, 7)["everything"].items()}
    tensors = (*qkv(1, 2, M=5, N=7, device=device), options.pop("attn_mask").detach())

    def penalty(function, tensors, **options):
        """The gradient of a gradient's square, as if it were an output's."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        (gradient,) = torch.autograd.grad(function(*leaves, **options)[0].square().sum(), leaves[0], create_graph=True)
        return dict(enumerate(torch.autograd.grad(gradient.square().sum(), leaves)))

    eager = penalty(reference, tensors, **options)
    exact = penalty(reference, map(doubled, tensors), **{name: doubled(value) for name, value in options.items()})
    assert_within(penalty(kernels, tensors, **options), exact, eager)
