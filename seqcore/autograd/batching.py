"""Whether backward runs for many gradients at once."""

import torch
from torch import Tensor

from ..capabilities import transforms_active

# The vmap behind is_grads_batched is older than torch.func, and marks its tensors by this key alone.
_BATCHED = torch._C._dispatch_key_parse("Batched")


def vmapped(*gradients: Tensor | None) -> bool:
    """Whether backward, given these, is inside vmap, through which no operator of ours can pass."""
    if transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._dispatch_keys(g).has(_BATCHED) for g in gradients)
