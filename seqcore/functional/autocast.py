"""Following ``torch.autocast``: seqcore's operators belong to the ones that run in the lower precision."""

import torch
from torch import Tensor

from ..reference.precision import autocasting


def target_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a tensor is computed in: autocast's where it is on for its device; float64 and non-floats stay."""
    if autocasting(tensor.device.type) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtypes they are computed in."""
    return tuple(None if t is None else t.to(target_dtype(t)) for t in tensors)
