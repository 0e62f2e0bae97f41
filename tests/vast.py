"""Tensors of more than 2^31 elements, nearly all of which nobody touches and take no memory, and launches on them.

A launch has billions of programs, of which the last few run; they are to do what they do in a small problem.
"""

import contextlib
import mmap
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from seqcore.devices import INTERPRETED

# Of mmap(2) on Linux: nobody counts what is not touched.
NORESERVE = 0x4000
FAR = 2**31

ON_THEM = [
    pytest.mark.kernels,
    pytest.mark.unfilled,
    pytest.mark.skipif(not INTERPRETED, reason="the memory that nobody touches would have to be there"),
]


def vast(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, of which only those that are touched take memory."""
    shape = torch.Size(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, max(1, shape.numel()) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[: shape.numel()].view(shape)


def at_the_end(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """``tensor`` as the last corner of zeros of this shape."""
    found = vast(*shape, dtype=tensor.dtype)
    corner(found, tensor.shape).copy_(tensor)
    return found


def corner(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The last corner of ``tensor``, of this shape."""
    return tensor[tuple(slice(have - size, None) for have, size in zip(tensor.shape, shape, strict=True))]


@contextlib.contextmanager
def running(programs: Callable[[int], list[int]]):
    """Within the block only those programs of a launch run that are named, given how many there are.

    Yields the names of the kernels that are launched.
    """
    from triton.runtime import interpreter

    builder, run = interpreter.interpreter_builder, interpreter.InterpretedFunction.run
    dim, idx, launched = builder.set_grid_dim, builder.set_grid_idx, set()

    def run_some(kernel, *arguments, grid, **keywords):
        (count,) = grid
        launched.add(kernel.fn.__name__)
        chosen = programs(count)
        with mock.patch.multiple(
            builder,
            set_grid_dim=lambda *_: dim(count, 1, 1),
            set_grid_idx=lambda x, y, z: idx(chosen[x], 0, 0),
        ):
            return run(kernel, *arguments, grid=(len(chosen),), **keywords)

    with mock.patch.object(interpreter.InterpretedFunction, "run", run_some):
        yield launched


def at_both_ends(count: int) -> list[int]:
    """Some tiles are taken last first."""
    return list(range(count)) if count < 8 else [*range(4), *range(count - 4, count)]
