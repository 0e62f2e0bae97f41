"""Ranges that carry an operation's name, and the Chrome trace of what happens within them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from ..clock import Call
from .problems import Problem


@contextlib.contextmanager
def ranged(problem: Problem) -> Iterator[None]:
    """A range of the problem's label, and around it, for NVIDIA's tools, an NVTX range of its op's name alone."""
    nvtx = torch.cuda.nvtx.range(problem.op) if torch.cuda.is_available() else contextlib.nullcontext()
    with nvtx, record_function(problem.label):
        yield


@contextlib.contextmanager
def shown_to_nvidia() -> Iterator[None]:
    """What profilers that were told to wait for it record: every operator, ``seqcore::…`` too, with an NVTX range.

    Does nothing where there is no GPU.
    """
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.profiler.start()
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
            torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def record(call: Call, problem: Problem, repeats: int, path: Path) -> None:
    """Write the Chrome trace of ``repeats`` calls, each in its range, to ``path``."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Unless it keeps all events it warns that it forgets them after a cycle, though there is but one.
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(repeats):
            with ranged(problem):
                call()
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
