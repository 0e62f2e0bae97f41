"""Who takes a model elsewhere, TorchScript, ONNX and dynamic quantisation: what works, and what is said otherwise."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

from seqcore import InvalidInput, UnsupportedInput, capabilities
from seqcore.testing.budget import assert_within_budget

from .every_module import EVERY, WIDTH, given, outputs, twin
from .recurrence_twins import CELLS, ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # What torch says of its own tools, and they of themselves.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # Our checks of shapes, whose outcome a trace keeps.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Around(nn.Module):
    """A module inside another, taking x alone and giving a tuple."""

    def __init__(self, inner, **keywords):
        super().__init__()
        self.inner, self.keywords = inner, keywords

    def forward(self, x):
        return tuple(outputs(self.inner, x, **self.keywords))


def around(name, backend=None, **keywords):
    return Around(ours(twin(name).eval(), backend), **keywords).eval()


# --- TorchScript ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_scripting_says_what_to_do(name):
    module = ours(twin(name), None)
    for model in (module, nn.Sequential(nn.Linear(WIDTH, WIDTH), module)):
        with pytest.raises(UnsupportedInput, match=rf"cannot compile seqcore\.nn\.{type(module).__name__},.*restore"):
            torch.jit.script(model)


@pytest.mark.parametrize("name", EVERY)
def test_a_trace_holds_torchs_operators_for_any_size(name):
    model = around(name, **{"need_weights": False} if name == "attention" else {})
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, given(name)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for x in (given(name), given(name, T=7, B=5)):
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name, zoneout", [*((name, 0.0) for name in CELLS), ("rnn_relu", 0.3), ("lstm", (0.7, 0.3))])
def test_a_trace_of_the_reference_is_for_its_own_length(name, zoneout):
    model = around(name, "reference")
    model.inner.zoneout = zoneout
    x = given(name)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    for T in (2, 7):
        with pytest.raises(RuntimeError):
            traced(given(name, T=T))


@pytest.mark.parametrize("name", EVERY)
def test_kernels_asked_for_by_name_are_not_traced(name):
    with pytest.raises(UnsupportedInput, match="TorchScript and ONNX cannot hold a kernel"):
        torch.jit.trace(around(name, "triton"), given(name))


# --- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_what_is_exported_to_onnx_holds_no_operator_of_ours(name, monkeypatch):
    """As the exporter sees it, which need not be installed."""
    monkeypatch.setattr(capabilities, "_to_onnx", lambda: True)
    program = torch.export.export(around(name), (given(name),), strict=False)
    assert not [node for node in program.graph.nodes if "seqcore" in str(node.target)]


def test_a_projection_is_not_left_to_torchs_exporter(monkeypatch):
    """Where we are told that it exports: it captures by Dynamo, which does not tell, what it could not otherwise."""
    monkeypatch.setattr(capabilities, "_to_onnx", lambda: True)
    with pytest.raises(UnsupportedInput, match="torch exports it to ONNX as an LSTM without its projection"):
        torch.export.export(around("lstm_proj", "aten"), (given("lstm_proj"),), strict=False)


@pytest.fixture
def quiet():
    """The exporter names every operator of packages that are not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def check_onnx(model, x):
    """What ONNX's own evaluator makes of the exported model is what the model does; returns the names of operators."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="what exports to ONNX is not installed")
    proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    evaluator = onnx.reference.ReferenceEvaluator(proto)
    found = evaluator.run(None, {proto.graph.input[0].name: x.numpy()})
    exact, eager = copy.deepcopy(model).double()(x.double()), model(x)
    for values in zip(map(torch.from_numpy, found), exact, eager, strict=True):
        assert_within_budget(*values)
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("name", EVERY)
def test_onnx(name, quiet):
    operators = check_onnx(around(name), given(name))
    assert name not in ("gru", "lstm") or name.upper() in operators


@pytest.mark.parametrize("what", ["lengths", "zoneout"])
def test_onnx_of_what_torch_lacks_is_unrolled(what, quiet):
    model = around("lstm", **{"lengths": torch.tensor([3, 1])} if what == "lengths" else {})
    model.inner.zoneout = (0.7, 0.3) if what == "zoneout" else 0.0
    assert "LSTM" not in check_onnx(model, given("lstm"))


# --- torch.fx ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("attention")])
def test_symbolic_tracing_takes_modules_of_ours_as_leaves(name):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return type(module).__module__.startswith("seqcore.") or super().is_leaf_module(module, path)

    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), around(name).inner), given(name)
    with pytest.raises(InvalidInput, match="got Proxy"):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert all(torch.equal(a, b) for a, b in zip(outputs(traced, x), outputs(model, x), strict=True))


# --- dynamic quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_dynamic_quantisation_passes_our_modules_by(name):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), around(name)).eval()
    x = given(name)
    quantized = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    inner = quantized[1].inner
    assert type(inner) is type(model[1].inner) and type(quantized[0]) is not nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(quantized[1](x), model[1](x), strict=True))
