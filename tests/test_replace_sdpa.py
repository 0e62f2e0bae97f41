"""torch's scaled_dot_product_attention served by seqcore's within a context."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import seqcore
from seqcore import functional, replace_sdpa, use_backend

from .attention_twins import OUTPUTS, qkv, results, seen
from .comparisons import assert_equal_in_float64
from .compile_twins import Capture

pytestmark = [
    # Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

M, N = 5, 7


def sdpa(*tensors, **options):
    return F.scaled_dot_product_attention(*tensors, **options)


@pytest.fixture
def served(monkeypatch):
    """The backend that each call to seqcore was made with."""
    backends, function = [], functional.scaled_dot_product_attention

    def recording(*tensors, backend, **options):
        backends.append(backend)
        return function(*tensors, backend=backend, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recording)
    return backends


CALLS = {
    "plain": {},
    "causal, scaled": {"is_causal": True, "scale": 0.3},
    "mask": {"attn_mask": seen(M, N, lambda m, n: n != m)},
    "bias": {"attn_mask": torch.randn(1, 4, M, N, dtype=torch.float64, requires_grad=True)},
    "groups": {"heads_kv": 2, "enable_gqa": True},
}


@pytest.mark.parametrize("backend", [None, "reference", "aten"])
@pytest.mark.parametrize("call", CALLS)
def test_results_and_gradients(call, backend, served):
    options = dict(CALLS[call])
    tensors = qkv(2, 4, heads_kv=options.pop("heads_kv", None), M=M, N=N, dtype=torch.float64)
    expected = results(sdpa, *tensors, **options)
    assert not served
    with replace_sdpa(backend):
        # Backward runs inside `results`, and so inside the context; the choice is forward's.
        actual = results(sdpa, *tensors, **options)
    assert served == [backend]
    assert_equal_in_float64(actual, expected)
    assert sdpa(*tensors, **options).equal(expected[OUTPUTS[0]]) and len(served) == 1


def test_the_same_dropout_under_the_same_seed():
    tensors = qkv(2, 4)

    def seeded():
        torch.manual_seed(1)
        return sdpa(*tensors, dropout_p=0.5)

    expected = seeded()
    with replace_sdpa():
        assert torch.equal(seeded(), expected)


def chosen(*tensors, **options) -> list[str]:
    return [found.chosen for found in seqcore.explain(sdpa, *tensors, **options)]


def test_the_innermost_context_serves_and_the_outer_ones_come_back():
    tensors = qkv(2, 4)
    with use_backend("reference"):
        with replace_sdpa():
            assert chosen(*tensors) == ["reference"]
            # torch's own function, called by the backend, is not served again by the context around.
            with replace_sdpa("aten"):
                assert chosen(*tensors) == ["aten"]
                with use_backend("triton"):
                    assert chosen(*tensors) == ["aten"]
            assert chosen(*tensors) == ["reference"]
        assert chosen(*tensors) == []


def test_an_error_inside_leaves_the_context_in_order():
    tensors = qkv(2, 4)
    with replace_sdpa("triton"), pytest.raises(seqcore.UnsupportedInput, match="needs a GPU"):
        sdpa(*tensors)
    with replace_sdpa():
        assert chosen(*tensors) == ["aten"]
    with pytest.raises(seqcore.InvalidInput, match="unknown backend: got 'cudnn'"), replace_sdpa("cudnn"):
        raise AssertionError("entered")


def test_checkpoints_take_the_context_inside(served):
    tensors = qkv(2, 4, dtype=torch.float64)
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, sdpa, use_reentrant=False)
    inside = functools.partial(checkpoint, context_fn=lambda: (replace_sdpa("reference"), replace_sdpa("reference")))
    assert_equal_in_float64(results(inside, *tensors), results(sdpa, *tensors))
    assert served == ["reference"] * 2
    # Backward is a function that torch takes the mode off for.
    with replace_sdpa("reference"), pytest.raises(torch.utils.checkpoint.CheckpointError):
        results(checkpoint, *tensors)


def test_other_threads_are_not_served(served):
    tensors = qkv(2, 4)
    with replace_sdpa():
        thread = threading.Thread(target=sdpa, args=tensors)
        thread.start()
        thread.join()
    assert not served


def nested() -> tuple[torch.Tensor, ...]:
    return (torch.nested.nested_tensor([torch.randn(2, length, 6) for length in (5, 3)]),) * 3


# What torch takes and we refuse.
REFUSED = {
    "nested tensors": (nested, {}),
    "no features": (lambda: (torch.randn(2, 5, 0), torch.randn(2, 7, 0), torch.randn(2, 7, 6)), {}),
    "a flag as probability": (lambda: qkv(2), {"dropout_p": False}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_refuse_is_torchs_under_auto_only(case):
    make, options = REFUSED[case]
    tensors = make()
    expected = sdpa(*tensors, **options)
    with replace_sdpa():
        actual = sdpa(*tensors, **options)
        with use_backend("aten"), pytest.raises(seqcore.InvalidInput):
            sdpa(*tensors, **options)
    with replace_sdpa("reference"), pytest.raises(seqcore.InvalidInput):
        sdpa(*tensors, **options)
    for a, e in zip(actual.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, e)


def test_what_torch_refuses_too_raises_torchs_error():
    query, key, value = qkv(2)
    with pytest.raises(RuntimeError) as theirs:
        sdpa(query, key.double(), value)
    with replace_sdpa(), pytest.raises(RuntimeError) as ours:
        sdpa(query, key.double(), value)
    assert str(ours.value) == str(theirs.value)


def test_torchs_own_multi_head_attention_is_for_replace(served):
    module, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    with replace_sdpa():
        module(x, x, x, need_weights=False)
        assert not served
    seqcore.replace(module)
    assert [found.chosen for found in seqcore.explain(module, x, x, x, need_weights=False)] == ["aten"]


# --- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_compiles_whole(inside):
    torch._dynamo.reset()
    tensors = qkv(2, 4, dtype=torch.float64)

    def entering(*tensors, **options):
        with replace_sdpa():
            return sdpa(*tensors, **options)

    capture = Capture()
    function = torch.compile(entering if inside else sdpa, backend=capture, fullgraph=True)
    expected = results(sdpa, *tensors, is_causal=True)
    if inside:
        actual = results(function, *tensors, is_causal=True)
    else:
        with replace_sdpa():
            actual = results(function, *tensors, is_causal=True)
    assert_equal_in_float64(actual, expected)
    assert capture.forward == [["attention_forward"]]


def test_compiled_code_follows_the_context():
    torch._dynamo.reset()
    tensors, capture = qkv(2, 4), Capture()
    function = torch.compile(sdpa, backend=capture, fullgraph=True)
    for backend, count in ((None, 1), ("aten", 2), ("reference", 3)):
        with replace_sdpa(backend):
            function(*tensors)
        assert len(capture.forward) == count
    function(*tensors)
    with replace_sdpa():
        function(*tensors)
    assert capture.forward == [["attention_forward"], [], [], []]
