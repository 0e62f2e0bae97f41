"""The operators' own launches, compiled to machine code for a GPU that is not here, or only noted.

What ``aot`` compiles is what its catalogue says a launch passes; here it is what a launch does pass. Triton's cache
then holds what the same call would look for on that GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from ..devices import INTERPRETED, pretending
from ..kernels.tuning import Device


@dataclass(frozen=True)
class Launch:
    """One kernel that was to be launched: what the compiler made of it, if anything; its programs; what they got."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextlib.contextmanager
def compiled_for(device: Device) -> Iterator[list[Launch]]:
    """Within the block kernels that are given CPU tensors are compiled for ``device`` and do not run.

    All results are whatever stood in their memory. Yields the list to which every launch is added. Not for several
    threads at once, and not for a process that interprets kernels.

    Raises:
        RuntimeError: if this process interprets kernels.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    from triton.runtime import driver, jit

    def compile_only(kernel: jit.JITFunction, *arguments: Any, **keywords: Any) -> Any:
        return kernel.run(*arguments, warmup=True, **keywords)

    with mock.patch.object(driver, "_active", _Driver(device.arch)), _noted(device, compile_only) as found:
        yield found


def noted_for(device: Device) -> contextlib.AbstractContextManager[list[Launch]]:
    """As ``compiled_for``, and nothing is compiled either; tensors may be on device meta, too."""
    return _noted(device, lambda *_, **__: None)


@contextlib.contextmanager
def _noted(device: Device, compiled: Callable[..., Any]) -> Iterator[list[Launch]]:
    from triton.runtime import jit

    found: list[Launch] = []

    def note(kernel: jit.JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
            made = compiled(kernel, *arguments, grid=grid, **keywords)
            found.append(Launch(kernel.fn.__name__, made, grid, named))

        return launch

    with pretending(device), mock.patch.object(jit.JITFunction, "__getitem__", note):
        yield found


class _Driver:
    """As much of a GPU's driver as the compiler asks for."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self):
        from .aot import gpu_target

        return gpu_target(self.arch)

    def get_current_device(self) -> str:
        # Under a name that no GPU has: what is compiled is remembered by device.
        return f"pretended {self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0
