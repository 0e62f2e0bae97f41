"""What a call takes, and races in which every contestant runs in turn.

On a GPU a call is timed by events around it, after a write of a buffer larger than the L2 cache: that empties the
cache, and keeps the GPU busy while Python enqueues the call. On a CPU it is timed by the wall clock.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]
# What a contestant runs within: the choice of its tiles, or of a backend.
Setting = Callable[[], AbstractContextManager]


class OutOfTime(Exception):
    """The seconds that were given are over."""


class Deadline:
    """``seconds`` from now, or never."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime


def stopwatch(device: torch.device) -> Clock:
    """Milliseconds of one call on ``device``."""
    return _GpuClock(device) if device.type == "cuda" else _wall


def _wall(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class _GpuClock:
    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush_buffer = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush_buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def race(
    contestants: Sequence[tuple[Setting, Call]], rounds: int, clock: Clock, deadline: Deadline
) -> list[list[float]]:
    """Milliseconds of each contestant, round by round; each round begins with another one.

    A round before the first fills caches and compiles what has not run yet.
    """
    samples: list[list[float]] = [[] for _ in contestants]
    for turn in range(-1, rounds):
        deadline.check()
        for place in range(len(contestants)):
            index = (place + turn) % len(contestants)
            setting, call = contestants[index]
            with setting():
                milliseconds = clock(call)
            if turn >= 0:
                samples[index].append(milliseconds)
    return samples


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated linearly between neighbours."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
