"""Looking at values of tensors, where that costs nothing."""

import torch
from torch import Tensor

from ..capabilities import transforms_active


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device; a traced tensor has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()
