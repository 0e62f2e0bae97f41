"""seqcore: fused Triton kernels for recurrence and attention, beside plain-PyTorch references.

``seqcore.nn`` takes the place of ``torch.nn``'s recurrent and attention modules, ``seqcore.functional`` holds the same
as functions, ``seqcore.use_backend`` chooses who computes, ``seqcore.explain`` tells who would and why not the others,
``seqcore.replace`` puts all that into a model that exists.
"""

from . import functional, nn
from .backends import Explanation, explain, use_backend
from .cells import Cell
from .errors import InvalidInput, UnsupportedInput
from .kernels.tuning import Device
from .replacement import replace, restore
from .sdpa import replace_sdpa
from .truncation import truncated_bptt

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "Device",
    "Explanation",
    "InvalidInput",
    "UnsupportedInput",
    "explain",
    "functional",
    "nn",
    "replace",
    "replace_sdpa",
    "restore",
    "truncated_bptt",
    "use_backend",
]
