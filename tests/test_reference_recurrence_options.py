"""What the reference recurrences have beyond torch.nn, against torch.nn put together otherwise, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import seqcore
from seqcore import InvalidInput, functional

from .comparisons import assert_equal_in_float64, cotangents
from .recurrence_twins import CELLS, initial_state, masks, ours, packed, results, tensors, torch_module

DOUBLE = {"dtype": torch.float64}
T, B, I, H = 4, 5, 3, 6
PLAIN = ["rnn_tanh", "rnn_relu", "gru", "lstm"]


# --- blocks ---------------------------------------------------------------------------------------------------------


def dense(blocks):
    """[G*H, H] of the [G, N, H/N, H/N]."""
    gates, count, units, _ = blocks.shape
    whole = blocks.new_zeros(gates, count, units, count, units)
    for n in range(count):
        whole[:, n, :, n] = blocks[:, n]
    return whole.reshape(gates * count * units, count * units)


@pytest.mark.parametrize("blocks", [2, 3, 6])
@pytest.mark.parametrize("cell", PLAIN)
def test_blocks_are_a_block_diagonal_matrix(cell, blocks):
    twin = torch_module(cell, I, H, num_layers=2, bidirectional=True, **DOUBLE)
    module = ours(twin, "reference", blocks=blocks)
    assert module.weight_hh_l1.shape == (twin.weight_hh_l1.shape[0] // H, blocks, H // blocks, H // blocks)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            getattr(twin, name).copy_(dense(weight) if weight.dim() == 4 else weight)
    x, hx = torch.randn(T, B, I, **DOUBLE), initial_state(twin, B, **DOUBLE)
    found, expected = results(module, x, hx), results(twin, x, hx)
    for name, weight in module.named_parameters():
        if weight.dim() == 4:
            gradient = expected[f"gradient of {name}"].view(-1, blocks, H // blocks, blocks, H // blocks)
            expected[f"gradient of {name}"] = gradient.diagonal(dim1=1, dim2=3).movedim(-1, 1)
    assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("blocks", [0, 4, -1, 2.0])
def test_blocks_must_divide(blocks):
    with pytest.raises(ValueError, match=f"blocks must divide hidden_size 6, got {blocks}"):
        seqcore.nn.GRU(I, H, blocks=blocks)
    with pytest.raises(ValueError, match="blocks and proj_size do not go together"):
        seqcore.nn.LSTM(I, H, blocks=2, proj_size=2)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (3, 2, 3, 2), (3, 2, 3)], ids=str)
def test_bad_blocks(shape):
    weights = [torch.zeros(18, I), torch.zeros(shape), torch.zeros(18), torch.zeros(18)]
    with pytest.raises(InvalidInput, match=r"GRU: w_hh .*in blocks (must be )?\[3, N, H/N, H/N\], got"):
        functional.gru(torch.zeros(T, B, I), None, weights)


# --- grad_clip ------------------------------------------------------------------------------------------------------


def clipped_loop(module, x, hx, bound):
    """One layer, one direction of ``module``, with a hook on each step's pre-activations."""
    w_ih, w_hh, b_ih, b_hh = module.parameters()
    state = tuple(s[0] for s in tensors(hx))
    outputs = []
    for x_t in x:
        x_gates, h_gates = x_t @ w_ih.T + b_ih, state[0] @ w_hh.T + b_hh
        for gates in (x_gates, h_gates):
            gates.register_hook(lambda gradient: gradient.clamp(-bound, bound))
        if module.mode == "LSTM":
            i, f, g, o = (x_gates + h_gates).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = o.sigmoid() * c.tanh(), c
        elif module.mode == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x_gates.chunk(3, -1), h_gates.chunk(3, -1)
            z = (x_z + h_z).sigmoid()
            state = ((1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * state[0],)
        else:
            state = ((x_gates + h_gates).tanh() if module.mode == "RNN_TANH" else (x_gates + h_gates).relu(),)
        outputs.append(state[0])
    return [torch.stack(outputs), *(s[None] for s in state)]


@pytest.mark.parametrize("bound", [0.02, 100.0])
@pytest.mark.parametrize("cell", PLAIN)
def test_grad_clip_bounds_each_step_before_it_travels_on(cell, bound):
    module = ours(torch_module(cell, I, H, **DOUBLE), "reference", grad_clip=bound)
    x, hx = torch.randn(T, B, I, **DOUBLE), initial_state(module, B, **DOUBLE)
    found = results(module, x, hx)
    inputs = [t.detach().requires_grad_() for t in (x, *tensors(hx))] + list(module.parameters())
    outputs = clipped_loop(module, inputs[0], tuple(inputs[1 : 1 + len(tensors(hx))]), bound)
    gradients = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    assert_equal_in_float64(found, dict(zip(found, [*outputs, *gradients], strict=True)))
    free = results(ours(module, "reference", grad_clip=None), x, hx)
    alike = all(torch.allclose(found[name], free[name]) for name in found)
    assert alike == (bound == 100.0)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), "1"])
