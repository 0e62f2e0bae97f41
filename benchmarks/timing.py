"""Clocks, and a race in which every contestant runs in turn.

On a CPU a call is timed by ``time.perf_counter``. On a GPU it is timed by events around it, after a write of a
buffer larger than the L2 cache: that empties the cache of the contestant's data, and keeps the GPU busy while
Python enqueues the call, so that the delay of the first launch is not counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

MIN_ROUNDS = 3
MAX_ROUNDS = 30
WARM_SECONDS = 0.02


def percentile(samples: list[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated linearly between neighbours."""
    if not samples:
        raise ValueError("percentile of no samples; pass at least one")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant over the rounds of a race."""

    ms_p20: float
    ms_p50: float
    ms_p80: float
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        return cls(*(percentile(samples, percent) for percent in (20, 50, 80)), tuple(samples))

    def over(self, other: "Timing") -> "Timing":
        """How many times the other's milliseconds this one takes, round by round."""
        return Timing.of([mine / its for mine, its in zip(self.samples, other.samples, strict=True)])


class Stopwatch:
    """Milliseconds one call takes on a device."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties().L2_cache_size
            self.flush_buffer = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
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


def race(
    benchmark, stopwatch: Stopwatch, ours: Call, peers: dict[str, Call], seconds: float
) -> tuple[Timing, dict[str, Timing]]:
    """Time ours and its peers in alternation, in about ``seconds`` for all of them together.

    ``benchmark`` is pytest-benchmark's fixture. Each of its rounds first times every peer, starting with a
    different one each time, and then ours, so that a disturbance meets all of them alike. pytest-benchmark's own
    statistics are those of ours by the wall clock, synchronised at both ends.
    """
    names = list(peers)
    samples: dict[str, list[float]] = {name: [] for name in ["", *names]}
    pass_ms = _warm(stopwatch, ours) + sum(_warm(stopwatch, peer) for peer in peers.values())
    rounds = min(max(int(seconds * 1e3 / pass_ms), MIN_ROUNDS), MAX_ROUNDS)

    def time_peers() -> None:
        turn = len(samples[""]) % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            samples[name].append(stopwatch(peers[name]))
        if stopwatch.on_gpu:
            samples[""].append(stopwatch(ours))
            stopwatch.flush()
            stopwatch.synchronize()

    def time_ours() -> None:
        if stopwatch.on_gpu:
            ours()
            stopwatch.synchronize()
        else:
            samples[""].append(stopwatch(ours))

    benchmark.pedantic(time_ours, setup=time_peers, rounds=rounds, iterations=1)
    timings = {name: Timing.of(times) for name, times in samples.items()}
    return timings.pop(""), timings


def _warm(stopwatch: Stopwatch, call: Call) -> float:
    """Compile, fill the allocator's cache and the CPU's, and say what one call takes."""
    first = stopwatch(call)
    return first if first > WARM_SECONDS * 1e3 and not stopwatch.on_gpu else stopwatch(call)


@dataclass(frozen=True)
class Roofs:
    """The limits of a machine, as measured here: nothing does more."""

    tflops: float
    gigabytes_per_s: float
    # Of the matrices in the product.
    dtype: str = ""
    # Of an empty kernel among many in a CUDA graph; 0 on a CPU, where nothing is launched.
    launch_us: float = 0.0

    def floor(self, flops: float, traffic: float, launches: int = 0) -> tuple[float, str]:
        """The least milliseconds this work can take, and which limit says so."""
        limits = {
            "matrix": flops / (self.tflops * 1e9),
            "copy": traffic / (self.gigabytes_per_s * 1e6),
            "launch": launches * self.launch_us / 1e3,
        }
        kind = max(limits, key=limits.__getitem__)
        return limits[kind], kind


class RoofMeter:
    """Measures the roofs: the best rate of a large square product, and of a large copy, over all samples taken.

    Samples are taken throughout a run, since a machine that is shared or warms up is not always at its best.
    """

    def __init__(self, stopwatch: Stopwatch, device: str, dtype: str, side: int, copy_bytes: int):
        options = {"device": device, "dtype": getattr(torch, dtype)}
        a, b = torch.randn(side, side, **options), torch.randn(side, side, **options)
        source = torch.ones(copy_bytes, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        self.stopwatch = stopwatch
        self.product, self.copy = lambda: a @ b, lambda: target.copy_(source)
        self.products = [self.product]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            # Of a CPU's two libraries now one is faster, now the other; torch's recurrences are oneDNN's.
            inner, outer = a.to_mkldnn(), b.to_mkldnn()
            self.products.append(lambda: torch.nn.functional.linear(inner, outer))
        self.flops, self.bytes, self.dtype = 2 * side**3, 2 * copy_bytes, dtype
        self.product_ms = self.copy_ms = float("inf")
        self.launch_us = 0.0

    def sample(self, times: int) -> None:
        for _ in range(times):
            self.product_ms = min(self.product_ms, *map(self.stopwatch, self.products))
            self.copy_ms = min(self.copy_ms, self.stopwatch(self.copy))

    @property
    def roofs(self) -> Roofs:
        rates = self.flops / (self.product_ms * 1e9), self.bytes / (self.copy_ms * 1e6)
        return Roofs(*rates, self.dtype, self.launch_us)
