"""What the report derives from the rows: slopes, crossovers, and the batch that fills the machine."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS = 3
TIE = 0.05


def geometric_mean(values: Sequence[float]) -> float:
    """What to say of ratios together: as often twice as half gives 1."""
    return math.exp(statistics.fmean(map(math.log, values)))


@dataclass(frozen=True)
class Fit:
    """time = constant · T^slope, over ``points`` values of T from ``first`` to ``last``."""

    slope: float
    r_squared: float
    points: int
    first: float
    last: float


def fit_power(T: Sequence[float], time: Sequence[float]) -> Fit | None:
    """Least squares of log time over log T, over the larger half of the T's, three at least.

    At small T a layer costs what starting it costs, which is not the question. None with fewer than three points.
    """
    if len(T) < MIN_POINTS:
        return None
    points = max(MIN_POINTS, math.ceil(len(T) / 2))
    pairs = sorted(zip(T, time, strict=True))[-points:]
    x, y = [math.log(t) for t, _ in pairs], [math.log(ms) for _, ms in pairs]
    mean_x, mean_y = sum(x) / points, sum(y) / points
    spread_x = sum((a - mean_x) ** 2 for a in x)
    spread_y = sum((b - mean_y) ** 2 for b in y)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    # A constant time is fitted perfectly by slope 0.
    r_squared = together**2 / (spread_x * spread_y) if spread_y else 1.0
    return Fit(together / spread_x, r_squared, points, pairs[0][0], pairs[-1][0])


@dataclass(frozen=True)
class Crossover:
    """Where one layer stops being cheaper than another.

    ``verdict`` is "at" (with ``T``), "always" or "never" cheaper in the range measured, or "unclear" if they change
    places more than once, the change goes the other way, or they differ nowhere.
    """

    verdict: str
    T: float | None
    last: float
    # How many times the other's time the first layer takes at the last T.
    at_last: float


def find_crossover(T: Sequence[float], time: Sequence[float], other: Sequence[float]) -> Crossover | None:
    """The T from which ``time`` exceeds ``other``; interpolated linearly in the logarithms. None without points.

    Where they are within a twentieth of each other neither counts as cheaper: noise decides there.
    """
    triples = sorted(zip(T, time, other, strict=True))
    if not triples:
        return None
    advantage = [(t, math.log(b / a)) for t, a, b in triples]
    last, at_last = advantage[-1][0], math.exp(-advantage[-1][1])
    clear = [(t, value) for t, value in advantage if abs(value) > math.log(1 + TIE)]
    changes = [i for i in range(1, len(clear)) if (clear[i][1] > 0) != (clear[i - 1][1] > 0)]
    if clear and not changes:
        return Crossover("always" if clear[0][1] > 0 else "never", None, last, at_last)
    if len(changes) == 1 and clear[0][1] > 0:
        (low, before), (high, after) = clear[changes[0] - 1], clear[changes[0]]
        return Crossover("at", low * (high / low) ** (before / (before - after)), last, at_last)
    return Crossover("unclear", None, last, at_last)


@dataclass(frozen=True)
class Filling:
    """The least batch that reaches a share of the best rate, and whether the best is the last measured."""

    batch: dict[float, float]
    best_rate: float
    best_batch: int
    still_rising: bool


def batch_to_fill(
    batches: Sequence[int], rates: Sequence[float], shares: Sequence[float] = (0.5, 0.9)
) -> Filling | None:
    """How much batch brings a layer to each share of its own best rate, interpolated in the logarithms.

    ``still_rising`` if the best rate is at the largest batch and beats the one before by more than a twentieth: then
    the machine was not full in the range measured. None without points.
    """
    pairs = sorted(zip(batches, rates, strict=True))
    if not pairs:
        return None
    best_batch, best = max(pairs, key=lambda pair: pair[1])
    rising = len(pairs) > 1 and best_batch == pairs[-1][0] and best > (1 + TIE) * pairs[-2][1]
    return Filling({share: _first_reaching(pairs, share * best) for share in shares}, best, best_batch, rising)


def _first_reaching(pairs: list[tuple[int, float]], rate: float) -> float:
    previous = None
    for batch, reached in pairs:
        if reached >= rate:
            if previous is None:
                return batch
            low, low_rate = previous
            share = math.log(rate / low_rate) / math.log(reached / low_rate)
            return low * (batch / low) ** share
        previous = batch, reached
    raise AssertionError("the best rate reaches every share of itself")