def test_bad_bounds(bound):
    module = seqcore.nn.GRU(I, H)
    module.grad_clip = bound
    with pytest.raises(InvalidInput, match="GRU: grad_clip must be a positive number, got"):
        module(torch.zeros(T, B, I))
    with pytest.raises(InvalidInput, match="GRU: grad_clip must be a positive number, got"):
        seqcore.nn.GRU(I, H, grad_clip=bound)


# --- return_cells ---------------------------------------------------------------------------------------------------


def prefixes(module, x, hx):
    """Every step's c of a plain LSTM, as the final states of all beginnings of x."""
    return torch.stack([module(x[: t + 1], hx)[1][1][-1] for t in range(x.shape[0])])


@pytest.mark.parametrize("cell", ["lstm", "lstm_proj"])
def test_every_c_is_the_final_one_of_each_beginning(cell):
    twin = torch_module(cell, I, H, num_layers=2, **DOUBLE)
    module, x, hx = ours(twin, "auto"), torch.randn(T, B, I, **DOUBLE), initial_state(twin, B, **DOUBLE)
    y, state, every = module(x, hx, return_cells=True)
    torch.testing.assert_close((y, state), twin(x, hx))
    torch.testing.assert_close(every, prefixes(twin, x, hx))


def test_every_c_comes_in_the_layout_of_y():
    """Both directions side by side, zero past a sequence's end, batch first, unbatched, and packed in any order."""
    twin = torch_module("lstm", I, H, bidirectional=True, **DOUBLE)
    module, x, lengths = ours(twin, "reference"), torch.randn(T, B, I, **DOUBLE), [2, 4, 1, 4, 3]
    _, (_, c_n), every = module(x, lengths=torch.tensor(lengths), return_cells=True)
    assert every.shape == (T, B, 2 * H)
    for b, length in enumerate(lengths):
        assert torch.equal(every[length - 1, b, :H], c_n[0, b]) and torch.equal(every[0, b, H:], c_n[1, b])
        assert not every[length:, b].any() and every[:length, b].all()
        torch.testing.assert_close(module(x[:length, b], return_cells=True)[2], every[:length, b])
    in_rows = module(packed(x, lengths), return_cells=True)[2]
    assert isinstance(in_rows, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(in_rows)[0], every)
    module.batch_first = True
    given = {"lengths": torch.tensor(lengths), "return_cells": True}
    assert torch.equal(module(x.transpose(0, 1), **given)[2], every.transpose(0, 1))


def test_only_cells_with_c_return_it():
    weights = torch_module("gru", I, H)._flat_weights
    with pytest.raises(InvalidInput, match="return_cells=True needs a cell with c"):
        functional.recurrence(torch.zeros(T, B, I), None, weights, cell="gru", return_cells=True)


# --- options together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_changes_nothing_here(cell):
    module = ours(torch_module(cell, I, H, bidirectional=True, **DOUBLE), "reference")
    x, hx = torch.randn(T, B, I, **DOUBLE), initial_state(module, B, **DOUBLE)
    found = results(ours(module, "auto", recompute=True), x, hx, **masks())
    assert_equal_in_float64(found, results(module, x, hx, **masks()))


@pytest.mark.parametrize("option", [{"grad_clip": 1.0}, {"recompute": True}, {"blocks": 2}], ids=str)
def test_what_torch_lacks_is_not_asked_of_it(option):
    module, x = seqcore.nn.LSTM(I, H, backend="aten", **option), torch.zeros(T, B, I)
    name = next(iter(option))
    with pytest.raises(seqcore.UnsupportedInput, match=f"torch's lstm has no {name}"):
        module(x)
    assert f", {name}={option[name]!r}, backend='aten')" in repr(module)
    [explanation] = seqcore.explain(seqcore.nn.LSTM(I, H, **option), x)
    assert explanation.chosen == "reference"


def test_the_options_outlive_copies_and_state_dicts():
    module = seqcore.nn.GRU(I, H, num_layers=2, blocks=3, grad_clip=0.5, recompute=True)
    assert all(weight.abs().max() > 0 for weight in module.parameters())
    twin = ours(module, None)
    assert (twin.blocks, twin.grad_clip, twin.recompute) == (3, 0.5, True)
    fresh = seqcore.nn.GRU(I, H, num_layers=2, blocks=3)
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    assert torch.equal(fresh(x)[0], module(x)[0]) and torch.equal(twin(x)[0], module(x)[0])
    swapped = nn.GRU(I, H)
    swapped.__class__ = seqcore.nn.GRU
    assert (swapped.blocks, swapped.grad_clip, swapped.recompute) == (1, None, False)
    swapped(x)
