"""Devices as the kernels see them, and how they multiply there."""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from .kernels.tuning import INTERPRETER, Device

# Read once: Triton, too, decides when a kernel is defined whether it will be interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    hip = getattr(properties, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    return Device(
        arch=hip or f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 65536),
        registers=getattr(properties, "regs_per_multiprocessor", 65536),
    )


# A GPU that is not here and that CPU tensors are taken to be on; see ``seqcore.testing.launches``.
_pretended: Device | None = None


@contextlib.contextmanager
def pretending(device: Device) -> Iterator[None]:
    """Within the block CPU tensors are taken to be on ``device``, in all threads, since backward has its own."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


def describe(device: torch.device) -> Device:
    """The kernels' view of a torch device."""
    if _pretended is not None:
        return _pretended
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return Device(INTERPRETER if INTERPRETED and device.type == "cpu" else device.type)


def recurrence_precision(dtype: torch.dtype, arch: str) -> str:
    """How kernels multiply float32: torch's switch for cuDNN's recurrences decides, here as there.

    "tf32", or "tf32x3", three of these for nearly all of float32, or "ieee" where there is no TF32 (and for all else).
    """
    if dtype != torch.float32 or not arch.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "tf32x3"


def product_parts(dtype: torch.dtype, arch: str) -> int:
    """How many numbers an operand is kept as: two, a value and its remainder, where TF32 makes products of float32."""
    return 2 if recurrence_precision(dtype, arch) == "tf32x3" else 1
