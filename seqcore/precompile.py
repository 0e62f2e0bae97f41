"""Fill Triton's cache before the first call, so that it does not stall on the compiler."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .devices import INTERPRETED
from .errors import UnsupportedInput
from .kernels.tuning import Device
from .profiling.problems import Problem, Recurrence

# Kernels are the same for every number of steps from two on.
FEW_STEPS = 4


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration; ``seconds`` is None if Triton's cache had it already."""

    kernel: str
    seconds: float | None


def cache_folder() -> Path:
    """Where Triton keeps what it compiled: ``TRITON_CACHE_DIR``, or a folder of the user's."""
    import triton

    return Path(triton.knobs.cache.dir)


def precompile(problem: Problem, device: Device | None = None) -> list[Compiled]:
    """Compile everything that ``problem`` launches, forward, and for training backward too.

    Args:
        problem: sizes, dtype and pass as they will come. The number of steps does not matter, nor do values.
        device: the GPU they will come to, if it is another than this machine's: kernels are then compiled without
            running, and Triton's cache can be carried there. None runs the problem once, at few steps, on the GPU here.

    Returns:
        The kernels in the order in which they were needed.

    Raises:
        UnsupportedInput: if there is no GPU here and none is named, the kernels cannot serve the problem, or this
            process interprets them.
    """
    if INTERPRETED:
        raise UnsupportedInput(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it before seqcore is imported"
        )
    if isinstance(problem, Recurrence):
        problem = replace(problem, T=min(problem.T, FEW_STEPS))
    problem = replace(problem, backend="triton")
    with listening() as found:
        if device is not None:
            from .testing.launches import compiled_for

            with compiled_for(device):
                problem.build("cpu")()
        elif torch.cuda.is_available():
            problem.build("cuda")()
            torch.cuda.synchronize()
        else:
            raise UnsupportedInput(
                "there is no GPU here to compile for; name the one that is meant, by --arch sm_90 or "
                'device=Device("sm_90"), and carry Triton\'s cache to it'
            )
    return found


@contextlib.contextmanager
def listening() -> Iterator[list[Compiled]]:
    """Every kernel that Triton compiles, or finds in its cache, within the block."""
    import triton

    found: list[Compiled] = []

    def note(*, metadata, times, cache_hit, **_) -> None:
        found.append(Compiled(metadata["name"], None if cache_hit else times.total / 1e6))

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = note
        yield found
