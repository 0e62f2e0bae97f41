"""Torch's recurrences as the yardstick: the same weights and inputs run by seqcore, and everything compared."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqcore.nn

from .comparisons import Results, assert_within, cotangents

# Each cell, by the torch.nn class and the options that select it; a projection takes half the width.
CELLS = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "lstm_proj": (nn.LSTM, {"proj_size": lambda hidden: (hidden + 1) // 2}),
}

# Each constructor flag by itself, and all of them.
FLAGS = {
    "plain": {},
    "layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
}

# The Cells, likewise.
SINGLE = {
    "rnn_tanh": (nn.RNNCell, {}),
    "rnn_relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "gru": (nn.GRUCell, {}),
    "lstm": (nn.LSTMCell, {}),
}


def torch_module(cell: str, inputs: int = 4, hidden: int = 3, **options) -> nn.RNNBase:
    """The torch.nn module that runs ``cell``."""
    kind, selecting = CELLS[cell]
    selecting = {name: value(hidden) if callable(value) else value for name, value in selecting.items()}
    return kind(inputs, hidden, **selecting, **options)


def ours(module: nn.Module, backend: str | None, *, blocks: int = 1, **options) -> nn.Module:
    """A seqcore module with the weights and options of another, torch's or ours, and ``options`` of our own.

    ``blocks`` draws recurrent weights anew.
    """
    module = copy.deepcopy(module)
    module.__class__ = getattr(seqcore.nn, type(module).__name__)
    for name, value in {"backend": backend, **options}.items():
        setattr(module, name, value)
    if blocks > 1:
        module._divide(blocks)
    return module


def initial_state(module: nn.RNNBase, batch: int | None, **options):
    """A random hx for ``module``; of no batch dimension if ``batch`` is None."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)
    h0 = torch.randn(layers, *middle, module.proj_size or module.hidden_size, **options)
    return (h0, torch.randn(layers, *middle, module.hidden_size, **options)) if module.mode == "LSTM" else h0


def problem(cell: str, T: int = 3, B: int = 5, I: int = 4, H: int = 31, dtype=torch.float32, device=None, **options):
    """A torch.nn module that runs ``cell``, and a random x and hx for it."""
    module = torch_module(cell, I, H, dtype=dtype, device=device, **options)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I, dtype=dtype, device=device)
    hx = initial_state(module, B, dtype=dtype, device=device)
    if cell == "rnn_relu" and dtype.itemsize == 2:
        keep_off_the_kink(module)
        x, hx = x.abs(), hx.abs()
    return module, x, hx


def keep_off_the_kink(module: nn.Module) -> None:
    """Make each unit of a relu recurrence always positive or always negative, given inputs that are not negative.

    In 16 bits a pre-activation near 0 falls on either side of it, and the gradient jumps.
    """
    with torch.no_grad():
        for weight in module.parameters():
            weight.abs_()[1::2].neg_()


def packed(x: Tensor, lengths: list[int], batch_first: bool = False) -> PackedSequence:
    """``x`` packed, its rows left in an order that is not by length if ``lengths`` is not."""
    falling = sorted(lengths, reverse=True) == lengths
    return pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=falling)


def masks(device=None) -> dict[str, Tensor]:
    """``lengths`` and ``reset`` for T=4 and B=5: unsorted, with none and all; cuts at every step, past ends, too."""
    reset = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1]], device=device).bool()
    return {"lengths": torch.tensor([2, 4, 0, 1, 3], device=device), "reset": reset}


def mapped(function, value):
    """``value``, a tensor, PackedSequence, None or tuple of these, with ``function`` applied to its tensors of data."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return function(value) if isinstance(value, Tensor) else tuple(mapped(function, part) for part in value)


def tensors(value) -> list[Tensor]:
    """The tensors of data in ``value``, as ``mapped`` meets them."""
    found: list[Tensor] = []
    mapped(found.append, value)
    return found


def results(module: nn.Module, x, hx=None, **keywords) -> Results:
    """Every output of ``module`` and every gradient of a fixed weighing of them, by name; 0 where there is none."""
    x, hx = (mapped(lambda t: t.detach().requires_grad_(), value) for value in (x, hx))
    outputs = tensors(module(x, hx, **keywords))
    inputs = tensors(x) + tensors(hx) + list(module.parameters())
    found = torch.autograd.grad(outputs, inputs, cotangents(outputs), materialize_grads=True)
    names = ("h", "c") if isinstance(module, nn.RNNCellBase) else ("y", "h_n", "c_n", "cells")
    states = ("x", "h0", "c0")[: 1 + len(tensors(hx))]
    parameters = [name for name, _ in module.named_parameters()]
    return dict(zip(names, outputs, strict=False)) | {
        f"gradient of {name}": gradient for name, gradient in zip((*states, *parameters), found, strict=True)
    }


def yardsticks(twin: nn.Module, x, hx=None, **keywords) -> tuple[Results, Results]:
    """What ``twin`` does in float64, and as it is: the truth, and the error there may be."""
    double = copy.deepcopy(twin).double()
    exact = results(double, *(mapped(lambda t: t.detach().double(), value) for value in (x, hx)), **keywords)
    return exact, results(twin, x, hx, **keywords)


def assert_alike(module: nn.Module, twin: nn.Module, x, hx=None, **keywords) -> None:
    """``module``, with the weights of ``twin``, does what ``twin`` does, as exactly as ``twin`` does it."""
    assert_within(results(module, x, hx, **keywords), *yardsticks(twin, x, hx, **keywords))


def differing(actual: Results, expected: Results) -> list[str]:
    """The names of what is not bitwise equal."""
    assert actual.keys() == expected.keys()
    return [name for name in actual if not torch.equal(actual[name], expected[name])]
