"""Every recurrence on whatever hypothesis draws, in the ordinary process: the reference, operators, and torch's own."""

import math
import re

import pytest
import torch

import seqcore

from .effort import drawn

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

from .drawn_recurrence import MASKED, Call, Problem, calls
from .judged_recurrence import (
    assert_shared_memory_adds_up,
    assert_stays_in_its_sequence,
    assert_unread_may_be_nan,
    judge,
    on_a_second_seed,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Of torch's own modules on a GPU, given weights that lie anywhere.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

DOUBLE = (torch.float64,)
ALIKE = {"T": 2, "B": 3, "I": 4, "H": 4, "layers": 2}
SAME = {
    "h and c": {"h": 7, "c": 7, "x": 1},
    "x and h": {"x": 0, "h": 0, "c": 5},
    "weights": {"weight_ih_l0": 3, "weight_hh_l0": 3, "weight_ih_l1": 3, "weight_hh_l1": 3},
    "biases": {"bias_ih_l0": 2, "bias_hh_l0": 2},
    "x in a weight": {"x": 11, "weight_ih_l0": 3},
    "all of one storage": {},
}


def backends(call):
    return ["operators", "aten" if call.plain else None]


@drawn(60, 1_500, call=calls())
def test_whatever_is_asked(call):
    on_a_second_seed(judge, call, backends(call))


@drawn(25, 600, call=calls(dtypes=DOUBLE))
def test_what_no_step_reads_may_be_nan(call):
    for backend in ("reference", "operators"):
        assert_unread_may_be_nan(call, backend)


@pytest.mark.parametrize("backend", ["reference", "operators"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_proj"])
def test_nan_that_no_step_reads_reaches_no_gradient(cell, backend):
    """In the padding, in the state of a sequence of no steps or one cut off at once, in states put in nowhere."""
    assert_unread_may_be_nan(Call(cell, **MASKED), backend)


@drawn(30, 600, call=calls(dtypes=DOUBLE, empty=False), data=st.data())
def test_what_is_not_finite_stays_in_its_sequence(call, data):
    b = data.draw(st.integers(0, call.B - 1))
    t = data.draw(st.integers(0, (call.T if call.lengths is None else max(call.lengths[b], 1)) - 1))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    for backend in backends(call):
        assert_stays_in_its_sequence(call, t, b, value, backend)


@pytest.mark.parametrize("backend", ["operators", "aten"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_one_sequence_of_many(cell, backend, value):
    assert_stays_in_its_sequence(Call(cell, 3, 4, 3, 5, bidirectional=True), 1, 2, value, backend)


@pytest.mark.parametrize("backend", ["reference", "operators"])
def test_an_infinite_gradient_is_clipped_beside_a_sequence_that_has_ended(backend):
    call = Call("rnn_tanh", 3, 2, 2, 3, lengths=(3, 1), options={"grad_clip": 1.0})
    problem = Problem(call)
    leaves = {name: t.requires_grad_() for name, t in problem.leaves.items()}
    y, h_n = problem.outputs(leaves, backend)
    found = torch.autograd.grad([y, h_n], list(leaves.values()), [torch.zeros_like(y), torch.full_like(h_n, math.inf)])
    # The state of a sequence that has not ended, and the one that is handed on, are infinite before they are clipped.
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 3, 4)])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_modules_of_nothing_are_taken_or_refused_as_torch_does(kind, sizes):
    T, B, I, H = sizes

    def attempted(namespace):
        try:
            module = getattr(namespace, kind)(I, H)
            return module(torch.randn(T, B, I))[0].shape
        except (RuntimeError, ValueError) as error:
            return re.match(r"(?:\w+: )?(.*?)(?: in \w+|, got .*)?$", str(error))[1]

    assert attempted(seqcore.nn) == attempted(torch.nn)


@drawn(30, 600, call=calls(dtypes=DOUBLE), data=st.data())
def test_inputs_that_share_memory(call, data):
    names = ["x", "h", "c", "reset_h", "reset_c", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    offsets = {name: data.draw(st.sampled_from([0, 0, 1, 2, 3])) for name in names}
    assert_shared_memory_adds_up(call, offsets, backends(call))


@pytest.mark.parametrize("shared", SAME)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_inputs_that_are_the_same(cell, shared):
    assert_shared_memory_adds_up(Call(cell, **ALIKE), SAME[shared], ["operators", "aten", "reference"])
