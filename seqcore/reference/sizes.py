"""Looking at sizes and values, which a traced graph may leave open."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..capabilities import transforms_active


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device; a traced or fake tensor has none."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return False
    return holds_values(tensor)


def holds_values(tensor: Tensor) -> bool:
    """Whether there is anything behind the shape of a tensor that is in no graph."""
    return not tensor.is_meta and not is_fake(tensor)


def is_zero(size: int) -> bool:
    """Whether a tensor's ``size`` is 0; of one that a traced graph leaves open, the graph itself asserts otherwise."""
    if not torch.compiler.is_compiling():
        return size == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(size == 0):
        return True
    torch._check(size != 0)
    return False


def is_among(shape: Sequence[int], allowed: Sequence[tuple[int, ...]]) -> bool:
    """Whether ``shape`` is one of ``allowed``.

    Tuples compare sizes before they compare ranks, and to a traced graph each comparison may be a condition: that T is
    not B, say.
    """
    return any(len(shape) == len(each) and tuple(shape) == each for each in allowed)
