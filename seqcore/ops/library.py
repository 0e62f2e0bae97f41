"""The ``torch.library`` fragment all operators are defined in, and which implementation a CPU tensor gets."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..capabilities import KERNEL_DTYPES
from ..devices import INTERPRETED, describe
from ..reference.precision import without_autocast

LIBRARY = torch.library.Library("seqcore", "FRAGMENT")


def has_kernels(tensor: Tensor) -> bool:
    """Whether ``tensor`` goes through the kernels; else, on a CPU, it takes the reference's formulas.

    The interpreter miscomputes bfloat16 products (triton issue 11584), and no kernel takes float64.
    """
    if tensor.is_cuda:
        return True
    if INTERPRETED:
        return tensor.dtype in KERNEL_DTYPES and tensor.dtype != torch.bfloat16
    return describe(tensor.device).arch != tensor.device.type


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``implementation`` with its tensors' GPU as the current one, on which Triton launches whatever it is given."""

    @functools.wraps(implementation)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.cuda.device(next(a.device for a in arguments if isinstance(a, Tensor))):
            return implementation(*arguments, **keywords)

    return run


def define(name: str, schema: str, implementation, fake) -> None:
    """Register ``seqcore::name``: one implementation for CPU and CUDA tensors, and its shape-only twin.

    Inside an operator autocast is off: the functional layer has made its casts, and backward may run under another.
    """
    implementation = without_autocast(implementation)
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, _on_its_device(implementation), "CUDA")
    torch.library.register_fake(f"seqcore::{name}", fake, lib=LIBRARY)
