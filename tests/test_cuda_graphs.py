"""What runs without copies from the host can be captured in a CUDA graph.

Single steps, padded and ragged sequences; attention, and generation token by token with a cache.
"""

import pytest
import torch
from torch import nn

from seqcore.devices import INTERPRETED
from seqcore.functional import attention
from seqcore.nn import KVCache

from .recurrence_twins import ours
from .transformer_twins import caches, step, swapped

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(INTERPRETED, reason="needs a GPU")]


def calls(device):
    """Functions of x by name, each of a module that holds its weights and state."""
    h = torch.randn(5, 64, device=device), torch.randn(5, 64, device=device)
    lengths = torch.tensor([4, 1, 3, 0, 2], device=device)
    cell, layer = (ours(kind(8, 64, device=device), "triton") for kind in (nn.LSTMCell, nn.LSTM))
    return {
        "cell": lambda x: cell(x[0], h),
        "sequence": lambda x: layer(x)[1],
        "ragged": lambda x: layer(x, lengths=lengths)[1],
    }


def captured(run):
    """``run()`` in a graph, and what it returned there; it has run before, so that all is compiled."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


@pytest.mark.parametrize("name", ["cell", "sequence", "ragged"])
@torch.no_grad()
def test_replay_follows_its_input(name, device):
    run, x = calls(device)[name], torch.randn(4, 5, 8, device=device)
    run(x)  # compiles
    graph, replayed = captured(lambda: run(x))
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for found, expected in zip(replayed, run(x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@torch.no_grad()
def test_attention_with_dropout_replays_with_new_seeds(weights, device):
    module = swapped(nn.MultiheadAttention(64, 4, dropout=0.5, device=device), "triton")
    x, found = torch.randn(9, 2, 64, device=device), []
    run = lambda: module(x, x, x, need_weights=weights)[0]
    run()
    graph, out = captured(run)
    for _ in range(2):
        graph.replay()
        found.append(out.clone())
    assert not torch.equal(*found)


@pytest.mark.parametrize("lengths", [(0, 0), (3, 1)], ids=["", "ragged"])
@torch.no_grad()
def test_decoding_replays_as_the_cache_fills(lengths, device):
    """One query a sequence, groups of heads, sequences of different lengths."""
    q, k, v = (torch.randn(2, heads, 1, 32, device=device) for heads in (4, 2, 2))
    kept, twin, spare = (KVCache(2, 2, 9, 32, device=device) for _ in range(3))
    for each in (kept, twin):
        each.lengths.copy_(torch.tensor(lengths))

    def run(cache):
        keys, values, key_lengths = cache.update(k, v)
        options = {"key_lengths": key_lengths, "causal": "lower_right", "enable_gqa": True, "backend": "triton"}
        return attention(q, keys, values, **options)

    run(spare)
    graph, out = captured(lambda: run(kept))
    for _ in range(9 - max(lengths)):
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert torch.equal(out, run(twin))
    assert torch.equal(kept.lengths, twin.lengths)


@pytest.mark.parametrize("positions", [{}, {"rotary": True}, {"alibi": True}], ids=["", "rotary", "alibi"])
@torch.no_grad()
def test_a_model_generates_by_replays(positions, device):
    layer = nn.TransformerEncoderLayer(64, 4, 96, device=device)
    model = swapped(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), "triton", **positions)
    prompt, x = torch.randn(4, 3, 64, device=device), torch.randn(1, 3, 64, device=device)
    kept, twin, spare = (caches(model, 3, 9) for _ in range(3))
    for each in (kept, twin):
        step(model, prompt, each)
    step(model, x, spare)
    graph, out = captured(lambda: step(model, x, kept))
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, step(model, x, twin))
