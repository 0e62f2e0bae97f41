"""The recurrences' functions and modules given anything at all: the reference's result, or an error that helps.

A valid call with one or two of its arguments replaced by something arbitrary either does what the reference does, or
raises InvalidInput or UnsupportedInput, which say what they got; or else what ``torch.nn`` raises for the same.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seqcore
from seqcore import InvalidInput, UnsupportedInput, functional
from seqcore.cells import LSTM as LSTM_STEP
from seqcore.diagnostics import gradient_flow, step_jacobians
from seqcore.nn import init

from .comparisons import Results, assert_equal_in_float64
from .effort import drawn, seeded
from .recurrence_twins import packed, tensors
from .routes import by_the_operators

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

T, B, I, H = 3, 2, 5, 4
DOUBLE = {"dtype": torch.float64}
with seeded():
    X, STATE = torch.randn(T, B, I, **DOUBLE), torch.randn(1, B, H, **DOUBLE)
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
FLAGS = {"bias": True, "batch_first": False, "training": False, "bidirectional": False, "recompute": False}
SIZES = {"input_size": I, "hidden_size": H, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
OURS = {"blocks": 1, "grad_clip": None, "recompute": False, "locked": False, "zoneout": 0.0, "backend": None}


@seeded()
def weights(kind: str) -> list[Tensor]:
    rows = GATES[kind] * H
    return [torch.randn(rows, width, **DOUBLE) for width in (I, H)] + [torch.randn(rows, **DOUBLE) for _ in "ih"]


def state(kind: str, t: Tensor = STATE) -> Tensor | tuple[Tensor, Tensor]:
    return (t, t + 1) if kind == "lstm" else t


def of_function(kind: str) -> dict[str, Any]:
    masks = {"lengths": torch.tensor([3, 1]), "reset": torch.zeros(T, B, dtype=torch.bool), "reset_hx": state(kind)}
    numbers = {"num_layers": 1, "dropout": 0.0, "grad_clip": None, "locked": False, "zoneout": 0.0, "backend": None}
    own = {"rnn": {"nonlinearity": "tanh"}, "gru": {}, "lstm": {"return_cells": True}}[kind]
    return {"input": X, "hx": state(kind), "weights": weights(kind)} | masks | FLAGS | numbers | own


def without_masks(kind: str) -> dict[str, Any]:
    beyond = ("lengths", "reset", "reset_hx", "return_cells")
    return {name: value for name, value in of_function(kind).items() if name not in beyond}


def of_step(kind: str) -> dict[str, Any]:
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    own = {"nonlinearity": "tanh"} if kind == "rnn" else {}
    given = {"input": X[0], "hx": state(kind, STATE[0]), "backend": None}
    return given | dict(zip(names, weights(kind), strict=True)) | own


@seeded()
def module(kind: str, **options: Any) -> nn.Module:
    return getattr(seqcore.nn, kind)(I, H, **DOUBLE, **options)


def used(made: nn.Module, *inputs: Any) -> Any:
    """What a module that could be made does with an input."""
    repr(made)
    return made(*inputs)


def truncated(**arguments: Any) -> list[Any]:
    return list(seqcore.truncated_bptt(**arguments))


class OfTheUser(Exception):
    """Raised by a function that was handed in: it is let through."""


def guarded(function: Any) -> Any:
    """``function``, what it raises being the user's own."""
    if not callable(function) or isinstance(function, nn.Module):
        return function

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise OfTheUser from error

    return call


