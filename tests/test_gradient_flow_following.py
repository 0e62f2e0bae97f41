"""Which tensors are followed: the sequences a module is called for, the model's input, what watched modules put out."""

import copy

import pytest
import torch
from torch import nn

import seqcore
from seqcore.diagnostics import gradient_flow

from .comparisons import assert_equal_in_float64

DOUBLE = {"dtype": torch.float64}
T, B, E = 5, 2, 4


def found(flow):
    return {name: flow[name].norms for name in flow}


class Calling(nn.Module):
    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def run(step, x, state):
    for x_t in x:
        state = step(x_t, state)
    return state


def interleaved(one, other, x, zeros):
    below = above = zeros
    for x_t in x:
        below = one(x_t, below)
        above = other(below.view(B, E), 2 * above)
    return below + above


# Two sequences, of two modules or of one that they share.
SEQUENCES = {
    "begun with none": lambda one, other, x, zeros: run(one, x, None) + run(other, x, None),
    "begun with zeros": lambda one, other, x, zeros: run(one, x, zeros) + run(other, x, zeros),
    "detached": lambda one, other, x, zeros: run(other, x, run(one, x, None).detach()),
    "interleaved": interleaved,
}


class Two(nn.Module):
    def __init__(self, one, other, way):
        super().__init__()
        self.one, self.other, self.way = one, other, SEQUENCES[way]

    def forward(self, x):
        if isinstance(self.one, nn.RNNBase):
            steps = [lambda x_t, h, rnn=rnn: rnn(x_t[None], h)[1] for rnn in (self.one, self.other)]
            return self.way(*steps, x, x.new_zeros(1, B, E))
        return self.way(self.one, lambda x_t, h: self.other(x_t, hx=h), x, x.new_zeros(B, E))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", SEQUENCES)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRUCell, seqcore.nn.GRUCell])
def test_sequences_that_share_a_module_are_told_apart(kind, way, frozen):
    one, x = kind(E, E).double().requires_grad_(not frozen), torch.randn(T, B, E, **DOUBLE)
    apart, shared = (gradient_flow(Two(one, b, way), x, loss=torch.sum) for b in (copy.deepcopy(one), one))
    assert list(shared) == ["one.h", "one.h#2"]
    expected = {"one.h": apart["one.h"].norms, "one.h#2": apart["other.h"].norms}
    assert_equal_in_float64(found(shared), expected)


def test_steps_without_a_graph_are_one_sequence():
    def warmed_up(self, x):
        with torch.no_grad():
            state = run(self.cell, x, x.new_zeros(B, E))
        return run(self.cell, x, state)

    flow = gradient_flow(Calling(warmed_up, cell=nn.GRUCell(E, E)), torch.randn(T, B, E), loss=torch.sum)
    assert {name: len(flow[name].norms) for name in flow} == {"cell.h": T, "cell.h#2": T}
    assert not flow["cell.h"].norms.any() and flow["cell.h#2"].norms.all()


# --- the model's own input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_time_in_the_input_is_the_models_or_that_of_what_is_given_it(batch_first):
    x = torch.randn(T, B, E, **DOUBLE)
    rnn, attention = nn.GRU(E, E, batch_first=batch_first), nn.MultiheadAttention(E, 2, batch_first=batch_first)
    for model in (
        Calling(lambda self, x: x.exp(), batch_first=batch_first),
        Calling(lambda self, x: self.rnn(x)[0], rnn=rnn),
        Calling(lambda self, x: self.attention(x + 1, x, value=x)[0], attention=attention),
    ):
        given, loss = x.clone().requires_grad_(), lambda y: y.square().sum()
        (gradient,) = torch.autograd.grad(loss(model.double()(given)), given)
        flow = gradient_flow(model, x, loss=loss)
        expected = gradient.movedim(int(batch_first), 0).flatten(1).norm(dim=1)
        assert_equal_in_float64({"input": flow["input"].norms}, {"input": expected})


def test_an_input_of_unknown_time_is_said_not_to_be_followed():
    model = Calling(lambda self, x: run(self.cell, x.transpose(0, 1), None), cell=nn.GRUCell(E, E))
    flow = gradient_flow(model, torch.randn(B, T, E), loss=torch.sum)
    assert list(flow) == ["cell.h"] and "is time is not known" in flow.skipped["input"]


