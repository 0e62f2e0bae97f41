"""Checks of single arguments, which functions and modules of all kinds share; before any computing."""

import sys
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The largest number of the kernels' own arithmetic.
LARGEST = torch.finfo(torch.float32).max
# As tuples: a union would be built anew at each call.
_BOOLS, _NUMBERS = (bool, torch.SymBool), (int, float, torch.SymFloat, torch.SymInt)
# What a size or a number of positions may be at most: beyond it torch raises what tells nobody which argument it was.
LARGEST_SIZE = 2**31 - 1


def shown(value: Any) -> str:
    """``value`` as a message names it; of a tensor its kind alone, for its elements may be many and on a GPU."""
    return f"a Tensor {list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float of Python's or of a traced graph's; a bool is none."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def is_probability(value: Any) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_size(value: Any, least: int = 1) -> bool:
    """Whether ``value`` is an integer that a tensor's dimension may have; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_SIZE


def check_flags(name: str, **flags: Any) -> None:
    """Raise InvalidInput for what is neither True nor False."""
    for flag, value in flags.items():
        if not isinstance(value, _BOOLS):
            raise InvalidInput(f"{name}: {flag} must be True or False, got {shown(value)}")


def check_truth(name: str, **flags: Any) -> None:
    """As ``check_flags`` for arguments whose truth alone counts, as torch's modules take it: a Tensor may have none."""
    for flag, value in flags.items():
        if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta or value.layout != torch.strided):
            raise InvalidInput(f"{name}: {flag} must be True or False, got {shown(value)}")


def check_sizes(name: str, **sizes: Any) -> None:
    """Raise InvalidInput for what is no positive integer."""
    for size, value in sizes.items():
        if not is_size(value):
            raise InvalidInput(f"{name}: {size} must be a positive integer, got {shown(value)}; at most 2^31 - 1")


def check_base(name: str, base: Any) -> None:
    """Raise InvalidInput for what is no base of a geometric progression."""
    if not (is_number(base) and 0 < base <= sys.float_info.max):
        raise InvalidInput(f"{name}: base must be positive, got {shown(base)}; a finite number")


def check_factory(name: str, device: Any, dtype: Any) -> None:
    """Raise InvalidInput for a device that torch does not know, or a dtype that is not floating point.

    None stands for torch's defaults.
    """
    if dtype is not None and dtype not in FLOATS:
        raise InvalidInput(f"{name}: dtype must be floating point, got {shown(dtype)}; None is torch's default")
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise InvalidInput(
            f"{name}: device must be a torch.device, or what makes one, such as 'cpu' or 'cuda:0', got {shown(device)}"
        ) from None


def check_probability(name: str, p: Any) -> None:
    """Raise InvalidInput for what is no probability of dropout, in torch's words."""
    if not is_probability(p):
        raise InvalidInput(
            f"{name}: dropout probability has to be between 0 and 1, but got {p!r}; pass a float, 0.0 to drop nothing"
        )


def check_clip(name: str, clip: Any) -> None:
    """Raise InvalidInput for what bounds no gradient: neither None nor a positive number that float32 holds."""
    if clip is not None and not (is_number(clip) and (0 < clip <= LARGEST or clip == float("inf"))):
        raise InvalidInput(
            f"{name}: grad_clip must be a positive number, got {clip!r}; one that float32 holds, or leave it out"
        )


def check_decades(name: str, decades: Any) -> None:
    """Raise InvalidInput for what is no number of powers of ten."""
    if not is_number(decades) or not (0 <= decades <= sys.float_info.max or decades == float("inf")):
        raise InvalidInput(f"{name}: decades must be a number of at least 0, got {decades!r}; leave it out for 3.0")


def check_strided(name: str, what: str, tensor: Tensor) -> None:
    """Raise InvalidInput for a Tensor whose elements do not lie at strides: sparse or nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InvalidInput(f"{name}: {what} must be a dense Tensor, got a {kind} one; pass .to_dense(), or pad it")


def check_floating(name: str, what: str, value: Any) -> None:
    """Raise InvalidInput for what is no dense Tensor of a floating-point dtype that is computed in; float8 is none."""
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{name}: {what} must be a Tensor, got {type(value).__name__}")
    check_strided(name, what, value)
    if value.dtype not in FLOATS:
        raise InvalidInput(
            f"{name}: {what} must be floating point, got {value.dtype}; float32, float16, bfloat16 or float64"
        )
