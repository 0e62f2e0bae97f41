"""The recurrence operators as torch.library sees them, and the autograd.Function around them."""

import contextlib

import pytest
import torch

from seqcore import InvalidInput, cells
from seqcore.autograd import recurrence as autograd
from seqcore.autograd.recurrence import RecurrenceFunction, Settings
from seqcore.ops import library
from seqcore.ops import recurrence as ops
from seqcore.reference.recurrence import group

from .recurrence_twins import ours, problem

T, B, I, H = 4, 3, 2, 6
DOUBLE = {"dtype": torch.float64}
BATCH_SIZES = torch.tensor([3, 2, 2, 1])
PADDED, PACKED = (None, None, None), (BATCH_SIZES, None, None)
MASKED = (
    None, torch.tensor([4, 2, 1]), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.3,
)  # fmt: skip

# cell, directions, bias, projection or 0, blocks, (batch_sizes, lengths, reset), further settings
LAYERS = {
    "rnn_tanh": ("rnn_tanh", 1, True, 0, 1, PADDED, {}),
    "rnn_relu_masked": ("rnn_relu", 2, False, 0, 1, MASKED, {"recompute": True}),
    "gru_packed": ("gru", 2, True, 0, 1, PACKED, {"recompute": True}),
    "gru_blocks": ("gru", 1, False, 0, 2, MASKED, {}),
    "lstm": ("lstm", 2, True, 0, 1, PADDED, {"return_cells": True}),
    "lstm_blocks_packed": ("lstm", 1, True, 0, 2, PACKED, {"recompute": True, "return_cells": True}),
    "lstm_proj_masked": ("lstm", 2, True, 3, 1, MASKED, {"return_cells": True}),
    "rnn_relu_zoneout": ("rnn_relu_zoneout", 2, True, 0, 1, PADDED, {}),
    "gru_zoneout_packed": ("gru_zoneout", 2, True, 0, 2, PACKED, {}),
    "lstm_zoneout_masked": ("lstm_zoneout", 2, True, 0, 1, MASKED, {"recompute": True, "return_cells": True}),
}


def layer(name, hidden=H, **options):
    """The settings, the tensors x, h0, c0 or None, weights and extra or None, and the layout of one of ``LAYERS``."""
    cell, directions, bias, projection, blocks, layout, settings = LAYERS[name]
    count, outputs, units = cells.find(cell).gates, projection or hidden, hidden // blocks
    gates = count * hidden
    recurrent = (gates, outputs) if blocks == 1 else (count, blocks, units, units)
    shapes = [(gates, I), recurrent, *([(gates,), (gates,)] if bias else [])]
    shapes += [(outputs, hidden)] if projection else []
    weights = [torch.randn(shape, **options) for _ in range(directions) for shape in shapes]
    x = torch.randn(*((int(BATCH_SIZES.sum()),) if layout[0] is not None else (T, B)), I, **options)
    c0 = torch.randn(directions, B, hidden, **options) if cells.find(cell).has_c else None
    h0 = torch.randn(directions, B, outputs, **options)
    taken = cells.find(cell).extra * hidden
    extra = torch.rand(directions, *x.shape[:-1], taken) < 0.4 if taken else None
    return Settings(cell, directions, bias, **settings), x, h0, c0, weights, extra, layout


def forward_arguments(name, save_gates=True, save_cells=True, **options):
    """Of ``ops.forward``, all by position but the last."""
    settings, x, h0, c0, weights, extra, layout = layer(name, **options)
    given = (settings.cell, x, h0, c0, weights, settings.directions, settings.bias, *layout, save_gates, save_cells)
    return given, {"extra": extra}


def gradients(results, every):
    """dy, dh_n, dc_n and dcells; of the c's only if there are any, and of every step's only if ``every``."""
    found = [torch.randn_like(t) if t.numel() else None for t in (*results[:3], results[4])]
    return found if every else [*found[:3], None]


