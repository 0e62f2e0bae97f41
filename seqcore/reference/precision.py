"""Autocast, as far as the reference must know of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device; torch raises for "meta", which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` run outside autocast, which would take the products it makes in float32 back to half precision."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        kind = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not autocasting(kind):
            return function(*arguments, **keywords)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **keywords)

    return run
