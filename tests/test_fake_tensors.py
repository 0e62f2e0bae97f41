"""Under torch's FakeTensorMode, as in planning a model's memory: shapes, and no value that could be looked at."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from seqcore import functional, nn

from .attention_twins import qkv
from .recurrence_twins import tensors


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrences_with_lengths(cell, backend):
    y, states = cell(3, 4, backend=backend)(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
    assert y.shape == (5, 2, 4) and {t.shape for t in tensors(states)} == {(1, 2, 4)}


@pytest.mark.parametrize("name", ["query_lengths", "key_lengths"])
def test_attention_with_lengths(name):
    assert functional.attention(*qkv(2, 2), **{name: torch.tensor([3, 5])}).shape == (2, 2, 5, 6)


def test_attention_over_packed_sequences():
    ends = {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 7])}
    assert functional.attention(*qkv(2), **ends).shape == (2, 5, 6)


def test_caches():
    cache = nn.KVCache(2, 2, 8, 6)
    for lengths in (None, torch.tensor([3, 1])):
        keys, *_ = cache.update(*qkv(2, 2, M=3, N=3)[1:], lengths)
        assert keys.shape == (2, 2, 8, 6)
    cache.reorder(torch.tensor([1, 1]))
    cache.truncate(torch.tensor([1, 2]))
    cache.reset(torch.tensor([0]))


def test_positions():
    x = torch.randn(4, 2, 6)
    assert nn.LearnedPositions(9, 6)(x, torch.tensor([0, 3])).shape == x.shape
