"""A race in which every contestant runs in turn, and the limits of the machine it is run on."""

from dataclasses import dataclass

import torch

from seqcore.clock import Call, Stopwatch, percentile

MIN_ROUNDS = 3
MAX_ROUNDS = 30
WARM_SECONDS = 0.02


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