def advance(x: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(x[:, :H] + s)


# Each function: what calls it, its valid arguments, and torch's own if there is one that takes the same.
TARGETS: dict[str, tuple[Callable, dict[str, Any], Callable | None]] = {
    **{f"functional.{kind}": (getattr(functional, kind), of_function(kind), None) for kind in GATES},
    # Those that torch's own operators can serve.
    **{
        f"functional.{kind} without masks": (getattr(functional, kind), without_masks(kind), None) for kind in GATES
    },
    "functional.recurrence": (functional.recurrence, of_function("lstm") | {"cell": "lstm"}, None),
    **{f"functional.{kind}_cell": (getattr(functional, f"{kind}_cell"), of_step(kind), None) for kind in GATES},
    "functional.locked_dropout": (
        functional.locked_dropout, {"input": X, "p": 1.0, "training": True, "batch_first": False}, None
    ),
    "nn.LockedDropout": (
        lambda input, **options: used(seqcore.nn.LockedDropout(**options), input),
        {"input": X, "p": 1.0, "batch_first": False}, None,
    ),
    **{
        f"nn.{kind}": (
            lambda _kind=kind, **options: used(getattr(seqcore.nn, _kind)(**options, **DOUBLE), X), SIZES | OURS,
            lambda _kind=kind, **options: getattr(nn, _kind)(
                **{name: value for name, value in options.items() if name not in OURS}, **DOUBLE
            )(X),
        )
        for kind in ("RNN", "GRU", "LSTM")
    },
    **{
        f"nn.{kind}()": (
            module(kind),
            {arg: of_function(kind.lower())[arg] for arg in ("input", "hx", "lengths", "reset", "reset_hx")}, None,
        )
        for kind in ("RNN", "GRU", "LSTM")
    },
    **{
        f"nn.{kind}Cell": (
            lambda _kind=f"{kind}Cell", **options: used(getattr(seqcore.nn, _kind)(**options, **DOUBLE), X[0]),
            {"input_size": I, "hidden_size": H, "bias": True, "backend": None},
            lambda _kind=f"{kind}Cell", backend=None, **options: getattr(nn, _kind)(**options, **DOUBLE)(X[0]),
        )
        for kind in ("RNN", "GRU", "LSTM")
    },
    **{
        f"nn.{kind}Cell()": (module(f"{kind}Cell"), {"input": X[0], "hx": state(kind.lower(), STATE[0])}, None)
        for kind in ("RNN", "GRU", "LSTM")
    },
    "nn.init.orthogonal_recurrent_": (
        init.orthogonal_recurrent_, {"module": module("LSTM"), "gain": 1.0, "generator": None}, None
    ),
    "nn.init.forget_gate_bias_": (init.forget_gate_bias_, {"module": module("GRU"), "value": 1.0}, None),
    "Cell": (
        seqcore.Cell,
        {
            "name": "drawn", "gates": 4, "states": ("h", "c"), "step": LSTM_STEP.step,
            "step_backward": LSTM_STEP.step_backward, "reference": LSTM_STEP.reference,
            "reference_backward": LSTM_STEP.reference_backward, "apart": False, "saves_output": False,
        },
        None,
    ),
    "truncated_bptt": (
        truncated,
        {
            "module": module("LSTM"), "input": X, "steps": 2, "hx": state("lstm"), "lengths": torch.tensor([3, 1]),
            "reset": torch.zeros(T, B, dtype=torch.bool),
        },
        None,
    ),
    "diagnostics.step_jacobians": (
        lambda step, **given: step_jacobians(guarded(step), **given).verdict,
        {"step": advance, "x": X, "state": STATE[0], "decades": 3.0}, None,
    ),
    "diagnostics.gradient_flow": (
        lambda model, x, loss, **given: str(gradient_flow(model, x, loss=guarded(loss), **given)),
        {"model": nn.Sequential(module("GRU")), "x": X, "loss": lambda out: out[0].sum(), "watch": (), "decades": 3.0},
        None,
    ),
}  # fmt: skip

PACKED_WRONG = torch.nn.utils.rnn.PackedSequence(
    X.flatten(0, 1), torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
)
READ_ONLY = np.array([3, 1])
READ_ONLY.flags.writeable = False
THINGS = [
    None, True, False, 0, 1, 2, -1, 2**70, -(2**70), 10**400, 0.5, -0.5, 1.5, math.nan, math.inf, 1j, "tanh", "lstm",
    "reference", "", b"h", [], (), {}, [1, 2], [3, 1], [2**70, 1], [0.5, 1.0], [None, None], {1, 2}, {"h": 1}, object(),
    len, lambda *_: None, torch.float32, torch.device("meta"), torch.Generator(), np.float32(0.5), np.int64(1),
    np.array([3, 1]), np.array(["a", "b"]), range(2), module("GRU"), packed(X, [3, 1]),
    torch.nn.utils.rnn.PackedSequence(X.flatten(0, 1), torch.tensor([2, 2, 1])),
    torch.nn.utils.rnn.PackedSequence(X.flatten(0, 1), torch.tensor([2.0, 2.0, 2.0])),
    torch.nn.utils.rnn.PackedSequence(
        X.flatten(0, 1), torch.tensor([2, 2, 2]), torch.tensor([0, 5]), torch.tensor([0, 0])
    ),
    PACKED_WRONG, READ_ONLY,
    torch.nested.nested_tensor([X[:2, 0], X[:, 1]], layout=torch.jagged, **DOUBLE),
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.uint16, torch.uint64, torch.bool, torch.complex64,
]  # fmt: skip
# What becomes of a tensor among valid arguments.
SPOILT = [
    *[lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES],
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t[..., :-1], lambda t: t[:0], lambda t: t[None],
    lambda t: t.flatten(), lambda t: t.T if t.dim() == 2 else t.mT if t.dim() > 2 else t.flip(0), lambda t: (t, t),
    lambda t: [t], lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t * math.nan, lambda t: t + 100,
    lambda t: t[..., :1].expand(t.shape),
]  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, B, T, H, I, 4 * H]), max_size=4)


