"""What tests of several processes share: whole results, this process's parts of them, and comparing them."""

import functools

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqcore.distributed import gather_sequence, shard_sequence

DOUBLE = {"dtype": torch.float64}


@functools.cache
def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One mesh of a shape for all jobs of a process: torch's compiler takes an equal one for another."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def parts(tensors: list[Tensor], layout: str = "contiguous") -> list[Tensor]:
    """This process's rows of each [B, H, rows, width], as new leaves."""
    return [shard_sequence(t.detach(), 2, None, layout).requires_grad_(t.requires_grad) for t in tensors]


def assert_parts(actual: list[Tensor], expected: list[Tensor], layout: str = "contiguous") -> None:
    """All processes' rows together are the expected ones, in float64."""
    for found, whole in zip(actual, expected, strict=True):
        torch.testing.assert_close(gather_sequence(found, 2, None, layout), whole.detach())
