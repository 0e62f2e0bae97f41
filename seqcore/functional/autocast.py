"""Following ``torch.autocast``: seqcore's operators belong to the ones that run in the lower precision."""

import torch
from torch import Tensor


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device; torch raises where it has none, as for "meta"."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is enabled for their device, float64 and non-floats left as they are."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not autocasting(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
