"""Memory that runs out, at each allocation in turn: torch's error, and all works again."""

import pytest
import torch
from torch import nn

import seqcore
from seqcore import functional
from seqcore.devices import INTERPRETED
from seqcore.kernels.tuning import Device
from seqcore.nn import KVCache
from seqcore.testing.launches import noted_for

from .attention_twins import features, kernels, qkv
from .attention_twins import results as attention_results
from .effort import effort
from .exhaustion import assert_recovers, failures
from .recurrence_twins import differing, masks, ours, packed, problem, results

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("kind", ["plain", "everything", "averaged weights"])
def test_attention_runs_out_of_memory(kind, by_the_operators):
    options = features(2, 2, 5, 7)["everything" if kind == "everything" else "plain"]
    if kind == "averaged weights":
        options |= {"return_weights": "average", "causal": "top_left"}
    tensors = qkv(2, 2, heads_kv=1)
    assert_recovers(
        lambda: attention_results(functional.attention, *tensors, return_lse=True, enable_gqa=True, **options), 20
    )


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_other_backends_run_out_of_memory(backend):
    tensors = qkv(2, 2)

    def run():
        with seqcore.use_backend(backend):
            return attention_results(functional.attention, *tensors, causal="top_left")

    assert_recovers(run, 3)


RECURRENCES = {
    "lstm": ("lstm", {"num_layers": 2, "dropout": 0.5}, {"grad_clip": 0.1}, "padded"),
    "gru": ("gru", {}, {"recompute": True, "zoneout": 0.3}, "masked"),
    "lstm_proj": ("lstm_proj", {"bidirectional": True}, {}, "packed"),
    "rnn_tanh": ("rnn_tanh", {}, {}, "masked"),
}


def recurrence(name):
    """A run of the module."""
    cell, options, own, form = RECURRENCES[name]
    twin, x, hx = problem(cell, T=4, H=4, **options)
    module = ours(twin, None, **own).train()
    x = packed(x, [2, 4, 1, 4, 3]) if form == "packed" else x

    def run():
        # What is drawn is aside.
        torch.manual_seed(0)
        return results(module, x, hx, **(masks() if form == "masked" else {}))

    return run


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences_run_out_of_memory(name, by_the_operators):
    assert_recovers(recurrence(name), 50)


@pytest.mark.parametrize("name", ["attention", *RECURRENCES])
def test_what_launches_kernels_runs_out_of_memory(name, by_the_operators):
    """What the operators do before and after launches, none of which runs."""
    options = {**features(2, 2, 5, 7)["everything"], "return_lse": True}
    attention = lambda: attention_results(functional.attention, *qkv(2, 2), **options)
    run = attention if name == "attention" else recurrence(name)
    with noted_for(Device("sm_90")) as launched:
        assert failures(run, step=effort(4, 1)) > 20
    assert len(launched) > 10


@pytest.mark.parametrize("kind", [seqcore.nn.MultiheadAttention, seqcore.nn.LSTMCell], ids=lambda kind: kind.__name__)
def test_modules_run_out_of_memory(kind, by_the_operators):
    x = torch.randn(3, 8, requires_grad=True)
    module = kind(8, 2)

    def run():
        out = (module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x))[0]
        return {"out": out, "gradient": torch.autograd.grad(out.sum(), x)[0]}

    assert_recovers(run, 10)


TOKENS = qkv(3, 4, heads_kv=2, M=2, N=2, D=6, DV=5)[1:]
CHANGES = {
    "update": lambda cache: cache.update(*TOKENS),
    "ragged update": lambda cache: cache.update(*TOKENS, torch.tensor([2, 0, 1])),
    "reset": lambda cache: cache.reset(torch.tensor([2, 0])),
    "reset of one": lambda cache: cache.reset(1),
    "reset of all": lambda cache: cache.reset(),
    "reorder": lambda cache: cache.reorder(torch.tensor([2, 0, 0])),
    "truncate": lambda cache: cache.truncate(torch.tensor([1, 3, 0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_runs_out_of_memory(change):
    """Whatever fails, it holds what it held, and then does what one does that never failed."""
    caches = [KVCache(3, 2, 12, 6, 5) for _ in range(2)]
    for cache in caches:
        cache.update(*TOKENS, torch.tensor([1, 2, 2]))
        cache.update(*TOKENS)
    failed, other = caches

    def held():
        """Keys and values of all tokens, and how many there are."""
        lengths = failed.lengths.tolist()
        return [(n, *(t[b, :, :n].tolist() for t in (failed.keys, failed.values))) for b, n in enumerate(lengths)]

    assert failures(lambda: CHANGES[change](failed), held) >= (change in ("reorder", "update"))
    CHANGES[change](other)
    assert all(torch.equal(a, b) for a, b in zip(failed.buffers(), other.buffers(), strict=True))


@pytest.mark.kernels
@pytest.mark.unfilled
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's launches are left out")
@pytest.mark.parametrize("name", ["attention", "recurrence"])
def test_what_ran_out_of_memory_runs_again(name, monkeypatch):
    from triton.runtime import interpreter

    twin, x, hx = problem("lstm", T=2, B=3, H=3, bidirectional=True)
    module, tensors = ours(twin, "triton", recompute=True), qkv(2, 2, M=3, N=5)
    run = {
        "attention": lambda: attention_results(kernels, *tensors, return_weights="average"),
        "recurrence": lambda: results(module, x, hx),
    }[name]
    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
        assert failures(run, step=effort(4, 1)) > 20
    assert not differing(run(), expected)
