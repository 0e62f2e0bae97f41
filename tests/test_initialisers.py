"""seqcore.nn.init: recurrent matrices that keep lengths, and biases that keep the state."""

from functools import partial

import pytest
import torch
from torch import nn

import seqcore
from seqcore.nn import init

from .comparisons import assert_equal_in_float64
from .recurrence_twins import CELLS, SINGLE, ours, torch_module

H = 6
DOUBLE = {"dtype": torch.float64}
STACKED = {"num_layers": 2, "bidirectional": True}
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# The gate that keeps the state, and its part of a bias.
KEEPING = {"GRU": slice(H, 2 * H), "LSTM": slice(H, 2 * H)}


# Every kind: torch's and ours, sequences, projected and in blocks, and Cells.
MODULES = (
    {f"torch {cell}": partial(torch_module, cell, 4, H, **STACKED) for cell in CELLS}
    | {cell: lambda cell=cell: ours(torch_module(cell, 4, H, **STACKED), None) for cell in CELLS}
    | {f"{name} blocks": partial(getattr(seqcore.nn, name), 4, H, blocks=2, **STACKED) for name in GATES}
    | {f"torch cell {cell}": partial(made, 4, H, **options) for cell, (made, options) in SINGLE.items()}
    | {f"cell {cell}": partial(getattr(seqcore.nn, made.__name__), 4, H, **o) for cell, (made, o) in SINGLE.items()}
)


def kind(module):
    return getattr(module, "mode", type(module).__name__.removesuffix("Cell")).partition("_")[0]


def others(module, *changed):
    return {name: p.clone() for name, p in module.named_parameters() if not name.startswith(changed)}


@pytest.mark.parametrize("name", MODULES)
def test_every_recurrent_matrix_is_orthogonal(name):
    module = MODULES[name]().double()
    before = others(module, "weight_hh")
    assert init.orthogonal_recurrent_(module, gain=0.5) is module
    found = [p for name, p in module.named_parameters() if name.startswith("weight_hh")]
    assert len(found) == (4 if isinstance(module, nn.RNNBase) else 1)
    for weight in found:
        assert weight.requires_grad and weight.grad_fn is None
        matrices = weight.detach()
        matrices = matrices.flatten(0, 1) if weight.dim() == 4 else matrices.unflatten(0, (GATES[kind(module)], H))
        products = matrices.mT @ matrices
        identity = torch.eye(products.shape[-1], dtype=torch.float64).expand_as(products)
        assert_equal_in_float64({"W^T W": products}, {"W^T W": 0.25 * identity})
        assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)


@pytest.mark.parametrize("name", [name for name in MODULES if "rnn" not in name.lower()])
def test_the_gate_that_keeps_the_state_gets_the_sum(name):
    module = MODULES[name]()
    keeping = KEEPING[kind(module)]
    before = others(module, "nothing")
    assert init.forget_gate_bias_(module, 1.5) is module
    after = dict(module.named_parameters())
    names = [name for name in after if name.startswith("bias_ih")]
    assert names
    for name in names:
        other = name.replace("_ih", "_hh")
        assert (after[name][keeping] == 1.5).all() and (after[other][keeping] == 0).all()
        for each in (name, other):
            after[each].data[keeping] = before[each][keeping]
    assert all(torch.equal(p, before[name]) for name, p in after.items())


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_a_large_bias_keeps_the_state(name):
    """Not merely the part of that name, but the gate whose being open carries the state through."""
    module = init.forget_gate_bias_(getattr(nn, name)(4, H, **DOUBLE), 60.0)
    x, state = torch.zeros(5, 1, 4, **DOUBLE), torch.randn(1, 1, H, **DOUBLE)
    _, after = module(x, (torch.zeros_like(state), 100 * state) if name == "LSTM" else state)
    if name == "LSTM":
        # It adds to what it keeps, at most 1 a step, and would else have forgotten all but a thousandth.
        assert (after[1] - 100 * state).abs().max() <= 5
    else:
        torch.testing.assert_close(after, state)


def test_a_generator_makes_it_repeatable():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        module = init.orthogonal_recurrent_(nn.LSTM(4, H), generator=torch.Generator().manual_seed(seed))
        drawn.append(module.weight_hh_l0.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype(dtype):
    weight = init.orthogonal_recurrent_(nn.RNN(4, H, dtype=dtype)).weight_hh_l0.detach()
    error = (weight.double() @ weight.double().T - torch.eye(H).double()).abs().max()
    assert weight.dtype == dtype and error < 4 * torch.finfo(dtype).eps


def test_a_compiled_module_is_the_module_inside():
    module = nn.GRU(4, H)
    compiled = torch.compile(seqcore.nn.GRU(4, H))
    for each in (module, compiled):
        assert init.forget_gate_bias_(init.orthogonal_recurrent_(each), 2.0) is each
    assert (compiled._orig_mod.bias_ih_l0[KEEPING["GRU"]] == 2).all()


def parametrized():
    module = nn.LSTM(4, H)
    for name in ("weight_hh_l0", "bias_hh_l0"):
        nn.utils.parametrize.register_parametrization(module, name, nn.Identity())
    return module


@pytest.mark.parametrize("function, make, message", [
    (init.orthogonal_recurrent_, lambda: nn.Linear(H, H), "must be an RNN, GRU, LSTM or a Cell .* got Linear"),
    (init.forget_gate_bias_, lambda: nn.Sequential(nn.LSTM(4, H)), "got Sequential; of a whole model, pass"),
    (init.forget_gate_bias_, lambda: nn.RNN(4, H), "an RNN has no gate"),
    (init.forget_gate_bias_, lambda: seqcore.nn.RNNCell(4, H), "an RNN has no gate"),
    (init.forget_gate_bias_, lambda: nn.GRU(4, H, bias=False), "got GRU with bias=False"),
    (init.forget_gate_bias_, lambda: nn.LSTMCell(4, H, bias=False), "got LSTM with bias=False"),
    (init.orthogonal_recurrent_, parametrized, "weight_hh_l0 is not a parameter but computed"),
    (init.forget_gate_bias_, parametrized, "bias_hh_l0 is not a parameter but computed"),
    (partial(init.orthogonal_recurrent_, gain=float("nan")), lambda: nn.GRU(4, H), "gain must be a finite .* got nan"),
    (partial(init.forget_gate_bias_, value="1"), lambda: nn.GRU(4, H), "value must be a finite number, got '1'"),
])  # fmt: skip
def test_what_cannot_be_initialised_is_left_alone(function, make, message):
    module = make()
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(seqcore.InvalidInput, match=message):
        function(module)
    assert all(torch.equal(p, before[name]) for name, p in module.state_dict().items())
