"""Arguments that nobody would pass, and what a call of them may come to: a result, or a refusal that helps."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from seqcore import InvalidInput, UnsupportedInput

from .effort import seeded, tried

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool,
    torch.uint8, torch.int8, torch.int32, torch.int64,
)  # fmt: skip
FILLINGS = (0.0, 1.0, 0.5, -1.0, 7.0, 1e30, math.nan, math.inf, -math.inf)

PLAIN = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**62, 2**63, -(2**63) - 1, 10**30, 0.0, 0.5, -0.5, 1.0, 1e300, math.nan,
    math.inf, -math.inf, 1j, "", "x", "auto", "average", "per_head", "top_left", "lower_right", "contiguous", "zigzag",
    "reference", "cpu", b"x", (), (1,), (0, 0), (1, 2), (None, 2), (2, None), (-1, 3), (0.5, 1), (True, 1), [1, 2],
    [], {}, {"a": 1}, frozenset(), ..., int, len, torch.float32, torch.float16, torch.int64, torch.complex64,
    torch.device("cpu"), torch.device("meta"), torch.Size([2, 2]),
)  # fmt: skip


@seeded()
def filled(shape: tuple[int, ...], dtype: torch.dtype, filling: float | None, device: str = "cpu") -> Tensor:
    """A tensor full of ``filling``, or of small random numbers; what the dtype does not hold becomes 1."""
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(shape) if filling is None else torch.full(shape, filling)
    else:
        number = filling is not None and math.isfinite(filling) and 0 <= filling <= 7
        values = torch.full(shape, int(filling)) if number else torch.ones(shape)
    return values.to(dtype).to(device)


@st.composite
def tensors(draw: Callable, sizes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> Tensor:
    """A small tensor of any rank, dtype, filling and layout, on the CPU or without storage."""
    shape = tuple(draw(st.lists(st.sampled_from(sizes), max_size=4)))
    dtype, filling = draw(st.sampled_from(DTYPES)), draw(st.sampled_from((None, *FILLINGS)))
    tensor = filled(shape, dtype, filling, draw(st.sampled_from(("cpu", "cpu", "cpu", "meta"))))
    return draw(st.sampled_from(VIEWS))(tensor)


def _sparse(tensor: Tensor) -> Tensor:
    return tensor.to_sparse() if tensor.dim() and tensor.dtype == torch.float32 and not tensor.is_meta else tensor


def _nested(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or not len(tensor) or tensor.is_meta or tensor.dtype != torch.float32:
        return tensor
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e5m2) if tensor.is_floating_point() else tensor


# What may come over all tensors of a call at once, as when a model is cast.
CHANGES = (_sparse, _nested, _narrow, Tensor.double, Tensor.half, partial(Tensor.to, device="meta"))

VIEWS = (
    lambda t: t, lambda t: t, lambda t: t, lambda t: t.mT if t.dim() > 1 else t, lambda t: t[None],
    lambda t: t[..., :1] if t.dim() else t, lambda t: t.unsqueeze(-1), lambda t: t.flatten(), lambda t: t[..., None, :]
    if t.dim() else t, _differentiable, _sparse, _nested,
)  # fmt: skip


def others(value: Any) -> st.SearchStrategy:
    """Something else in place of an argument: anything, or what is nearly it."""
    choices = [st.sampled_from(PLAIN), tensors(), st.builds(object)]
    if isinstance(value, Tensor):
        nearly = [
            value[None], value[..., :1], value[..., :-1], value[:1], value[:0], value.mT if value.dim() > 1 else value,
            value.double(), value.half(), value.bool(), value.long(), value.int(), value.to(torch.complex64),
            value.to("meta"), value.float() * math.nan, value + 1, -value if value.dtype != torch.bool else ~value,
            value.expand(2, *value.shape), value.flatten(), value.tolist(), value.float(), value.clone(),
            *(change(value) for change in CHANGES[:3]),
        ]  # fmt: skip
        choices += [st.sampled_from(nearly)] * 3
    return st.one_of(choices)


@st.composite
def replaced(draw: Callable, valid: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of a valid call, one or two of them, or of ``optional`` ones, replaced; or all tensors changed."""
    if draw(st.integers(0, 5)) == 5:
        return _changed(valid, draw(st.sampled_from(CHANGES)))
    names = draw(st.lists(st.sampled_from((*valid, *optional)), min_size=1, max_size=2, unique=True))
    return valid | {name: draw(others(valid.get(name)).filter(partial(_is_known, name))) for name in names}


def _changed(valid: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in valid.items()}


def _is_known(name: str, value: Any) -> bool:
    """Whether what comes of an argument is the same on every machine: a device's number is that of a GPU."""
    return name != "device" or not isinstance(value, int)


def each_replaced(valid: dict[str, Any], optional: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The arguments of a valid call, all tensors changed; each, and each ``optional`` one, by each plain value."""
    for change in CHANGES:
        tried()
        yield _changed(valid, change)
    for name in (*valid, *optional):
        for value in filter(partial(_is_known, name), PLAIN):
            tried()
            yield valid | {name: value}


def attempt(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """The result, or the refusal; whatever else is raised, warnings among it, comes through."""
    try:
        return function(*arguments, **keywords)
    except (InvalidInput, UnsupportedInput) as error:
        assert_telling(error)
        return error


def assert_telling(error: Exception) -> None:
    """A refusal names who refuses, and what was given or what is missing."""
    assert type(error) in (InvalidInput, UnsupportedInput), type(error)
    text = str(error)
    assert len(text) > 30 and re.search(r"\bgot\b|cannot serve|should not|exclude|go together|need", text), text


def refused(found: Any) -> bool:
    """Whether ``attempt`` came to a refusal."""
    return type(found) in (InvalidInput, UnsupportedInput)