@dataclass(frozen=True)
class Spoil:
    """What stands for the valid argument, made another by ``how``."""

    how: Callable


arbitrary = (
    st.sampled_from(THINGS)
    | st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, st.sampled_from(DTYPES))
    | st.sampled_from(SPOILT).map(Spoil)
)


def spoilt(value: Any, how: Callable) -> Any:
    if isinstance(value, (tuple, list)):
        # The last one of several.
        return type(value)([*value[:-1], *(spoilt(part, how) for part in value[-1:])])
    return how(value) if isinstance(value, Tensor) else value


def replacement(valid: Any, value: Any) -> Any:
    return spoilt(valid, value.how) if isinstance(value, Spoil) else value


def attempt(function: Callable, arguments: dict[str, Any]) -> list[Tensor] | Exception:
    torch.manual_seed(0)
    try:
        made = function(**arguments)
    except Exception as error:
        return error
    return tensors(made) if isinstance(made, (tuple, list, Tensor)) and all(map(takes, made)) else []


def takes(part: Any) -> bool:
    return isinstance(part, (Tensor, torch.nn.utils.rnn.PackedSequence)) or (
        isinstance(part, tuple) and all(map(takes, part))
    )


def assert_helps(error: Exception) -> None:
    """It says what, what it got, and what is allowed or what to do."""
    said = str(error)
    assert re.search(r"\bgot\b|does not match", said) and re.search(r"[;,.]|\bmust\b|\bneeds\b|\ballowed\b", said), said


def hold(name: str, arguments: dict[str, Any]) -> None:
    """A call of ``TARGETS`` by ``name`` does what the reference does, or raises what it may."""
    function, _, theirs = TARGETS[name]
    # Of which torch's constructor makes one after the other.
    layers = arguments.get("num_layers") if name.startswith("nn.") else None
    if isinstance(layers, int) and layers > 2:
        return
    found = attempt(function, arguments)
    if isinstance(found, (InvalidInput, UnsupportedInput)):
        assert_helps(found)
    elif isinstance(found, Exception) and not isinstance(found, OfTheUser):
        expected = None if theirs is None else attempt(theirs, arguments)
        assert type(found) is type(expected), repr(found)
    elif isinstance(found, list) and arguments.get("backend") is None and all(map(comparable, found)):
        with seqcore.use_backend("reference"):
            expected = attempt(function, arguments)
        with by_the_operators():
            by_hand = attempt(function, arguments)
        for other in (found, by_hand):
            assert_equal_in_float64(told_apart(other), told_apart(expected))


