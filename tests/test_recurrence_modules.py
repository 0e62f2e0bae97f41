"""seqcore.nn's recurrences in place of torch.nn's: same results, constructors and behaviour, on every backend."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import seqcore
from seqcore import use_backend

from .comparisons import assert_equal_in_float64
from .recurrence_twins import (
    CELLS,
    FLAGS,
    SINGLE,
    assert_alike,
    mapped,
    ours,
    packed,
    problem,
    results,
    tensors,
    torch_module,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

BACKENDS = ["aten", "reference", "auto"]


# --- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_flag(cell, backend, flags):
    twin, x, hx = problem(cell, T=7, **FLAGS[flags])
    assert_alike(ours(twin, backend), twin, x, hx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(cell, backend, dtype):
    twin, x, hx = problem(cell, dtype=dtype, bidirectional=True)
    assert_alike(ours(twin, backend), twin, x, hx)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_other_forms_of_input(cell, backend):
    twin, x, hx = problem(cell, T=7, num_layers=2, bidirectional=True)
    module = ours(twin, backend)
    assert_alike(module, twin, x)
    assert_alike(module, twin, x[:, 0], mapped(lambda t: t[:, 0].contiguous(), hx))
    assert_alike(module, twin, x[:, 0])
    assert_alike(module, twin, packed(x, [7, 6, 4, 4, 1]), hx)
    assert_alike(module, twin, packed(x, [1, 7, 2, 7, 3]), hx)
    assert_alike(module, twin, packed(x, [1, 7, 2, 7, 3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_have_torchs_types_shapes_and_layout(cell, backend):
    for form in ("padded", "packed", "unbatched"):
        twin, x, hx = problem(cell, B=3, batch_first=True)
        if form == "packed":
            x = nn.utils.rnn.pack_padded_sequence(x, [2, 3, 1], batch_first=True, enforce_sorted=False)
        elif form == "unbatched":
            x, hx = x[0], mapped(lambda t: t[:, 0].contiguous(), hx)
        actual, expected = ours(twin, backend)(x, hx), twin(x, hx)
        assert type(actual) is type(expected) and type(actual[0]) is type(expected[0])
        assert type(actual[1]) is type(expected[1])
        for a, b in zip(tensors(actual), tensors(expected), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        if form == "packed":
            for a, b in zip(actual[0][1:], expected[0][1:], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell, backend):
    twin, x, hx = problem(cell, B=0)
    assert_alike(ours(twin, backend), twin, x, hx)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_dropout_draws_the_same_mask_under_the_same_seed(cell, backend, form):
    twin, x, _ = problem(cell, num_layers=3, dropout=0.5, dtype=torch.float64)
    x = packed(x, [3, 3, 2, 1, 1]) if form == "packed" else x
    module = ours(twin, backend)

    def seeded(module):
        torch.manual_seed(1)
        return results(module, x)

    assert_equal_in_float64(seeded(module), seeded(twin))
    assert not torch.equal(results(module, x)["y"], results(module, x)["y"])
    evaluated = results(module.eval(), x)
    assert_equal_in_float64(evaluated, results(twin.eval(), x))
    assert torch.equal(evaluated["y"], results(module, x)["y"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", SINGLE)
def test_cells(cell, bias, backend):
    kind, options = SINGLE[cell]
    twin = kind(4, 31, bias=bias, **options)
    x, hx = torch.randn(5, 4), torch.randn(5, 31)
    hx = (hx, torch.randn(5, 31)) if cell == "lstm" else hx
    module = ours(twin, backend)
    assert_alike(module, twin, x, hx)
    assert_alike(module, twin, x)
    assert_alike(module, twin, x[0], mapped(lambda t: t[0], hx))
    assert_alike(module, twin, x[0])
    assert type(module(x)) is type(twin(x))


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_reset_under_auto_take_the_reference(cell):
    twin, x, hx = problem(cell)
    masks = {"lengths": torch.tensor([3, 2, 1, 0, 3]), "reset": torch.rand(3, 5) < 0.5}
    auto, reference = (results(ours(twin, backend), x, hx, **masks) for backend in ("auto", "reference"))
    assert all(torch.equal(auto[name], reference[name]) for name in auto)


# --- construction and state ----------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    ("RNN", (4, 3), {}),
    ("RNN", (4, 3, 2, "relu", False, True, 0.5, True), {}),
    ("RNN", (4, 3), {"nonlinearity": "relu"}),
    ("GRU", (4, 3, 2, False, True, 0.5, True), {}),
    ("GRU", (), {"input_size": 4, "hidden_size": 3, "dtype": torch.float64}),
    ("LSTM", (4, 3, 2, False, True, 0.5, True, 2), {}),
    ("LSTM", (4, 3), {"proj_size": 2, "device": "meta"}),
    ("RNNCell", (4, 3), {}),
    ("RNNCell", (4, 3, False, "relu"), {}),
    ("GRUCell", (4, 3, False), {}),
    ("LSTMCell", (4, 3), {"dtype": torch.float16}),
]


@pytest.mark.parametrize("name, args, kwargs", CONSTRUCTIONS)
def test_construction(name, args, kwargs):
    torch.manual_seed(3)
    twin = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(3)
    module = getattr(seqcore.nn, name)(*args, **kwargs)
    assert repr(module) == repr(twin)
    assert vars(module).keys() - {"backend", "grad_clip", "recompute", "locked", "zoneout"} == vars(twin).keys()
    for option in twin.__constants__:
        assert getattr(module, option) == getattr(twin, option)
    assert module.state_dict().keys() == twin.state_dict().keys()
    for key, weight in twin.state_dict().items():
        found = module.state_dict()[key]
        assert (found.shape, found.dtype, found.device) == (weight.shape, weight.dtype, weight.device)
        assert weight.is_meta or torch.equal(found, weight)


def test_backend_is_shown_and_checked():
    assert repr(seqcore.nn.GRU(4, 3, backend="reference")) == "GRU(4, 3, backend='reference')"
    assert repr(seqcore.nn.GRUCell(4, 3, backend="aten")) == "GRUCell(4, 3, backend='aten')"
    for kind in (seqcore.nn.RNN, seqcore.nn.GRU, seqcore.nn.LSTM, seqcore.nn.LSTMCell):
        with pytest.raises(seqcore.InvalidInput, match="unknown backend: got 'cudnn', allowed are 'auto'"):
            kind(4, 3, backend="cudnn")


WRONG_CONSTRUCTIONS = [
    ("RNN", (4, 3), {"nonlinearity": "sigmoid"}),
    ("RNN", (4, 3), {"proj_size": 2}),
    ("GRU", (4, 3), {"proj_size": 2}),
    ("GRU", (4, 3), {"nonlinearity": "tanh"}),
    ("LSTM", (4, 3), {"proj_size": 3}),
    ("LSTM", (4, 3), {"proj_size": -1}),
    ("LSTM", (0, 3), {}),
    ("LSTM", (4, 0), {}),
    ("LSTM", (4, 3, 0), {}),
    ("LSTM", (4.0, 3), {}),
    ("LSTM", (4, 3.0), {}),
    ("LSTM", (4,), {}),
    ("LSTM", (), {}),
    ("LSTM", (4, 3), {"dropout": 1.5}),
    ("LSTM", (4, 3), {"dropout": True}),
    ("LSTM", (4, 3), {"bias": 1}),
    ("LSTM", (4, 3), {"batch_first": 1}),
    ("LSTM", (4, 3), {"unheard_of": 1}),
    ("LSTMCell", (4,), {}),
    ("LSTMCell", (4, 3), {"unheard_of": 1}),
]


@pytest.mark.parametrize("name, args, kwargs", WRONG_CONSTRUCTIONS)
def test_wrong_construction_raises_as_torch_does(name, args, kwargs):
    with pytest.raises(Exception) as expected:
        getattr(nn, name)(*args, **kwargs)
    with pytest.raises(expected.type) as found:
        getattr(seqcore.nn, name)(*args, **kwargs)
    assert found.type is expected.type
    if expected.type is not TypeError or "of type" in str(expected.value):
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_useless_dropout_warns_as_torch_does(name):
    messages = []
    for namespace in (nn, seqcore.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(namespace, name)(4, 3, dropout=0.5)
        messages.append([(w.category, str(w.message)) for w in caught])
    assert messages[0] == messages[1] and len(messages[0]) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_state_dicts_load_both_ways(cell):
    twin, x, hx = problem(cell, num_layers=2, bidirectional=True)
    fresh_twin, _, _ = problem(cell, num_layers=2, bidirectional=True)
    module = ours(fresh_twin, "aten")
    assert module.load_state_dict(twin.state_dict(), strict=True) == fresh_twin.load_state_dict(module.state_dict())
    expected = twin(x, hx)[0]
    assert torch.equal(module(x, hx)[0], expected) and torch.equal(fresh_twin(x, hx)[0], expected)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled_and_back(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled_and_back, saved_and_loaded])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_copies_work_and_share_nothing(name, copied):
    module = getattr(seqcore.nn, name)(4, 3, backend="reference")
    twin = copied(module)
    x = torch.randn(5, 4)
    before = tensors(module(x))
    assert type(twin) is type(module) and twin.backend == "reference"
    assert all(torch.equal(a, b) for a, b in zip(tensors(twin(x)), before, strict=True))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors(module(x)), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LSTMCell"])
def test_moving_to_another_dtype(name, backend):
    module = getattr(seqcore.nn, name)(4, 3, backend=backend).to(torch.bfloat16)
    assert {t.dtype for t in tensors(module(torch.randn(5, 4, dtype=torch.bfloat16)))} == {torch.bfloat16}
    module.double()
    assert {t.dtype for t in tensors(module(torch.randn(5, 4, dtype=torch.float64)))} == {torch.float64}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_assigning_the_class_swaps_in_place(cell, backend):
    twin, x, hx = problem(cell, dtype=torch.float64, num_layers=2)
    module = copy.deepcopy(twin)
    before = dict(module.named_parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.__class__ = getattr(seqcore.nn, type(twin).__name__)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    with use_backend(backend):
        assert_equal_in_float64(results(module, x, hx), results(twin, x, hx))
        module(x, hx)[0].sum().backward()
    optimizer.step()
    twin(x, hx)[0].sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    module.__class__ = type(twin)
    torch.testing.assert_close(module(x, hx), twin(x, hx))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_isinstance_is_as_documented(name):
    module = getattr(seqcore.nn, name)(4, 3)
    assert isinstance(module, nn.RNNBase) and not isinstance(module, getattr(nn, name))


# --- who else lays hands on a module -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LSTMCell"])
def test_functional_call(name, backend):
    module, other = (getattr(seqcore.nn, name)(4, 3, backend=backend) for _ in range(2))
    x = torch.randn(5, 4)
    found = torch.func.functional_call(module, dict(other.named_parameters()), (x,))
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(other(x)), strict=True))


def under_autocast(twin, backend, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(twin, backend)(*inputs), twin(*inputs)
    return [t.dtype for t in tensors(actual)], [t.dtype for t in tensors(expected)]


@pytest.mark.parametrize("backend", ["aten", "auto"])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_as_torch_does_it(cell, backend):
    actual, expected = under_autocast(*problem(cell)[:1], backend, *problem(cell)[1:])
    assert actual == expected


@pytest.mark.parametrize("backend", ["aten", "auto"])
@pytest.mark.parametrize("cell", SINGLE)
def test_autocast_of_cells_as_torch_does_it(cell, backend):
    kind, options = SINGLE[cell]
    actual, expected = under_autocast(kind(4, 3, **options), backend, torch.randn(5, 4))
    assert actual == expected


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_of_the_reference(cell):
    """Everything in the lower precision: as torch does on a GPU, while on a CPU it leaves the GRU in float32."""
    twin, *inputs = problem(cell)
    assert set(under_autocast(twin, "reference", *inputs)[0]) == {torch.bfloat16}
    exempt = mapped(lambda t: t.double(), inputs)
    assert set(under_autocast(twin.double(), "reference", *exempt)[0]) == {torch.float64}


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_under_autocast_have_the_dtype_of_what_they_belong_to(cell):
    twin, x, hx = problem(cell)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ours(twin, "reference"), x, hx)
    assert {value.dtype for name, value in found.items() if name.startswith("gradient")} == {torch.float32}


def chosen(function, *arguments):
    return {explanation.chosen for explanation in seqcore.explain(function, *arguments)}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_torch_func_under_auto_takes_the_reference(cell):
    twin, x, _ = problem(cell, H=7, dtype=torch.float64)
    module, reference = ours(twin, "auto"), ours(twin, "reference")

    def loss(module, x):
        return module(x)[0].square().sum()

    def gradient(module):
        x_ = x.clone().requires_grad_()
        return torch.autograd.grad(loss(module, x_), x_)[0]

    torch.testing.assert_close(torch.func.grad(lambda x: loss(module, x))(x), gradient(reference))
    apart = torch.func.vmap(torch.func.grad(lambda x: loss(module, x)), in_dims=1, out_dims=1)
    torch.testing.assert_close(apart(x), gradient(reference))
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: loss(module, x), (x,), (tangent,))
    torch.testing.assert_close(slope, (gradient(reference) * tangent).sum())
    assert chosen(apart, x) == chosen(torch.func.grad(lambda x: loss(module, x)), x) == {"reference"}
    assert chosen(module, x) == {"aten"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_in_eval_mode(backend):
    twin, x, hx = problem("lstm", num_layers=2, dropout=0.5)
    assert_alike(ours(twin.eval(), backend), twin, x, hx)


def test_frozen_weights_get_no_gradient():
    module = ours(torch_module("lstm"), "reference")
    module.requires_grad_(False)
    x = torch.randn(3, 5, 4, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in module.parameters())
