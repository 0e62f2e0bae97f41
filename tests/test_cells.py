"""Cells of one's own: through every form of input, on the kernels and the reference, against a loop written here."""

import pytest
import torch
import triton
import triton.language as tl
from torch.nn.utils.rnn import PackedSequence

import seqcore
from seqcore import Cell, InvalidInput, functional
from seqcore.cells import BUILT_IN, find
from seqcore.kernels.activations import sigmoid, tanh

from .comparisons import assert_equal_in_float64, assert_within, cotangents
from .recurrence_twins import mapped, masks, packed, tensors

# --- two cells: one saves fewer tiles than it has gates, one saves more ---------------------------------------------


@triton.jit
def mgu_step(x_gates, h_gates, state):
    f = sigmoid(x_gates[0] + h_gates[0])
    n = tanh(x_gates[1] + f * h_gates[1])
    return (state[0] + f * (n - state[0]),), (f, n, h_gates[1])


@triton.jit
def mgu_step_backward(saved, state, new_state, dstate):
    f, n, h_n = saved
    dn = dstate[0] * f * (1.0 - n * n)
    df = (dstate[0] * (n - state[0]) + dn * h_n) * f * (1.0 - f)
    return (df, dn), (df, dn * f), (dstate[0] * (1.0 - f),)


def mgu(x_gates, h_gates, state):
    """Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks" (2016), forgetting after the product."""
    f = torch.sigmoid(x_gates[0] + h_gates[0])
    n = torch.tanh(x_gates[1] + f * h_gates[1])
    return (state[0] + f * (n - state[0]),), (f, n, h_gates[1])


@triton.jit
def coupled_step(x_gates, h_gates, state):
    f = sigmoid(x_gates[0] + h_gates[0])
    g = tanh(x_gates[1] + h_gates[1])
    o = sigmoid(x_gates[2] + h_gates[2])
    c = f * state[1] + (1.0 - f) * g
    # Backward makes o again, from the new state, so that two tiles of three gates are saved.
    return (o + tanh(c), c), (f, g)


@triton.jit
def coupled_step_backward(saved, state, new_state, dstate):
    f, g = saved
    tanh_c = tanh(new_state[1])
    o = new_state[0] - tanh_c
    dc = dstate[1] + dstate[0] * (1.0 - tanh_c * tanh_c)
    df = dc * (state[1] - g) * f * (1.0 - f)
    dg = dc * (1.0 - f) * (1.0 - g * g)
    dgates = (df, dg, dstate[0] * o * (1.0 - o))
    return dgates, dgates, (tl.zeros_like(dc), dc * f)


def coupled(x_gates, h_gates, state):
    """An LSTM whose input gate is what its forget gate leaves, and whose output gate adds instead of multiplying."""
    f, g, o = (x + h for x, h in zip(x_gates, h_gates, strict=True))
    f, g, o = torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * state[1] + (1 - f) * g
    return (o + torch.tanh(c), c), (f, g)


MGU = Cell("test_mgu", 2, ("h",), mgu_step, mgu_step_backward, mgu)
COUPLED = Cell("test_coupled", 3, ("h", "c"), coupled_step, coupled_step_backward, coupled, apart=False)
CELLS = {"mgu": MGU, "coupled": COUPLED}


def loop(cell, x, hx, weights, lengths):
    """One layer both ways over x [T, B, I], sequence by sequence and step by step, by ``cell.reference``."""
    rows, finals = [], []
    for b, length in enumerate(lengths):
        ways = []
        for d in range(2):
            w_ih, w_hh, b_ih, b_hh = weights[4 * d : 4 * d + 4]
            state = tuple(s[d, b] for s in tensors(hx))
            outputs = {}
            for t in range(length) if d == 0 else range(length - 1, -1, -1):
                gates = (x[t, b] @ w_ih.T + b_ih).chunk(cell.gates), (state[0] @ w_hh.T + b_hh).chunk(cell.gates)
                state, _ = cell.reference(*gates, state)
                outputs[t] = state[0]
            ways.append(torch.stack([outputs.get(t, torch.zeros_like(state[0])) for t in range(x.shape[0])]))
            finals.append(torch.stack(state))
        rows.append(torch.cat(ways, -1))
    # [states, D, B, H]
    state = torch.stack(finals).view(len(lengths), 2, -1, finals[0].shape[-1]).permute(2, 1, 0, 3)
    return torch.stack(rows, 1), state


