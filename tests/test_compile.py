"""Every module of seqcore.nn in torch.compile and torch.export: one graph of seqcore's operators for all sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from seqcore import nn

from .comparisons import Results, assert_equal_in_float64, cotangents
from .compile_twins import Capture, Sizes, operators
from .recurrence_twins import tensors

pytestmark = [
    # Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

I, H, E, HEADS = 4, 6, 8, 2
DOUBLE = {"dtype": torch.float64}
OPEN = [(7, 5), (4, 3), (12, 17), (6, 6), (3, 2)]
ONES = [(1, 5), (7, 1), (1, 1), (2, 2)]


class Case(NamedTuple):
    """A module, its inputs by name for given sizes, and what of seqcore's operators its graphs hold."""

    module: Callable[[], torch.nn.Module]
    inputs: Callable[[Sizes], dict[str, Any]]
    forward: tuple[str, ...] = ()


def packed(of: Sizes) -> PackedSequence:
    T, B = of.sizes["T"], of.sizes["B"]
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T
    data, sizes, order, back = pack_padded_sequence(torch.randn(T, B, I, **DOUBLE), lengths, enforce_sorted=False)
    data, sizes = of.marked(data.requires_grad_(), "R"), of.marked(sizes, "steps")
    return PackedSequence(data, sizes, of.marked(order, "B"), of.marked(back, "B"))


