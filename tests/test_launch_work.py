"""What launches say they have to do, against the models of whole operations: launches are caught, none is made."""

import pytest
import torch

from seqcore import functional, nn
from seqcore.devices import pretending
from seqcore.kernels import launch_work, work
from seqcore.kernels.recurrence import plan
from seqcore.kernels.tuning import Device
from seqcore.testing.launches import noted_for

from .benchmark_modules import load

# So small that a batch of three groups takes several launches.
GPU = Device("sm_90", multiprocessors=40, shared_memory=232448, registers=65536)
WORK = {name: metrics for (_, name), metrics in launch_work.LAUNCH_WORK.items()}


@pytest.fixture
def launched():
    with noted_for(GPU) as found:
        yield found


def said(launch):
    return WORK[launch.name](launch.grid, launch.arguments)


def total(launched, metric, name=""):
    return sum(said(launch).get(metric, 0) for launch in launched if name in launch.name)


def nbytes(arguments, *names):
    return sum(arguments[name].numel() * arguments[name].element_size() for name in names)


def test_every_kernel_has_its_work():
    ours = {name for name, file in load("ledger").kernels().items() if file != "floors.py"}
    assert set(WORK) == ours


# --- recurrences ----------------------------------------------------------------------------------------------

T, B, I, H = 5, 40, 24, 256
MODULES = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def train(op, directions=1, dtype=torch.float16, training=True, steps=T, **options):
    module = MODULES[op](I, H, bidirectional=directions == 2, dtype=dtype, backend="triton", **options)
    x = torch.randn(steps, B, I, dtype=dtype)
    if not training:
        with torch.no_grad():
            return module(x)
    return module(x)[0].sum().backward()


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("directions", [1, 2])
def test_steps_are_what_the_model_has_without_the_library_s_products(launched, op, directions):
    with plan.overriding(rows=16, units=16):
        train(op, directions)
    shape = {"T": T, "B": B, "I": I, "H": H, "directions": directions}
    gates = work.GATES[op]
    # The library makes three products for the input, and that for the recurrent weights' gradient.
    steps = T * work.recurrent_flops(gates, shape)
    library = 3 * 2 * T * B * gates * H * I * directions + steps
    assert len(launched) == 2 * (directions + 1), "several launches each way, of parts of the batch"
    assert total(launched, "flops16") == work.work(op, "training", shape, 2).flops - library
    assert total(launched, "flops16", "forward") == total(launched, "flops16", "backward") == steps


def test_float32_is_counted_by_its_width(launched):
    train("gru", dtype=torch.float32, training=False)
    assert total(launched, "flops32") > 0 == total(launched, "flops16")


@pytest.mark.parametrize("op", MODULES)
def test_each_tensor_of_a_sequence_is_moved_once(launched, op):
    with pretending(Device("sm_90")):
        train(op)
    forward, backward = launched
    states = ("h_init_ptr", "h_n_ptr") + (("c_init_ptr", "c_n_ptr", "cells_ptr") if op == "lstm" else ())
    # Read as the projected input, and written over it as what is saved; the GRU saves a tile more than it reads.
    gates = T * B * H * 2 * {"rnn": 1, "gru": 3 + 4, "lstm": 4 + 4}[op]
    assert said(forward)["bytes"] == gates + nbytes(forward.arguments, "y_ptr", "w_hh_ptr", "b_hh_ptr", *states)
    gradients = ("dy_ptr", "dh_gates_ptr", "dh_init_ptr", "h_init_ptr") + (("dx_gates_ptr",) if op == "gru" else ())
    if op != "rnn":
        gradients += ("saved_ptr",)
    if op == "lstm":
        gradients += ("cells_ptr", "c_init_ptr", "dc_init_ptr")
    assert said(backward)["bytes"] == nbytes(backward.arguments, "y_ptr", "w_hh_ptr", *gradients)


def test_packed_rows_count_and_no_others(launched):
    lengths = torch.tensor([5, 3, 2])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(T, 3, I, dtype=torch.float16), lengths)
    with torch.no_grad():
        nn.LSTM(I, H, dtype=torch.float16, backend="triton")(packed)
    assert total(launched, "flops16") == 2 * lengths.sum() * 4 * H * H


def test_a_single_step(launched):
    train("lstm", training=False, steps=1)
    (launch,) = launched
    assert launch.name == "recurrence_step_kernel"
    assert said(launch)["flops16"] == work.work("lstm", "forward", {"T": 1, "B": B, "I": I, "H": H}, 2).flops
    names = ("x", "w_ih", "b_ih", "w_hh", "b_hh", "h", "c", "y", "h_n", "c_n")
    assert said(launch)["bytes"] == nbytes(launch.arguments, *(f"{name}_ptr" for name in names))


