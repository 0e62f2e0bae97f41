"""Decoder-only models that generate with a cache equal the same models run whole, at every step."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import seqcore
from seqcore import InvalidInput, UnsupportedInput
from seqcore.nn import KVCache, MultiheadAttention, RotaryPositions
from seqcore.testing.budget import assert_within_budget

from .transformer_twins import caches, causal_mask, explicit, step, swapped

# Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

B, T, N, E, HEADS = 2, 7, 9, 16, 2
POSITIONS = {
    "none": {}, "rotary": {"rotary": True}, "alibi": {"alibi": True}, "both": {"rotary": True, "alibi": True}
}  # fmt: skip
PIECES = {"single tokens": [1] * T, "prefill": [4, 1, 1, 1], "pieces": [2, 3, 1, 1]}


def decoder_only(**options) -> nn.TransformerEncoder:
    """Torch's; with a causal mask it is a model that generates."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 24, dropout=0.3, **options)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        # Layers that are copies of each other, with biases of zero, would hide what is mixed up.
        nn.init.normal_(parameter, std=0.3)
    return model


def tokens(model: nn.TransformerEncoder, count: int = T, **options) -> Tensor:
    batch_first = model.layers[0].self_attn.batch_first
    return torch.randn((B, count, E) if batch_first else (count, B, E), **options)


def generated(model: nn.TransformerEncoder, x: Tensor, sizes: list[int], run=step) -> Tensor:
    """What ``model`` gives for tokens handed to it in pieces of these sizes."""
    kept, time = caches(model, B, N), int(model.layers[0].self_attn.batch_first)
    return torch.cat([run(model, piece, kept) for piece in x.split(sizes, time)], time)


def assert_steps_equal_the_whole(model, backend, positions, sizes, device) -> None:
    model = model.to(device)
    x, whole = tokens(model, device=device), explicit(model, **positions) if positions else model
    double, mask = copy.deepcopy(whole).double(), causal_mask(T).to(device)
    exact, eager = double(x.double(), mask=mask.double()), whole(x, mask=mask)
    assert_within_budget(generated(swapped(model, backend, **positions), x, sizes), exact, eager)
    if backend != "triton":
        ours = swapped(copy.deepcopy(model).double(), backend, **positions)
        torch.testing.assert_close(generated(ours, x.double(), sizes), exact)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True}], ids=["batch first", "norm first"])
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_steps_equal_the_whole(backend, positions, sizes, options):
    assert_steps_equal_the_whole(decoder_only(**options), backend, positions, sizes, "cpu")


@pytest.mark.kernels
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@torch.no_grad()
def test_kernels_step_by_step_equal_the_whole(positions, device):
    assert_steps_equal_the_whole(decoder_only(), "triton", positions, PIECES["prefill"], device)


def attention(backend: str | None = "auto", **options) -> MultiheadAttention:
    return MultiheadAttention(E, HEADS, backend=backend, dtype=torch.float64, **options)