def comparable(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float64


def told_apart(found: list[Tensor]) -> Results:
    """The numbers of a result, and where they are none."""
    nan = {f"nan {index}": t.isnan() for index, t in enumerate(found)}
    return nan | {f"value {index}": t.detach().nan_to_num() for index, t in enumerate(found)}


@drawn(150, 3_000, name=st.sampled_from(list(TARGETS)), data=st.data())
def test_anything_else_is_taken_as_the_reference_or_refused(name, data):
    valid = TARGETS[name][1]
    arguments = dict(valid)
    for argument in data.draw(st.lists(st.sampled_from(list(valid)), min_size=1, max_size=2, unique=True)):
        arguments[argument] = replacement(valid[argument], data.draw(arbitrary, label=argument))
    hold(name, arguments)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_calls_are_valid(name):
    """Without this, all of the above could be refused for one argument that is always wrong."""
    function, valid, _ = TARGETS[name]
    assert not isinstance(attempt(function, valid), Exception)
    hold(name, valid)


@pytest.mark.parametrize("kind", GATES)
def test_torchs_own_operators_are_met(kind):
    """Where nothing else serves, the reference would be compared with itself."""
    function, valid, _ = TARGETS[f"functional.{kind} without masks"]
    [explanation] = seqcore.explain(function, **valid)
    assert explanation.chosen == "aten"


# What was found by drawing: a call's arguments that raised something else, warned, or were taken.
UNMASKED = {"lengths": None, "reset": None, "reset_hx": None}
FOUND = {
    "no number as dropout": ("functional.lstm", {"dropout": None}),
    "layers in words": ("functional.gru", {"num_layers": "two"}),
    "a flag of several": ("functional.lstm", {"bias": torch.ones(2, dtype=torch.bool)}),
    "no weights": ("functional.lstm", {"weights": None}),
    "no w_ih": ("functional.lstm_cell", {"w_ih": None}),
    "a clip beyond floats": ("functional.gru", {"grad_clip": 10**400}),
    "an array as nonlinearity": ("functional.rnn", {"nonlinearity": np.array(["tanh", "relu"])}),
    "an array as backend": ("functional.rnn", {"backend": np.array(["auto", "aten"])}),
    "a list as cell": ("functional.recurrence", {"cell": []}),
    "sparse": ("functional.gru", {"input": X.to_sparse()}),
    "no units": (
        "functional.gru", {"hx": None, "bias": False, "weights": [X[0, :0], torch.ones(0, 0, **DOUBLE)]} | UNMASKED
    ),
    "no blocks": (
        "functional.gru",
        {"hx": None, "bias": False, "weights": [X[0, :0], torch.ones(3, 0, 2, 2, **DOUBLE)]} | UNMASKED,
    ),
    "a packed order that is too long": ("nn.LSTM()", {"input": PACKED_WRONG, "hx": None} | UNMASKED),
    "lengths beyond int64": ("functional.lstm", {"lengths": [2**70, 1]}),
    "unsigned lengths": ("functional.lstm", {"lengths": torch.tensor([3, 1], dtype=torch.uint16)}),
    "lengths that cannot be written": ("functional.lstm", {"lengths": READ_ONLY}),
    "lengths of chunks in words": ("truncated_bptt", {"lengths": "long"}),
    "lengths of chunks as a mask": ("truncated_bptt", {"lengths": torch.ones(B, dtype=torch.bool)}),
    "sparse chunks": ("truncated_bptt", {"input": X.to_sparse()}),
    "a generator in words": ("nn.init.orthogonal_recurrent_", {"generator": "seed"}),
    "a gain beyond int64": ("nn.init.orthogonal_recurrent_", {"gain": 2**70}),
    "a gain beyond floats": ("nn.init.orthogonal_recurrent_", {"gain": 10**400}),
    "a cell without a reference": ("Cell", {"reference": None}),
    "a cell of many gates": ("Cell", {"gates": 10**12}),
    "a cell of no name": ("Cell", {"name": []}),
    "a cell that returns no tuples": ("Cell", {"name": "untupled", "reference": lambda x, h, s: (None, None)}),
    "a step that returns nothing": ("diagnostics.step_jacobians", {"step": lambda x, s: None}),
    "a number as state": ("diagnostics.step_jacobians", {"state": 5}),
    "no state at all": ("diagnostics.step_jacobians", {"state": ()}),
    "decades in words": ("diagnostics.step_jacobians", {"decades": "three"}),
    "a number to watch": ("diagnostics.gradient_flow", {"watch": 5}),
    "blocks that are not blocks": ("nn.GRU", {"blocks": 3}),
}  # fmt: skip
# Not wrong at all.
TAKEN = ("lengths that cannot be written", "a gain beyond int64")


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found(found):
    name, replaced = FOUND[found]
    function, valid, _ = TARGETS[name]
    hold(name, valid | replaced)
    if found not in TAKEN:
        with pytest.raises(InvalidInput):
            function(**valid | replaced)
