"""torch.compile of the recurrences: one graph, one node a layer; every option, backend and transform."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import seqcore
from seqcore import functional, use_backend

from .comparisons import assert_equal_in_float64
from .compile_twins import Capture
from .recurrence_twins import SINGLE, assert_alike, ours, packed, problem, results

MODULES = {
    "rnn_tanh": {},
    "rnn_relu": {"bidirectional": True},
    "gru": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "lstm": {"num_layers": 2, "bias": False},
    "lstm_proj": {"num_layers": 2, "bidirectional": True},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # What torch's own compiler does to itself.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(twin, backend="aot_eager", **options):
    """seqcore's module with the weights of ``twin``, compiled in place and in one graph."""
    module = ours(twin, None)
    module.compile(fullgraph=True, backend=backend, **options)
    return module


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", MODULES)
def test_one_graph_forward_and_backward(cell):
    twin, x, hx = problem(cell, **MODULES[cell])
    assert_alike(compiled(twin), twin, x, hx)


@pytest.mark.parametrize("cell", SINGLE)
def test_cells(cell):
    kind, options = SINGLE[cell]
    twin, x, h = kind(4, 31, **options), torch.randn(5, 4), torch.randn(5, 31)
    hx = (h, torch.randn(5, 31)) if cell == "lstm" else h
    module = compiled(twin)
    assert_alike(module, twin, x, hx)
    assert_alike(module, twin, x[0])


@pytest.mark.parametrize("lengths", [[3, 3, 2, 1, 1], [1, 3, 2, 3, 1]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("given", [True, False], ids=["hx_given", "hx_default"])
def test_packed(lengths, given):
    twin, x, hx = problem("lstm", bidirectional=True)
    assert_alike(compiled(twin), twin, packed(x, lengths), hx if given else None)


def test_packed_with_a_state_of_another_batch_is_refused_when_it_runs():
    twin, x, hx = problem("gru")
    with pytest.raises(seqcore.InvalidInput, match=r"5 sequences and 10 rows .* got 4 and 10"):
        compiled(twin)(packed(x, [3, 3, 2, 1, 1]), hx[:, :4])


def test_masks():
    twin, x, hx = problem("gru", T=5, bidirectional=True, dtype=torch.float64)
    masks = {"lengths": torch.tensor([5, 2, 0, 1, 4]), "reset": torch.rand(5, 5) < 0.4}
    assert_equal_in_float64(results(compiled(twin), x, hx, **masks), results(ours(twin, "reference"), x, hx, **masks))


def test_parametrized_weights():
    twin, x, _ = problem("lstm", dtype=torch.float64)
    module = ours(twin, None)
    for each in (twin, module):
        nn.utils.parametrizations.weight_norm(each, "weight_hh_l0")
    module.compile(fullgraph=True, backend="aot_eager")
    assert_equal_in_float64(results(module, x), results(twin, x))


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cell", MODULES)
def test_inference(cell, without_gradient):
    twin, x, hx = problem(cell, **MODULES[cell])
    with without_gradient():
        torch.testing.assert_close(compiled(twin)(x, hx), twin(x, hx))


def test_frozen_weights():
    twin, x, _ = problem("gru")
    module = compiled(twin.requires_grad_(False))
    torch.testing.assert_close(module(x), twin(x))
    module(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None


# --- the graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", MODULES)
def test_a_layer_is_one_node_whatever_the_length(cell):
    capture = Capture()
    twin, x, hx = problem(cell, T=17, **MODULES[cell])
    results(compiled(twin, capture), x, hx)
    assert capture.forward == [["recurrence_forward"] * twin.num_layers]
    assert capture.backward == [["recurrence_backward"] * twin.num_layers]


def test_a_step_is_one_node():
    capture = Capture()
    module = compiled(nn.LSTMCell(4, 3), capture)
    results(module, torch.randn(5, 4))
    assert capture.forward == [["recurrence_forward"]]
    assert capture.backward == [["recurrence_backward"]]


def test_other_lengths_of_packed_sequences_compile_once_more_at_most():
    counter = CompileCounterWithBackend("aot_eager")
    twin, x, _ = problem("gru")
    module = compiled(twin, counter)
    for lengths in ([3, 3, 2, 1, 1], [3, 2, 2, 1, 1], [3, 3, 3, 3, 1], [2, 2, 2, 2, 2]):
        assert_alike(module, twin, packed(x, lengths))
    assert counter.frame_count <= 3


# --- backends ------------------------------------------------------------------------------------------------------


def test_backend_chosen_inside():
    twin, x, _ = problem("gru")
    module, capture = ours(twin, None), Capture()

    @torch.compile(fullgraph=True, backend=capture)
    def run(x):
        with use_backend("reference"):
            y, _ = module(x)
        return module(y[..., :4])

    expected = ours(twin, "reference")
    torch.testing.assert_close(run(x), expected(expected(x)[0][..., :4]))
    assert capture.forward == [["recurrence_forward"]]


def test_backend_chosen_outside_recompiles():
    twin, x, _ = problem("gru")
    capture = Capture()
    module = compiled(twin, capture)
    module(x)
    with use_backend("reference"):
        module(x)
    module(x)
    assert capture.forward == [["recurrence_forward"], []]


def test_named_backend_that_cannot_serve_is_named_in_the_error():
    twin, x, _ = problem("gru")
    module = ours(twin, "triton")
    with pytest.raises(Exception, match="needs a GPU, got cpu tensors"):
        torch.compile(module, backend="aot_eager")(x)
    with pytest.raises(seqcore.InvalidInput, match="Expected 4, got 3"):
        torch.compile(ours(twin, None), backend="aot_eager")(x[..., :3])


def test_functional_form():
    twin, x, hx = problem("lstm")
    run = torch.compile(functional.lstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, hx, list(twin.parameters())), twin(x, hx))


TRANSFORMS = {
    "grad": lambda loss: torch.func.grad(loss),
    "vmap": lambda loss: torch.func.vmap(loss, in_dims=1),
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss), in_dims=1),
    "jvp": lambda loss: lambda x: torch.func.jvp(loss, (x,), (x,))[1],
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_inside(transform):
    twin, x, _ = problem("lstm", dtype=torch.float64)
    capture, transformed = Capture(), TRANSFORMS[transform]
    module, reference = ours(twin, None), ours(twin, "reference")
    run = torch.compile(transformed(lambda x: module(x)[0].square().sum()), fullgraph=True, backend=capture)
    torch.testing.assert_close(run(x), transformed(lambda x: reference(x)[0].square().sum())(x))
    assert not any(capture.forward)