def cache(batch: int = B, **options) -> KVCache:
    return KVCache(batch, HEADS, N, E // HEADS, **{"dtype": torch.float64} | options)


def rows(count: int, *batch: int) -> Tensor:
    return torch.randn(count, *(batch or (B,)), E, dtype=torch.float64)


@pytest.mark.parametrize("average", [True, False], ids=["average", "per head"])
@pytest.mark.parametrize("unbatched", [True, False], ids=["unbatched", "batched"])
@torch.no_grad()
def test_weights_are_over_all_slots(unbatched, average):
    theirs = nn.MultiheadAttention(E, HEADS, dtype=torch.float64)
    x = torch.randn(T, *(() if unbatched else (B,)), E, dtype=torch.float64)
    out, weights = theirs(x, x, x, attn_mask=causal_mask(T, torch.float64), average_attn_weights=average)
    module, kept, done = swapped(theirs, "auto"), cache(1 if unbatched else B), 0
    for piece in x.split(PIECES["prefill"]):
        found, found_weights = module(piece, piece, piece, average_attn_weights=average, cache=kept)
        new, done = slice(done, done + len(piece)), done + len(piece)
        torch.testing.assert_close(found, out[new])
        torch.testing.assert_close(found_weights[..., :T], weights[..., new, :])
        assert found_weights.shape[-1] == N and not found_weights[..., done:].any()


@torch.no_grad()
def test_sequences_of_different_lengths_step_together():
    """Each sequence's positions start at its own length."""
    module = attention(rotary=RotaryPositions(E // HEADS), alibi=True)
    x, kept, apart = rows(6), cache(), [cache(1) for _ in range(B)]
    module(x[:4], x[:4], x[:4], cache=kept)
    kept.truncate(torch.tensor([1, 4]))
    for b, length in enumerate((1, 4)):
        first = x[:length, b]
        module(first, first, first, cache=apart[b])
    for piece in x[4:].split(1):
        found = module(piece, piece, piece, cache=kept)[0]
        expected = [module(t, t, t, cache=c)[0] for t, c in zip(piece.unbind(1), apart, strict=True)]
        torch.testing.assert_close(found, torch.stack(expected, 1))


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_the_causal_hint_says_what_a_cache_does(is_causal):
    module, x = attention(), rows(3)
    found = module(x, x, x, is_causal=is_causal, cache=cache())[0]
    assert torch.equal(found, module(x, x, x, cache=cache())[0])


X = torch.zeros(2, B, E, dtype=torch.float64)
MASK = causal_mask(2, torch.float64)
REFUSED = {
    "attn_mask": ({}, {"attn_mask": MASK}, "takes no attn_mask and no key_padding_mask; for ragged prompts"),
    "is_causal": ({}, {"attn_mask": MASK, "is_causal": True}, "takes no attn_mask and no key_padding_mask"),
    "padding": ({}, {"key_padding_mask": torch.zeros(B, 2) > 0}, "takes no attn_mask and no key_padding_mask"),
    "add_bias_kv": ({"add_bias_kv": True}, {}, "belong to no position, do not go with a cache"),
    "add_zero_attn": ({"add_zero_attn": True}, {}, "belong to no position, do not go with a cache"),
    "no cache": ({}, {"cache": (X, X)}, "cache must be a seqcore.nn.KVCache, got tuple"),
    "heads": ({}, {"cache": KVCache(B, 4, N, 4, dtype=torch.float64)}, "key must be .* got"),
    "batch": ({}, {"cache": cache(3)}, "key must be .* got"),
    "dtype": ({}, {"cache": cache(dtype=torch.float32)}, "key must be torch.float32 .* got torch.float64"),
}


@pytest.mark.parametrize("flags, keywords, message", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_does_not_go_with_a_cache_is_refused_and_nothing_kept(flags, keywords, message):
    keywords = {"cache": cache()} | keywords
    with pytest.raises(InvalidInput, match=message):
        attention(**flags)(X, X, X, **keywords)
    assert not isinstance(keywords["cache"], KVCache) or not keywords["cache"].lengths.any()


@torch.no_grad()
def test_query_and_key_are_the_same_tokens():
    kept = cache()
    for query, key in ((1, 2), (2, 1)):
        with pytest.raises(InvalidInput, match=f"same new tokens, got {query} and {key} of them"):
            attention()(rows(query), *[rows(key)] * 2, cache=kept)
    assert not kept.lengths.any()


def test_gradients_are_refused():
    with pytest.raises(InvalidInput, match="keeps no graph"):
        attention()(X, X, X, cache=cache())


@torch.no_grad()
def test_no_room():
    module, kept, x = attention(), cache(), rows(N)
    module(x, x, x, cache=kept)
    before = copy.deepcopy(kept)
    with pytest.raises(InvalidInput, match=f"room for {N} tokens, got {N + 1}"):
        module(x[:1], x[:1], x[:1], cache=kept)
    assert all(torch.equal(*pair) for pair in zip(kept.buffers(), before.buffers(), strict=True))
    kept.reset()
    module(x, x, x, cache=kept)


@pytest.mark.parametrize("named", ["aten", None])
@torch.no_grad()
def test_aten_never_forgets_the_cache(named):
    module = attention(named)
    with seqcore.use_backend("aten"), pytest.raises(UnsupportedInput, match=r"has no .*key_lengths"):
        module(X, X, X, need_weights=False, cache=cache())


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("positions", [{}, POSITIONS["both"]], ids=["", "positions"])
def test_a_module_compiles_whole(positions, training):
    torch._dynamo.reset()
    module = swapped(nn.MultiheadAttention(E, HEADS, dtype=torch.float64), "auto", **positions)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, fullgraph=True, backend=counter)
    for _ in range(2):
        x = rows(T).requires_grad_(training)
        with torch.set_grad_enabled(training):
            found, expected = (function(x, x, x, need_weights=not training) for function in (run, module))
        torch.testing.assert_close(found, expected)
        if training:
            gradients = (torch.autograd.grad(out.square().sum(), x) for out, _ in (found, expected))
            torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("positions", [{}, POSITIONS["both"]], ids=["", "positions"])
@torch.no_grad()
def test_one_compile_serves_every_step(positions, weights):
    torch._dynamo.reset()
    module = swapped(nn.MultiheadAttention(E, HEADS, dtype=torch.float64), "auto", **positions)
    counter, kept, twin = CompileCounterWithBackend("aot_eager"), cache(), cache()
    prompt = rows(2)
    for each in (kept, twin):
        module(prompt, prompt, prompt, cache=each)
    run = torch.compile(module, fullgraph=True, backend=counter)
    for x in rows(N - 2).split(1):
        found, expected = (call(x, x, x, need_weights=weights, cache=c) for call, c in ((run, kept), (module, twin)))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1
    assert kept.lengths.tolist() == [N] * B and torch.equal(kept.keys, twin.keys)


@torch.no_grad()
def test_a_model_generates_by_one_compile():
    torch._dynamo.reset()
    model = swapped(decoder_only(batch_first=True).double(), rotary=True)
    x, counter = tokens(model, dtype=torch.float64), CompileCounterWithBackend("aot_eager")
    found = generated(model, x, PIECES["single tokens"], torch.compile(step, fullgraph=True, backend=counter))
    torch.testing.assert_close(found, generated(model, x, PIECES["prefill"]))
    assert counter.frame_count == 1


class FromTheHost(TorchDispatchMode):
    """Whether a tensor was made of Python's numbers."""

    seen = False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen |= function is torch.ops.aten.lift_fresh.default
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("positions", [
    {}, {"rotary": True},
    {"alibi": True},
], ids=["none", "rotary", "alibi"])  # fmt: skip
@torch.no_grad()
def test_a_step_copies_nothing_from_the_host(positions):
    """On a GPU it would wait for it, and could not be captured in a CUDA graph."""
    module = swapped(nn.MultiheadAttention(E, HEADS, dtype=torch.float64), "auto", **positions)
    with FromTheHost() as host:
        module(X, X, X, need_weights=False, cache=cache())
    assert not host.seen
