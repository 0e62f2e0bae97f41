"""Telling DTensors from other tensors."""

import torch
from torch import Tensor


def sharded(*tensors: Tensor | None) -> bool:
    """Whether any is a ``torch.distributed.tensor.DTensor``, asked without importing what defines it.

    If one is, DTensor has learnt how to divide seqcore's operators; a graph that is compiled cannot teach it, and takes
    an ``import seqcore.distributed`` before.
    """
    found = any(isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh") for tensor in tensors)
    if found and not torch.compiler.is_compiling():
        from ..ops import sharding  # noqa: F401
    return found
