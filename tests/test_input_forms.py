"""Inputs and states as they come: strided, expanded, of several dtypes; taken or refused as torch.nn's modules do."""

import itertools

import pytest
import torch
from torch import nn

from seqcore import InvalidInput

from .comparisons import assert_equal_in_float64
from .every_module import EVERY, STEPS, WIDTH, given, outputs, twin
from .recurrence_twins import initial_state, mapped, ours, results, tensors

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DOUBLE = {"dtype": torch.float64}
RECURRENT = [name for name in EVERY if name != "attention"]

# Tensors of the same shape as what they are given, that do not lie close together in memory.
LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "offset": lambda t: nn.functional.pad(t, (3, 2, 1, 1))[..., 1:-1, 3:-2],
    "expanded": lambda t: t[..., :1, :].expand(t.shape),
}


def state(name, theirs, B=2, **options):
    """A random hx for ``theirs``; None for attention."""
    if name in STEPS:
        h = torch.randn(B, 3, **options)
        return (h, torch.randn(B, 3, **options)) if name == "lstm cell" else h
    return None if name == "attention" else initial_state(theirs, B, **options)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, name, backend):
    theirs, lay = twin(name, **DOUBLE), LAYOUTS[layout]
    module, x, hx = ours(theirs, backend), lay(given(name, **DOUBLE)), mapped(lay, state(name, theirs, **DOUBLE))
    assert not x.is_contiguous() and not any(t.is_contiguous() for t in tensors(hx))
    if name == "attention":
        torch.testing.assert_close(outputs(module, x), outputs(theirs, x))
    else:
        assert_equal_in_float64(results(module, x, hx), results(theirs, x, hx))


def attempt(module, x, hx):
    """The dtypes of what comes out, or the error."""
    try:
        return [t.dtype for t in (outputs(module, x) if hx is None else tensors(module(x, hx)))]
    except (RuntimeError, ValueError, AssertionError) as error:
        return error


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_dtypes_are_mixed_or_refused_as_torch_does(name, autocast):
    for x, h, w in itertools.product((torch.float32, torch.bfloat16, torch.float64), repeat=3):
        theirs = twin(name, dtype=w)
        arguments = given(name, dtype=x), state(name, theirs, dtype=h)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = attempt(theirs, *arguments), attempt(ours(theirs, None), *arguments)
        if isinstance(expected, Exception):
            assert isinstance(found, InvalidInput), (x, h, w, found)
            assert ".to(" in str(found)
        else:
            assert found == expected, (x, h, w, found)


def test_dtypes_of_attention_are_refused_as_torch_does():
    for x, w in itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2):
        theirs = twin("attention", dtype=w)
        assert isinstance(attempt(theirs, given("attention", dtype=x), None), RuntimeError)
        with pytest.raises(InvalidInput, match=f"must have the parameters' dtype {w}, got {x}"):
            outputs(ours(theirs, None), torch.randn(3, 2, WIDTH, dtype=x))