def problem(cell, T=4, B=5, I=8, H=31, dtype=torch.float32, device=None):
    """x, hx and the weights of one layer both ways."""
    shapes = [(cell.gates * H, I), (cell.gates * H, H), (cell.gates * H,), (cell.gates * H,)] * 2
    weights = [torch.randn(shape, dtype=dtype, device=device) / H**0.5 for shape in shapes]
    states = tuple(torch.randn(2, B, H, dtype=dtype, device=device) for _ in cell.states)
    return torch.randn(T, B, I, dtype=dtype, device=device), states if cell.has_c else states[0], weights


def gradients_of(run, x, hx, weights):
    """Results of ``run`` and gradients of a weighing of them, by position."""
    x, hx, weights = (mapped(lambda t: t.detach().requires_grad_(), value) for value in (x, hx, tuple(weights)))
    outputs = run(x, hx, list(weights))
    found = torch.autograd.grad(outputs, [x, *tensors(hx), *weights], cotangents(outputs))
    return {str(index): value for index, value in enumerate([*outputs, *found])}


def through_seqcore(cell, form, backend, **options):
    """A function of x, hx and weights to y [T, B, 2H], zero past the end, and the final states [states, 2, B, H]."""
    lengths = lengths_of(form)

    def run(x, hx, weights):
        keywords = {"lengths": torch.tensor(lengths, device=x.device)} if form == "lengths" else {}
        given = packed(x, lengths) if form == "packed" else x
        y, state = functional.recurrence(
            given, hx, weights, cell=cell, bidirectional=True, backend=backend, **keywords, **options
        )
        if isinstance(y, PackedSequence):
            y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=x.shape[0])
        return [y, torch.stack(tensors(state))]

    return run


def lengths_of(form):
    return {"padded": [4] * 5, "packed": [2, 4, 1, 4, 3], "lengths": [2, 4, 0, 1, 3]}[form]


def by_hand(cell, form):
    return lambda x, hx, weights: list(loop(cell, x, hx, weights, lengths_of(form)))


