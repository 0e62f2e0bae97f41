"""seqcore.nn.MultiheadAttention with what torch's has not: rotary and ALiBi; and its averaged weights."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import seqcore
from seqcore import InvalidInput, UnsupportedInput
from seqcore.nn import MultiheadAttention, RotaryPositions
from seqcore.testing.budget import assert_within_budget

from .attention_twins import operands, qkv
from .comparisons import assert_equal_in_float64
from .transformer_twins import (
    HEADS,
    B,
    E,
    M,
    N,
    additive,
    assert_like_torch,
    causal_mask,
    inputs,
    may_not,
    results,
    swapped,
    torch_module,
)

POSITIONS = {"rotary": {"rotary": True}, "alibi": {"alibi": True}, "both": {"rotary": True, "alibi": True}}
OURS = ["auto", "reference"]
SERVING = [*OURS, pytest.param("triton", marks=pytest.mark.kernels)]
KINDS = {"no weights": {"need_weights": False}, "averaged": {}, "per head": {"average_attn_weights": False}}


def with_rotary(**options) -> MultiheadAttention:
    return MultiheadAttention(E, HEADS, rotary=RotaryPositions(E // HEADS), **options)


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("backend", SERVING)
def test_positions_equal_them_spelt_out(backend, positions, kind, masked, device):
    theirs = torch_module(batch_first=masked).to(device)
    mask = {"attn_mask": additive(M, M).to(device)} if masked else {}
    assert_like_torch(theirs, backend, inputs(theirs, "self"), positions, **mask, **KINDS[kind])


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_positions_with_the_causal_hint(positions):
    theirs = torch_module()
    hint = {"attn_mask": causal_mask(M), "is_causal": True, "need_weights": False}
    assert_like_torch(theirs, "auto", inputs(theirs, "self"), positions, **hint)


def test_slopes_are_as_exact_as_the_scores():
    """12 heads, whose slopes no float holds exactly; and a default dtype that holds hardly any."""
    theirs, x = nn.MultiheadAttention(24, 12).double(), torch.randn(40, 1, 24, dtype=torch.float64) * 3
    module = swapped(theirs, "reference", alibi=True)
    expected = module(x, x, x)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(module(x, x, x)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)
    slopes = seqcore.functional.alibi_slopes(12, dtype=torch.float64)
    distance = (torch.arange(40)[:, None] - torch.arange(40)).abs()
    bias = (-slopes[:, None, None] * distance).double()
    torch.testing.assert_close(theirs(x, x, x, attn_mask=bias)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"kdim": 4, "vdim": 5}, {"bias": False}], ids=["", "widths", "no bias"])
def test_positions_take_no_room_in_checkpoints(flags):
    theirs = nn.MultiheadAttention(E, HEADS, **flags)
    module = with_rotary(alibi=True, **flags)
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    module.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(module.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_keep_positions(duplicate):
    module = swapped(torch_module(), "reference", rotary=True, alibi=True)
    twin, given = duplicate(module), inputs(module, "self")
    assert twin.alibi and twin.rotary.head_dim == E // HEADS and twin.rotary is not module.rotary
    assert torch.equal(twin(*given)[0], module(*given)[0])


def test_positions_are_assigned_and_taken_away():
    module, given = MultiheadAttention(E, HEADS), [torch.randn(M, B, E)] * 3
    plain, rotary, alibi = module(*given)[0], with_rotary(), MultiheadAttention(E, HEADS, alibi=True)
    for other in (rotary, alibi):
        other.load_state_dict(module.state_dict())
    module.rotary = RotaryPositions(E // HEADS)
    assert torch.equal(module(*given)[0], rotary(*given)[0]) and not torch.equal(module(*given)[0], plain)
    module.rotary = None
    assert torch.equal(module(*given)[0], plain)
    module.alibi = True
    assert torch.equal(module(*given)[0], alibi(*given)[0]) and not torch.equal(module(*given)[0], plain)


def test_an_instance_made_by_torch_has_neither():
    module = swapped(torch_module(), "auto")
    del module.__dict__["alibi"], module.__dict__["backend"]
    assert module.rotary is None and module.alibi is False and module.backend is None
    module(*inputs(module))


def test_repr_names_positions():
    module = with_rotary(alibi=True, backend="reference")
    assert all(text in repr(module) for text in ("alibi=True", "(rotary): RotaryPositions(10", "backend='reference'"))
    assert not any(text in repr(MultiheadAttention(E, HEADS)) for text in ("alibi", "otary"))


@pytest.mark.parametrize("rotary, got", [(RotaryPositions(8), r"RotaryPositions\(8"), (True, "True")])
def test_a_rotary_of_another_width_is_refused(rotary, got):
    with pytest.raises(InvalidInput, match=rf"rotary must be RotaryPositions of head_dim 10 .* got {got}"):
        MultiheadAttention(E, HEADS, rotary=rotary)


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("flag", ["add_bias_kv", "add_zero_attn"])
def test_keys_without_position_are_refused(flag, positions):
    module = swapped(torch_module(**{flag: True}), "auto", **positions)
    with pytest.raises(InvalidInput, match=f"belong to no position, do not go with {', '.join(positions)}"):
        module(*inputs(module))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_aten_never_forgets_positions(training):
    theirs = torch_module().double().train(training)
    given = [torch.randn(M, B, E, dtype=torch.float64)] * 3
    for named in ("aten", None):
        module = swapped(theirs, named, rotary=True)
        with seqcore.use_backend("aten"):
            found = results(module, given, need_weights=False)
            with pytest.raises(UnsupportedInput, match="has no weights"):
                module(*given)
            with pytest.raises(UnsupportedInput, match="has no alibi_slopes"):
                swapped(theirs, named, alibi=True)(*given, need_weights=False)
        expected = results(swapped(theirs, "reference", rotary=True), given, need_weights=False)
        assert_equal_in_float64(found, expected)


# --- averaged weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("flags", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["", "extra keys"])
@pytest.mark.parametrize("backend", SERVING)
def test_averaged_weights_in_training_with_masks(backend, flags, kind, device):
    theirs = torch_module(**flags).train().to(device)
    make = may_not if kind == "bool" else additive
    masks = {"attn_mask": make(B * HEADS, M, N).to(device), "key_padding_mask": make(B, N).to(device)}
    assert_like_torch(theirs, backend, inputs(theirs), **masks)


@pytest.mark.parametrize("backend", SERVING)
def test_averaged_weights_are_the_mean_of_dropped_ones(backend, device):
    theirs = torch_module(dropout=0.5).train().to(device)
    given = inputs(theirs)

    def found(module, dtype, average):
        torch.manual_seed(5)
        return module.to(dtype)(*(t.to(dtype) for t in given), average_attn_weights=average)

    reference = swapped(theirs, "reference")
    exact, eager = (found(copy.deepcopy(reference), dtype, False) for dtype in (torch.float64, torch.float32))
    for actual, e, s in zip(found(swapped(theirs, backend), torch.float32, True), exact, eager, strict=True):
        average = lambda t, like=actual: t if t.shape == like.shape else t.mean(1)
        assert_within_budget(actual, average(e), average(s))
    assert (exact[1] == 0).any() and (exact[1] != 0).any()


@pytest.mark.parametrize("kind", ["averaged", "per head"])
@pytest.mark.parametrize("backend", SERVING)
def test_a_loss_of_the_weights_alone(backend, kind, device):
    theirs = torch_module().to(device)
    assert_like_torch(theirs, backend, inputs(theirs), weigh=("weights",), **KINDS[kind])


def largest_allocation(run) -> int:
    """Bytes of the largest allocation that torch made in ``run``, inside its operators, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    return max(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")


def test_averaging_makes_no_matrix_of_each_head():
    heads, size = 16, 48
    settings, tensors = operands(*qkv(1, heads, M=size, N=size, D=2))
    forward, weights = torch.ops.seqcore.attention_forward, torch.ops.seqcore.attention_weights
    rows, matrix = forward(*tensors, *settings)[2], 4 * size * size
    assert largest_allocation(lambda: weights(rows, *tensors, *settings)) < 3 * matrix
    # What a matrix of each head looks like.
    assert largest_allocation(lambda: forward(*tensors, *settings)) >= heads * matrix


@pytest.mark.kernels
@pytest.mark.parametrize("average", [True, False], ids=["average", "per head"])
def test_no_matrix_of_each_head_forward_and_backward(average, device):
    heads, size = 8, 32
    # Without bias: with it, cuBLAS on a GPU takes a workspace for each product.
    module = MultiheadAttention(2 * heads, heads, bias=False, backend="triton", device=device)
    x, mask = torch.randn(size, 1, 2 * heads, device=device), causal_mask(size).to(device)

    def run():
        out, weights = module(x, x, x, attn_mask=mask, average_attn_weights=average)
        (out.sum() + weights.square().sum()).backward()

    run()
    assert (largest_allocation(run) < 3 * 4 * size * size) == average
