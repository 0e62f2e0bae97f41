"""What a call takes on its device: the one clock of benchmarks, tuning and profiles.

On a CPU a call is timed by ``time.perf_counter``. On a GPU it is timed by events around it, after a write of a
buffer larger than the L2 cache: that empties the cache of the call's data, and keeps the GPU busy while Python
enqueues the call, so that the delay of the first launch is not counted.
"""

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
# What a call takes, in milliseconds.
Clock = Callable[[Call], float]
LEAST_FLUSHED_BYTES = 2**28


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated linearly between neighbours."""
    if not samples:
        raise ValueError("percentile of no samples; pass at least one")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Stopwatch:
    """Milliseconds one call takes on a device, "cpu" or "cuda"."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties().L2_cache_size
            self.flush_buffer = torch.empty(max(4 * cache, LEAST_FLUSHED_BYTES), dtype=torch.int8, device=device)

    def __call__(self, call: Call, prepare: Call | None = None) -> float:
        """Time ``call``, after ``prepare``, which does not count."""
        if prepare is not None:
            prepare()
        return self._events(call) if self.on_gpu else _wall(call)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def flush(self) -> None:
        if self.on_gpu:
            self.flush_buffer.zero_()

    def _events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _wall(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
