"""The cache of keys and values under whatever sequence of operations, beside plain lists of tokens."""

import copy

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

from seqcore import InvalidInput, UnsupportedInput
from seqcore.functional import attention
from seqcore.nn import KVCache, MultiheadAttention

from .effort import drawn

DOUBLE = {"dtype": torch.float64}
B, KV, N, D, DV = 3, 2, 7, 2, 3

counts = st.lists(st.integers(0, 4), min_size=B, max_size=B)
indices = st.lists(st.integers(0, B - 1), min_size=B, max_size=B)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(0, 4), st.none() | counts),
        st.tuples(st.just("update"), st.integers(0, N + 1), st.none()),
        st.tuples(st.just("reorder"), indices),
        st.tuples(st.just("truncate"), st.integers(0, N + 1) | counts),
        st.tuples(st.just("reset"), st.none() | st.integers(0, B - 1) | st.lists(st.integers(0, B - 1), max_size=4)),
        st.tuples(st.just("copy")),
        st.tuples(st.just("wrong"), st.integers(0, 4)),
    ),
    max_size=12,
)


def vector(value, dtype=torch.int64):
    return torch.tensor(value, dtype=dtype) if isinstance(value, list) else value


class Lists:
    """What a cache is to hold: of each sequence, the keys and values of its tokens."""

    def __init__(self):
        self.tokens = [[] for _ in range(B)]

    def takes(self, M, lengths):
        each = [M] * B if lengths is None else lengths
        return M <= N and max(each) <= M and all(len(t) + n <= N for t, n in zip(self.tokens, each, strict=True))

    def update(self, key, value, lengths):
        for b in range(B):
            for m in range(key.shape[2] if lengths is None else lengths[b]):
                self.tokens[b].append((key[b, :, m], value[b, :, m]))

    def reorder(self, index):
        self.tokens = [list(self.tokens[i]) for i in index]

    def truncate(self, lengths):
        for b in range(B):
            del self.tokens[b][lengths if isinstance(lengths, int) else lengths[b] :]

    def reset(self, index):
        for b in range(B) if index is None else [index] if isinstance(index, int) else index:
            self.tokens[b].clear()


def assert_equal(cache, lists):
    """The cache holds the lists' tokens, and knows of no sequence that is longer than it counts."""
    assert cache.lengths.tolist() == [len(t) for t in lists.tokens]
    assert cache._longest >= max(len(t) for t in lists.tokens)
    for b, tokens in enumerate(lists.tokens):
        for n, (key, value) in enumerate(tokens):
            assert torch.equal(cache.keys[b, :, n], key) and torch.equal(cache.values[b, :, n], value)


def assert_answers(cache, lists):
    """Attention over the cache is that over the lists."""
    query = torch.randn(B, KV, 1, D, **DOUBLE)
    found = attention(query, cache.keys, cache.values, key_lengths=cache.lengths)
    for b, tokens in enumerate(lists.tokens):
        if not tokens:
            assert not found[b].any()
            continue
        key, value = (torch.stack(each, 1) for each in zip(*tokens, strict=True))
        torch.testing.assert_close(found[b], attention(query[b], key, value))


@drawn(30, 1_000, given=operations)
def test_whatever_is_done_to_a_cache(given):
    cache, lists = KVCache(B, KV, N, D, DV, **DOUBLE), Lists()
    for name, *arguments in given:
        if name == "update":
            M, lengths = arguments
            key, value = torch.randn(B, KV, M, D, **DOUBLE), torch.randn(B, KV, M, DV, **DOUBLE)
            if lists.takes(M, lengths):
                cache.update(key, value, vector(lengths))
                lists.update(key, value, lengths)
            else:
                with pytest.raises(InvalidInput, match="got"):
                    cache.update(key, value, vector(lengths))
        elif name == "wrong":
            key = torch.randn(B, KV, arguments[0], D)
            with pytest.raises(InvalidInput, match="like the cache"):
                cache.update(key, key)
        elif name == "copy":
            older, cache = cache, copy.deepcopy(cache)
            older.reset()
        else:
            getattr(cache, name)(*map(vector, arguments))
            getattr(lists, name)(*arguments)
        assert_equal(cache, lists)
    assert_answers(cache, lists)


E, HEADS = 4, 2
steps = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["reference", "aten", "auto"])), max_size=6)


@drawn(20, 500, given=steps)
@torch.no_grad()
def test_a_module_refused_between_steps_goes_on_as_if_never_asked(given):
    module = MultiheadAttention(E, HEADS, batch_first=True, **DOUBLE).eval()
    cache, tokens = KVCache(2, HEADS, 9, E // HEADS, **DOUBLE), torch.empty(2, 0, E, **DOUBLE)
    for M, module.backend in given:
        piece = torch.randn(2, M, E, **DOUBLE)
        before = cache.lengths.clone()
        if module.backend == "aten" or tokens.shape[1] + M > 9:
            with pytest.raises((InvalidInput, UnsupportedInput)):
                module(piece, piece, piece, cache=cache)
            assert torch.equal(cache.lengths, before)
            continue
        tokens = torch.cat([tokens, piece], 1)
        found = module(piece, piece, piece, need_weights=False, cache=cache)[0]
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        whole = module(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(found, whole[:, -M:])


@torch.no_grad()
def test_what_a_backend_refuses_is_not_appended():
    """The module appends before it attends: a refusal took the tokens' room, and another try appended them again."""
    module, piece = MultiheadAttention(E, HEADS, backend="aten"), torch.randn(3, 1, E)
    cache = KVCache(1, HEADS, 3, E // HEADS)
    for _ in range(2):
        with pytest.raises(UnsupportedInput, match="cannot serve"):
            module(piece, piece, piece, cache=cache)
    assert not cache.lengths.any()
    module.backend = "reference"
    module(piece, piece, piece, cache=cache)
    assert cache.lengths.tolist() == [3]