# --- operations in place --------------------------------------------------------------------------------------------


def scaled(x, in_place):
    return x.mul_(0.5) if in_place else x * 0.5


IN_PLACE = {
    "the input": lambda self, x: self.rnn(scaled(x, self.in_place))[0],
    "a state": lambda self, x: run(lambda x_t, h: scaled(self.cell(x_t, h), self.in_place), x, None),
    "a watched output": lambda self, x: nn.functional.relu(self.linear(x), inplace=self.in_place),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", IN_PLACE)
def test_operations_in_place_leave_what_is_recorded(what, frozen):
    layers = {"rnn": nn.RNN(E, E), "cell": nn.RNNCell(E, E), "linear": nn.Linear(E, E)}
    model = Calling(IN_PLACE[what], **layers, batch_first=False).double().requires_grad_(not frozen)
    x, flows = torch.randn(T, B, E, **DOUBLE), []
    for model.in_place in (False, True):
        flows.append(gradient_flow(model, x, loss=torch.sum, watch=["linear"]))
    assert len(flows[0]) > 1 or what != "the input"
    assert_equal_in_float64(found(flows[1]), found(flows[0]))


# --- watched modules -------------------------------------------------------------------------------------------------


class Scan(nn.Module):
    """A recurrence written as one call that puts out a sequence, and beside it a state."""

    def forward(self, x):
        return x.cumsum(0), x.sum(0)


@pytest.mark.parametrize("watch", [["scan"], {"scan": 0}, "scan"])
def test_a_watched_sequence_is_split_along_time(watch):
    model = nn.Sequential()
    model.scan = Scan()
    model.head = nn.Identity()
    x = torch.randn(T, B, E, **DOUBLE)
    flow = gradient_flow(model, x, loss=lambda output: (output[0] * torch.arange(T)[:, None, None]).sum(), watch=watch)
    assert_equal_in_float64({"h": flow["scan.h"].norms}, {"h": 8**0.5 * torch.arange(T, **DOUBLE)})
    other = gradient_flow(model, x, loss=lambda output: output[0].sum(), watch={"scan": 1, "head": 2})
    assert [len(other[name].norms) for name in ("scan.h", "head.h")] == [B, E]


def test_watching_what_is_followed_anyway_changes_nothing():
    model = Calling(lambda self, x: self.attention(*[self.rnn(x)[0]] * 3)[0], rnn=nn.GRU(E, E))
    model.attention = nn.MultiheadAttention(E, 2)
    model, x = model.double(), torch.randn(T, B, E, **DOUBLE)
    plain, watched = (gradient_flow(model, x, loss=torch.sum, watch=watch) for watch in ((), ["rnn", "attention"]))
    assert_equal_in_float64(found(watched), found(plain))
    assert "watch the module around it" in watched.skipped["attention.h"]


def test_dicts_that_watched_modules_put_out_are_looked_into():
    model = Calling(lambda self, x: self.inner(x)["y"], inner=Calling(lambda self, x: {"length": len(x), "y": 2 * x}))
    flow = gradient_flow(model, torch.ones(T, B, E, **DOUBLE), loss=torch.sum, watch=["inner"])
    assert_equal_in_float64({"h": flow["inner.h"].norms}, {"h": torch.full((T,), 8**0.5, **DOUBLE)})


def test_watched_modules_that_show_nothing_are_said_to():
    model = nn.ModuleDict({"rnn": nn.RNN(E, 3), "unused": nn.Linear(3, 3), "table": nn.Flatten()})
    model.forward = lambda x: model["rnn"](x)[0] + model["table"](torch.ones(1, 1, 3, dtype=torch.int64))[0, 0]
    flow = gradient_flow(model, torch.randn(T, B, E), loss=torch.sum, watch=["unused", "table"])
    assert flow.skipped == {
        "unused": "was not called",
        "table": "puts out Tensor, with no floating-point Tensor in it; looked into are tuples, lists and dicts",
    }
