"""The recurrent kernels on whatever hypothesis draws."""

import math

import pytest
import torch

import seqcore.nn
from seqcore import functional

from .comparisons import assert_within
from .effort import drawn

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

from .drawn_recurrence import LAYOUTS_IN_FULL, MASKED, Call, calls
from .judged_recurrence import (
    assert_shared_memory_adds_up,
    assert_stays_in_its_sequence,
    assert_unread_may_be_nan,
    judge,
    on_a_second_seed,
)

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # From NumPy, which the interpreter computes by: what is not finite is what these tests are about.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

SINGLE = (torch.float32,)
DTYPES = (torch.float32, torch.float32, torch.float16)


@drawn(20, 250, call=calls(most=4, dtypes=DTYPES))
def test_whatever_is_asked(call, device):
    on_a_second_seed(judge, call, ["triton"], device)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS_IN_FULL if name != "dense"])
@pytest.mark.parametrize("T", [1, 2], ids=["step", "sequence"])
def test_however_inputs_lie_in_memory(T, layout, device):
    layouts = dict.fromkeys(["x", "states", "weights", "biases"], layout)
    judge(Call("lstm", T, 3, 4, 5, layouts=layouts, dtype=torch.float32), ["triton"], device)


@drawn(5, 75, call=calls(most=4, dtypes=SINGLE))
def test_what_no_step_reads_may_be_nan(call, device):
    assert_unread_may_be_nan(call, "triton", device)


@pytest.mark.parametrize("recompute", [False, True], ids=["gates", "recompute"])
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm", "lstm_proj"])
def test_nan_that_no_step_reads_reaches_no_gradient(cell, recompute, device):
    call = Call(cell, **MASKED, dtype=torch.float32, options={"recompute": recompute})
    assert_unread_may_be_nan(call, "triton", device)


@drawn(5, 75, call=calls(most=4, dtypes=SINGLE, empty=False), data=st.data())
def test_what_is_not_finite_stays_in_its_sequence(call, data, device):
    b = data.draw(st.integers(0, call.B - 1))
    t = data.draw(st.integers(0, (call.T if call.lengths is None else max(call.lengths[b], 1)) - 1))
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    on_a_second_seed(assert_stays_in_its_sequence, call, t, b, value, "triton", device)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_one_sequence_of_many(cell, value, device):
    """Sequences that share a tile: what is NaN in one row stays out of the others, and goes on as in the reference."""
    call = Call(cell, 3, 4, 3, 5, dtype=torch.float32)
    assert_stays_in_its_sequence(call, 1, 2, value, "triton", device)


@drawn(5, 75, call=calls(most=4, dtypes=SINGLE), data=st.data())
def test_inputs_that_share_memory(call, data, device):
    names = ["x", "h", "c", "reset_h", "reset_c", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    offsets = {name: data.draw(st.sampled_from([0, 0, 1, 2, 3])) for name in names}
    on_a_second_seed(assert_shared_memory_adds_up, call, offsets, ["triton"], device)


@pytest.mark.parametrize("batch", [0, 3])
def test_cells_of_no_inputs(batch, device):
    """torch's own Cells take them: a product over nothing is the bias."""
    shapes = (batch, 0), (batch, 4), (12, 0), (12, 4), (12,), (12,)
    x, h, *weights = (torch.randn(shape, device=device) for shape in shapes)
    exact, eager = (torch.gru_cell(*(t.to(dtype) for t in (x, h, *weights))) for dtype in (torch.float64, x.dtype))
    assert_within({"h": functional.gru_cell(x, h, *weights, backend="triton")}, {"h": exact}, {"h": eager})


def test_one_gate_in_blocks_of_one_unit_is_made_again(device):
    module = seqcore.nn.RNN(1, 2, bias=False, blocks=2, zoneout=0.3, backend="triton", device=device).eval()
    x, found = torch.randn(3, 2, 1, device=device, requires_grad=True), []
    for module.recompute in (False, True):
        found += torch.autograd.grad(module(x)[0].sum(), x)
    assert torch.equal(*found)
