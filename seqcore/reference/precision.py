"""In which precision the reference computes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` run outside autocast, which would take the products it makes in float32 back to half precision."""

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        kind = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(*arguments, **keywords)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **keywords)

    return run