@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("name", CELLS)
def test_on_the_reference(name, form):
    cell, arguments = CELLS[name], problem(CELLS[name], H=3, dtype=torch.float64)
    found = gradients_of(through_seqcore(cell, form, "auto"), *arguments)
    assert_equal_in_float64(found, gradients_of(by_hand(cell, form), *arguments))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "form, options",
    [
        ("padded", {}),
        ("padded", {"recompute": True}),
        ("packed", {}),
        ("lengths", {}),
        ("lengths", {"recompute": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CELLS)
def test_on_the_kernels(name, form, options, device):
    cell, arguments = CELLS[name], problem(CELLS[name], device=device)
    found = gradients_of(through_seqcore(cell, form, "triton", **options), *arguments)
    double = [mapped(lambda t: t.double(), tuple(a) if isinstance(a, list) else a) for a in arguments]
    exact = gradients_of(by_hand(cell, form), *double)
    assert_within(found, exact, gradients_of(by_hand(cell, form), *arguments))


@pytest.mark.kernels
@pytest.mark.parametrize("name", CELLS)
def test_one_step_and_every_option(name, device):
    """A step, whose kernel is another; clipping, blocks and resets, of which the reference is the judge."""
    cell = CELLS[name]
    x, hx, weights = problem(cell, H=48, device=device)
    weights = [w.reshape(cell.gates, 3, 16, 48)[..., :16].contiguous() if i % 4 == 1 else w
               for i, w in enumerate(weights)]  # fmt: skip
    for steps, keywords in ((1, {}), (4, {"grad_clip": 0.02, **masks(device)})):
        both = steps > 1

        def run(backend, x, hx, weights, steps=steps, both=both, keywords=keywords):
            hx = hx if both else mapped(lambda t: t[:1], hx)
            found = functional.recurrence(
                x[:steps], hx, weights[: 8 if both else 4], cell=cell.name, bidirectional=both,
                return_cells=cell.has_c, backend=backend, **keywords,
            )  # fmt: skip
            # Every argument has a gradient, if only one of zeros.
            return [*tensors(found), sum(w.sum() * 0 for w in weights).reshape(1)]

        double = [mapped(lambda t: t.double(), tuple(a) if isinstance(a, list) else a) for a in (x, hx, weights)]
        exact, eager, found = (
            gradients_of(lambda *a, backend=backend: run(backend, *a), *arguments)
            for backend, arguments in
            (("reference", double), ("reference", (x, hx, weights)), ("triton", (x, hx, weights)))
        )  # fmt: skip
        assert_within(found, exact, eager)


def test_derivatives_of_the_reference_of_a_cell():
    x, hx, weights = problem(COUPLED, T=2, B=2, I=2, H=2, dtype=torch.float64)

    def run(*weights):
        return functional.recurrence(x, hx, weights, cell=COUPLED, bidirectional=True)[0]

    inputs = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# --- definitions ----------------------------------------------------------------------------------------------------


def define(name="test_new", gates=2, states=("h",), reference=mgu, **options):
    return Cell(name, gates, states, mgu_step, mgu_step_backward, reference, **options)


@pytest.mark.parametrize("options, message", [
    ({"states": ("c",)}, r"states must be \('h',\) or \('h', 'c'\), got \('c',\)"),
    ({"states": ("h", "c", "n")}, "states must be"),
    ({"states": ["h"]}, "states must be"),
    ({"gates": 0}, "gates must be a positive integer, got 0"),
    ({"gates": 2.0}, "gates must be a positive integer, got 2.0"),
    ({"gates": 1}, r"with 1 gates and 1 states in tuples, must return \(state, saved\).*IndexError"),
    ({"states": ("h", "c")}, "reference must return 2 states, got 1"),
    ({"reference": lambda x, h, state: state}, "must return .* it raised"),
    ({"reference": lambda x, h, state: (state, (x[0],), ())}, "must return .* it raised ValueError"),
    ({"name": "lstm"}, "a cell named 'lstm' exists already, from seqcore.reference.cells.lstm, got another"),
    ({"name": "test_mgu", "reference": coupled, "gates": 3, "states": ("h", "c")}, "exists already, from .*mgu"),
])  # fmt: skip
def test_bad_definitions(options, message):
    before = find("lstm"), find("test_mgu")
    with pytest.raises(InvalidInput, match=message):
        define(**options)
    assert (find("lstm"), find("test_mgu")) == before
    with pytest.raises(InvalidInput, match="unknown cell: got 'test_new'"):
        find("test_new")


def test_what_only_the_operators_pass_is_not_for_a_cell_of_your_own():
    with pytest.raises(TypeError, match="unexpected keyword argument 'extra'"):
        define(extra=1)


def test_a_cell_may_be_defined_again():
    """As happens when a notebook's cell, or a module, is run once more."""
    again = Cell("test_mgu", 2, ("h",), mgu_step, mgu_step_backward, mgu)
    assert find("test_mgu") is again and again.saved == MGU.saved == 3


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(InvalidInput, match="unknown cell: got 'sru', allowed are 'rnn_tanh', 'rnn_relu', 'gru'"):
        functional.recurrence(torch.zeros(2, 3, 4), None, [], cell="sru")


@pytest.mark.parametrize("cell", BUILT_IN, ids=lambda cell: cell.name)
def test_built_in_cells_come_through_the_same_door(cell):
    module = {"rnn": seqcore.nn.RNN, "gru": seqcore.nn.GRU, "lstm": seqcore.nn.LSTM}[cell.name[:4].rstrip("_")](4, 3)
    weights, x = list(module.parameters()), torch.randn(5, 2, 4)
    expected = functional.rnn(x, None, weights, nonlinearity=cell.name[4:]) if "rnn" in cell.name else module(x)
    found = functional.recurrence(x, None, weights, cell=cell.name)
    assert find(cell) is find(cell.name) is cell
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def test_states_and_weights_of_a_cell_are_checked():
    x, hx, weights = problem(COUPLED, H=3)
    with pytest.raises(InvalidInput, match=r"test_coupled: hx must be a pair \(h_0, c_0\)"):
        functional.recurrence(x, hx[0], weights, cell=COUPLED, bidirectional=True)
    with pytest.raises(InvalidInput, match=r"test_mgu: w_hh must be \[2 \* hidden_size"):
        functional.recurrence(x, hx[0], [w[:5] for w in weights], cell=MGU, bidirectional=True)
    with pytest.raises(InvalidInput, match="return_cells=True needs a cell with c"):
        functional.recurrence(x, hx[0], weights, cell=MGU, return_cells=True)