def alone(x: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(("query", "key", "value"), x)


def across(of: Sizes) -> dict[str, Tensor]:
    return {"query": of("T", "B", E), "key": of("N", "B", E), "value": of("N", "B", E)}


LAYER, ATTENTION = ("recurrence_forward",), ("attention_forward",)
WEIGHTS = (*ATTENTION, "attention_weights")
CASES = {
    "rnn_tanh": Case(lambda: nn.RNN(I, H, **DOUBLE), lambda of: {"input": of("T", "B", I)}, LAYER),
    "rnn_relu": Case(
        lambda: nn.RNN(I, H, nonlinearity="relu", bidirectional=True, batch_first=True, **DOUBLE),
        lambda of: {"input": of("B", "T", I), "hx": of(2, "B", H), "lengths": of.counts("T", "B")},
        LAYER,
    ),
    "gru": Case(
        lambda: nn.GRU(I, H, 2, bidirectional=True, **DOUBLE),
        lambda of: {"input": of("T", "B", I), "reset": of.bools("T", "B"), "lengths": of.counts("T", "B")},
        LAYER * 2,
    ),
    "gru packed": Case(
        lambda: nn.GRU(I, H, **DOUBLE), lambda of: {"input": packed(of), "hx": of(1, "B", H)}, LAYER
    ),
    "lstm": Case(
        lambda: nn.LSTM(I, H, batch_first=True, recompute=True, grad_clip=0.1, **DOUBLE),
        lambda of: {
            "input": of("B", "T", I), "hx": (of(1, "B", H), of(1, "B", H)), "reset": of.bools("B", "T"),
            "reset_hx": (of(1, "B", H), of(1, "B", H)), "return_cells": True,
        },
        LAYER,
    ),
    "lstm_proj": Case(
        lambda: nn.LSTM(I, H, 2, proj_size=3, **DOUBLE),
        lambda of: {"input": of("T", "B", I), "hx": (of(2, "B", 3), of(2, "B", H))},
        LAYER * 2,
    ),
    "rnn_cell": Case(lambda: nn.RNNCell(I, H, **DOUBLE), lambda of: {"input": of("B", I)}, LAYER),
    "gru_cell": Case(lambda: nn.GRUCell(I, H, **DOUBLE), lambda of: {"input": of("B", I), "hx": of("B", H)}, LAYER),
    "lstm_cell": Case(
        lambda: nn.LSTMCell(I, H, **DOUBLE),
        lambda of: {"input": of("B", I), "hx": (of("B", H), of("B", H))},
        LAYER,
    ),
    "attention": Case(lambda: nn.MultiheadAttention(E, HEADS, **DOUBLE), lambda of: alone(of("T", "B", E)), WEIGHTS),
    "attention masked": Case(
        lambda: nn.MultiheadAttention(E, HEADS, add_bias_kv=True, add_zero_attn=True, **DOUBLE),
        lambda of: {
            **across(of), "key_padding_mask": of.bools("B", "N"), "attn_mask": of("T", "N"), "need_weights": False,
        },
        ATTENTION,
    ),
    "attention causal": Case(
        lambda: nn.MultiheadAttention(E, HEADS, batch_first=True, **DOUBLE),
        lambda of: {
            **alone(of("B", "T", E)), "attn_mask": of.bools("T", "T"), "is_causal": True, "need_weights": False,
        },
        ATTENTION,
    ),
    "attention by position": Case(
        lambda: nn.MultiheadAttention(E, HEADS, rotary=nn.RotaryPositions(E // HEADS), alibi=True, **DOUBLE),
        lambda of: {**alone(of("T", "B", E)), "need_weights": False},
        ATTENTION,
    ),
    "attention of each head": Case(
        lambda: nn.MultiheadAttention(E, HEADS, **DOUBLE),
        lambda of: {**alone(of("T", "B", E)), "average_attn_weights": False},
        ATTENTION,
    ),
    "rotary": Case(
        lambda: nn.RotaryPositions(E), lambda of: {"x": of("B", HEADS, "T", E), "start": of.counts("T", "B")}
    ),
    "sinusoidal": Case(lambda: nn.SinusoidalPositions(E, batch_first=True), lambda of: {"x": of("B", "T", E)}),
    "learned": Case(
        lambda: nn.LearnedPositions(40, E, **DOUBLE), lambda of: {"x": of("T", "B", E), "start": of.counts("T", "B")}
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sizes(T: int, B: int, mark: str = "static") -> Sizes:
    return Sizes(mark, T=T, B=B, N=T + 2)


def results(function: Callable[..., Any], module: torch.nn.Module, inputs: dict[str, Any]) -> Results:
    """Every output of ``function``, which is ``module`` or compiled of it, and every gradient of a weighing of them."""
    leaves = [t for value in inputs.values() if not isinstance(value, bool) for t in tensors(value)]
    leaves = [t for t in leaves if t.requires_grad] + list(module.parameters())
    outputs = tensors(function(**inputs))
    gradients = torch.autograd.grad(outputs, leaves, cotangents(outputs), materialize_grads=True)
    found = {f"output {i}": out for i, out in enumerate(outputs)}
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def backward_of(forward: tuple[str, ...]) -> list[str]:
    names = {"attention_weights": "attention_weights_backward"}
    return [names.get(name, name.replace("forward", "backward")) for name in reversed(forward)]


# --- one compile for all sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["dynamic", "unbacked"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_length_and_batch(name, mark):
    # Inductor takes its time, and over the weights of each head, plain PyTorch, most of all.
    case, capture = CASES[name], Capture(inductor=mark == "dynamic" and name != "attention of each head")
    module = case.module()
    run = torch.compile(module, fullgraph=True, backend=capture)
    for size in OPEN + ONES * (mark == "unbacked"):
        inputs = case.inputs(sizes(*size, mark))
        assert_equal_in_float64(results(run, module, inputs), results(module, module, inputs))
    assert capture.forward == [list(case.forward)]
    assert capture.backward == [backward_of(case.forward)]


AFTER = {None: (1, 2, 2, 2, 2, 3, 4, 5, 5), True: (1, 1, 1, 1, 1, 2, 3, 4, 4)}


@pytest.mark.parametrize("dynamic", AFTER)
def test_torch_itself_compiles_sizes_of_1_apart_and_by_default_the_first_size(dynamic):
    capture, found = Capture(), []
    run = torch.compile(CASES["rnn_tanh"].module(), fullgraph=True, dynamic=dynamic, backend=capture)
    for size in OPEN + ONES:
        run(**CASES["rnn_tanh"].inputs(sizes(*size)))
        found.append(len(capture.forward))
    assert tuple(found) == AFTER[dynamic]


def test_a_flip_of_mode_compiles_once_more():
    case, capture = CASES["rnn_tanh"], Capture()
    module = case.module()
    run = torch.compile(module, fullgraph=True, backend=capture)
    for training in (True, False, True, False):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                run(**case.inputs(sizes(7, 5, "dynamic")))
        module.train(not training)
    assert len(capture.forward) == 4


def test_no_steps_are_refused_when_a_graph_that_left_them_open_runs():
    run = torch.compile(nn.GRU(I, H), fullgraph=True, backend=Capture())
    x = torch.randn(3, 2, I)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    run(x)
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        run(x[:0])


def test_generation_compiles_once_on_inductor():
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, **DOUBLE).eval()
    cache, twin = (nn.KVCache(3, HEADS, 9, E // HEADS, **DOUBLE) for _ in range(2))
    capture = Capture(inductor=True)
    run = torch.compile(module, fullgraph=True, backend=capture)
    with torch.no_grad():
        for M in (4, 2, 3):
            x = torch.randn(3, M, E, **DOUBLE)
            torch._dynamo.mark_dynamic(x, 1)
            found, expected = (f(x, x, x, need_weights=False, cache=c)[0] for f, c in ((run, cache), (module, twin)))
            torch.testing.assert_close(found, expected)
    assert capture.forward == [list(ATTENTION)] and torch.equal(cache.lengths, twin.lengths)


# --- export --------------------------------------------------------------------------------------------------------


# `dynamic_shapes` cannot be spelt for a PackedSequence.
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "gru packed"])
def test_an_exported_program_serves_every_length_and_batch(name, strict):
    case, of = CASES[name], sizes(7, 5)
    module, inputs = case.module().eval(), case.inputs(of)
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=of.dynamic_shapes(inputs), strict=strict)
    assert operators(program.graph_module) == list(case.forward)
    run = program.module()
    for size in OPEN[-2:]:
        inputs = case.inputs(sizes(*size))
        torch.testing.assert_close(tensors(run(**inputs)), tensors(module(**inputs)))


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_a_strict_export_that_may_be_differentiated_shows_the_operators_when_decomposed(name):
    case = CASES[name]
    program = torch.export.export(case.module(), (), case.inputs(sizes(7, 5)), strict=True)
    assert operators(program.graph_module) == []
    assert operators(program.run_decompositions().graph_module) == list(case.forward)