def test_gates_made_again(launched):
    train("gru", recompute=True)
    rows = (3 + 3 + 1 + 4) * H
    (metrics,) = [said(launch) for launch in launched if launch.name == "pointwise_kernel"]
    assert metrics == {"flops16": 0, "bytes": 2 * T * B * rows}


# --- attention ------------------------------------------------------------------------------------------------


def attend(sizes, heads=(4, 4), training=True, **options):
    batch, M, N, D = sizes
    q = torch.randn(batch, heads[0], M, D, dtype=torch.float16, requires_grad=training)
    k, v = (torch.randn(batch, heads[1], N, D, dtype=torch.float16, requires_grad=training) for _ in range(2))
    out = functional.attention(q, k, v, enable_gqa=True, backend="triton", **options)
    if training:
        out.sum().backward()


CASES = {
    "plain": ((2, 40, 70, 64), (4, 4), {}, {}),
    "causal": ((2, 70, 70, 64), (4, 2), {"causal": "top_left"}, {"causal": True}),
    "window": ((1, 70, 70, 64), (4, 1), {"causal": "top_left", "window": (15, 0)}, {"causal": True, "window": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_does_what_the_model_has(launched, case):
    (batch, M, N, D), heads, options, model = CASES[case]
    attend((batch, M, N, D), heads, **options)
    sequences = [(M, N)] * batch
    inference = work.attention_work(sequences, heads, D, "forward", 2, **model)
    forward = next(said(launch) for launch in launched if launch.name == "attention_forward_kernel")
    # lse and what else forward leaves of each row.
    statistics = 3 * 4 * batch * heads[0] * M
    assert forward == {"flops16": inference.flops, "bytes": inference.bytes + statistics}
    # Each of backward's two kernels makes the score and the gradient of the weight.
    rebuilt = heads[0] * batch * work.visible_pairs(M, N, **model) * 2 * (D + D)
    training = work.attention_work(sequences, heads, D, "training", 2, **model)
    assert total(launched, "flops16") == training.flops + rebuilt


@pytest.mark.parametrize("left, right", [(None, None), (2, None), (None, 1), (3, 0)])
@pytest.mark.parametrize("diagonal", [-4, 0, 5])
def test_visible_pairs_by_hand(left, right, diagonal):
    distances = [n - m - diagonal for m in range(7) for n in range(11)]
    seen = [(left is None or d >= -left) and (right is None or d <= right) for d in distances]
    assert work.banded_pairs(7, 11, left, right, diagonal) == sum(seen)


def test_aligned_to_the_last_key(launched):
    attend((1, 3, 10, 64), training=False, causal="lower_right")
    assert total(launched, "flops16") == 4 * (8 + 9 + 10) * 4 * 64


def test_few_queries_over_many_keys(launched):
    attend((1, 1, 4000, 128), heads=(8, 2), training=False)
    inference = work.attention_work([(1, 4000)], (8, 2), 128, "forward", 2)
    assert {launch.name for launch in launched} == {"attention_decode_kernel", "attention_combine_kernel"}
    assert total(launched, "flops16") == inference.flops
    assert total(launched, "bytes", "decode") > inference.bytes - 2 * 8 * 128


def test_packed_sequences_count_as_equally_long(launched):
    ends = torch.tensor([0, 20, 40], dtype=torch.int32)
    q, k, v = (torch.randn(2, 40, 64, dtype=torch.float16) for _ in range(3))
    functional.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, backend="triton")
    assert total(launched, "flops16") == 2 * 2 * 20 * 20 * 4 * 64


def test_masks_and_averaged_weights(launched):
    mask = torch.randn(40, 70, dtype=torch.float16, requires_grad=True)
    attend((2, 40, 70, 64), attn_mask=mask, return_weights=None)
    assert total(launched, "flops16", "bias") == 4 * 2 * 40 * 70 * 2 * (64 + 64)
    plain = total(launched, "bytes", "forward")
    launched.clear()
    attend((2, 40, 70, 64), training=False, return_weights="average")
    assert plain - total(launched, "bytes", "forward") == 2 * 40 * 70, "the mask is read, too"
    assert total(launched, "flops16", "weights") == 4 * 2 * 40 * 70 * 2 * 64


# --- and who is told ------------------------------------------------------------------------------------------


def test_launches_tell_within_the_block_only():
    from seqcore.kernels.recurrence.pointwise import pointwise_kernel

    assert pointwise_kernel.launch_metadata is None
    with launch_work.counted():
        h = torch.zeros(2, 3, dtype=torch.float16)
        told = pointwise_kernel.launch_metadata(
            (1, 1), None, {"R": 2, "H": 3, "GATES": 3, "EXTRA": 0, "SAVED": 4, "HAS_C": False, "h_ptr": h}
        )
        assert told == {"flops16": 0, "bytes": 2 * 2 * 3 * (3 + 3 + 1 + 4)}
    assert pointwise_kernel.launch_metadata is None