@pytest.mark.parametrize("save", [(True, True), (False, True), (False, False)], ids=["save", "recompute", "no_save"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_operator(name, save):
    torch.library.opcheck(ops.forward.default, *forward_arguments(name, *save))


@pytest.mark.parametrize("recompute, clip, need_dx", [(False, None, True), (True, 0.1, False)], ids=["plain", "other"])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_operator(name, recompute, clip, need_dx):
    arguments, extra = forward_arguments(name, not recompute)
    results = ops.forward(*arguments, **extra)
    grads = gradients(results, every=need_dx)
    given = (*arguments[:-2], results[0], *results[3:], *grads, clip, need_dx)
    torch.library.opcheck(ops.backward.default, given, extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_fake_results_match_real_ones_in_every_dtype(dtype):
    arguments, _ = forward_arguments("lstm_proj_masked", dtype=dtype)
    real = ops.forward(*arguments)
    options = *gradients(real, every=True), 0.1, True
    real_backward = ops.backward(*arguments[:-2], real[0], *real[3:], *options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.forward(*arguments)
        fake_backward = ops.backward(*arguments[:-2], fake[0], *fake[3:], *options)
    for found, expected in zip(
        (*fake, *fake_backward[:3], *fake_backward[3]), (*real, *real_backward[:3], *real_backward[3]), strict=True
    ):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


# --- the autograd.Function -----------------------------------------------------------------------------------------


def function_and_inputs(name, hidden, grad_clip=None):
    """A function of the layer's differentiable tensors to its differentiable results, and those tensors."""
    settings, x, h0, c0, weights, extra, layout = layer(name, hidden, **DOUBLE)
    settings = settings._replace(grad_clip=grad_clip)

    def run(x, h0, *rest):
        c0, weights = (rest[0], rest[1:]) if cells.find(settings.cell).has_c else (None, rest)
        y, h_n, c_n, _, all_c, _ = RecurrenceFunction.apply(settings, True, x, h0, c0, *layout, extra, *weights)
        return (y, h_n) if c0 is None else (y, h_n, c_n, all_c)

    return run, [t.requires_grad_() for t in (x, h0, c0, *weights) if t is not None]


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_first_and_second_order(name):
    run, inputs = function_and_inputs(name, hidden=2 if LAYERS[name][3] == 0 else 4)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_an_output_changed_in_place(cell, bidirectional, by_the_operators):
    """As torch's LSTM it can be, and is missed only where backward needs it."""
    twin, x, hx = problem(cell, bidirectional=bidirectional)
    module, expected = ours(twin, None), ours(twin, None)(x, hx)[0] * 2
    y = module(x, hx)[0]
    assert torch.equal(y.mul_(2), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.no_grad():
        assert not module(x, hx)[0].zero_().any()


@pytest.mark.parametrize("name", LAYERS)
def test_backward_twice_over_a_kept_graph(name):
    run, inputs = function_and_inputs(name, H)
    loss = sum(out.square().sum() for out in run(*inputs))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("grad_clip", [None, 0.1], ids=["whole", "clipped"])
@pytest.mark.parametrize("name", LAYERS)
def test_create_graph_gives_the_same_gradients(name, grad_clip):
    run, inputs = function_and_inputs(name, H, grad_clip)
    plain = torch.autograd.grad(sum(out.square().sum() for out in run(*inputs)), inputs)
    with_graph = torch.autograd.grad(sum(out.square().sum() for out in run(*inputs)), inputs, create_graph=True)
    torch.testing.assert_close(plain, with_graph)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2)], ids=["y", "h_n", "c_n", "cells", "y_and_c_n"])
@pytest.mark.parametrize("create_graph", [False, True], ids=["hand_written", "reference"])
def test_loss_from_some_results_only(used, create_graph):
    run, inputs = function_and_inputs("lstm", H)
    loss = sum(run(*inputs)[index].square().sum() for index in used)
    every = run(*inputs)
    expected = sum((out.square().sum() if index in used else out.sum() * 0) for index, out in enumerate(every))
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs, create_graph=create_graph), torch.autograd.grad(expected, inputs)
    )


@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "weights"])
@pytest.mark.parametrize("create_graph", [False, True], ids=["hand_written", "reference"])
def test_gradient_for_some_inputs_only(wanted, create_graph):
    run, inputs = function_and_inputs("lstm", H)
    expected = dict(zip(("x", "h0", "c0", "weights"), torch.autograd.grad(run(*inputs)[0].sum(), inputs), strict=False))
    index = ("x", "h0", "c0", "weights").index(wanted)
    alone = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
    (gradient,) = torch.autograd.grad(run(*alone)[0].sum(), [alone[index]], create_graph=create_graph)
    torch.testing.assert_close(gradient, expected[wanted])


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("option", ["", "recompute", "return_cells"])
def test_forward_saves_only_for_a_backward_that_may_come(monkeypatch, grad_enabled, wanted, option):
    settings, x, h0, c0, weights, _, layout = layer("lstm")
    settings = Settings(*settings[:3], **{option: True} if option else {})
    asked = []
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *arguments: asked.append(arguments[-3:-1]) or forward(*arguments))
    with torch.set_grad_enabled(grad_enabled):
        grouped = group(weights, settings.directions, settings.bias)
        every_c = autograd.layer(settings, x.requires_grad_(wanted), h0, c0, *layout, grouped)[3]
    save = grad_enabled and wanted
    assert asked == [(save and option != "recompute", save or option == "return_cells")]
    assert (every_c is not None) == (option == "return_cells")


@pytest.mark.parametrize("name, extra, message", [
    ("gru_zoneout_packed", None, "cell 'gru_zoneout' takes 1 tiles as extra=, got none"),
    ("lstm", torch.zeros(2, T, B, H), r"cell 'lstm' takes 0 tiles as extra=, got \[2, 4, 3, 6\]"),
])  # fmt: skip
def test_what_a_cell_takes_besides_its_gates_must_be_there(name, extra, message):
    arguments, _ = forward_arguments(name)
    with pytest.raises(InvalidInput, match=message):
        ops.forward(*arguments, extra=extra)


def test_on_a_gpu_the_tensors_own_device_is_the_current_one(monkeypatch):
    """Triton launches on the current device, whatever tensors it is given."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(entered.append(device)))
    count = library._on_its_device(lambda *arguments: len(arguments))
    assert count("gru", torch.ones(1, device="meta"), None) == 3
    assert entered == [torch.device("meta")]
