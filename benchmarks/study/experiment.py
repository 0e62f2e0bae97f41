"""What an experiment is: a module with these names, its rows in, verdicts and a picture out."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How often chance alone may part repeats as they are, for a verdict to rest on it; tried on this many deals at most.
CHANCE, MOST_DEALS = 0.1, 20_000

# What JSON holds: numbers that are finite, text, lists, None.
Case = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A claim, as it is commonly made, and what the rows say about it; ``holds`` is None where they cannot tell."""

    claim: str
    holds: bool | None
    sentence: str

    @property
    def word(self) -> str:
        return {True: "holds", False: "does not hold", None: "not decided here"}[self.holds]


class Experiment(Protocol):
    """The interface of every module in ``experiments/``. Rows are cases with what was measured of them added."""

    TITLE: str
    # What one would like to know, in a sentence or two.
    QUESTION: str
    # Whether times count, so that nothing else may run meanwhile.
    ALONE: bool
    # By the names "tiny" (for tests), "cpu" and "gpu": a dataclass of the experiment's own.
    SIZES: dict[str, Any]

    def how(self, sizes: Any) -> str:
        """How it is measured, in sentences that a reader could repeat it from."""

    def cases(self, sizes: Any) -> list[Case]:
        """What is measured one by one, repeats included ("seed"); each is a line of the journal."""

    def measure(self, case: Case, sizes: Any, device: str) -> Row:
        """One of them; seeded by the case, on the backend that is in force."""

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """The claims, judged from the rows alone."""

    def draw(self, rows: list[Row]) -> "tuple[Figure, str]":
        """The picture, and its caption: what is drawn, in which units."""

    def table(self, rows: list[Row]) -> str:
        """The numbers behind the picture, as a table in Markdown."""


@dataclass(frozen=True)
class Spread:
    """Repeats of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    @property
    def low(self) -> float:
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        return max(self.values, default=math.nan)

    @property
    def repeats(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        return self.text("{:.3g}".format)

    def text(self, form: Callable[[float], str]) -> str:
        """Median, and the range where there is one."""
        if not self.values:
            return "nothing finite"
        if form(self.low) == form(self.high):
            return form(self.median)
        return f"{form(self.median)} ({form(self.low)} to {form(self.high)})"

    @property
    def percent(self) -> str:
        """As text, of shares of 1."""
        return self.text("{:.0%}".format)


def spread(values: Iterable[float | None]) -> Spread:
    """Of what is finite, None standing for what is not."""
    return Spread(tuple(value for value in values if value is not None))


def finite(value: float) -> float | None:
    """A number as rows hold it: None in place of infinity and NaN."""
    return value if math.isfinite(value) else None


def thinned(last: int, points: int) -> list[int]:
    """About so many of 0 … ``last``, evenly, both ends among them: what is kept of a long curve."""
    return sorted({round(last * i / (points - 1)) for i in range(points)})


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """Each value of ``key`` once, in the rows' order."""
    return list(dict.fromkeys(row[key] for row in rows))


def order_of(first: Spread, second: Spread) -> bool | None:
    """True if repeats of the first are larger than those of the second, False if smaller, None if chance may say so.

    By the exact rank-sum test at both sides (Wilcoxon, 1945): decided where at most a tenth of all ways to deal these
    values to the two would part them as much. Three against three are, if their ranges do not overlap.
    """
    count, together = len(first.values), (*first.values, *second.values)
    if not first.values or not second.values:
        return None
    ranks = _ranks(together)
    middle, found = count * (len(together) + 1) / 2, sum(ranks[:count])
    if math.comb(len(together), count) > MOST_DEALS:
        spread_of_sum = math.sqrt(middle * len(second.values) / 6)
        chance = 2 * statistics.NormalDist().cdf(-(abs(found - middle) - 0.5) / spread_of_sum)
    else:
        deals = [abs(sum(deal) - middle) for deal in itertools.combinations(ranks, count)]
        chance = sum(apart >= abs(found - middle) for apart in deals) / len(deals)
    return found > middle if chance <= CHANCE else None


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 on; of equal values their mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def beyond(found: Spread, limit: float) -> bool | None:
    """True if every repeat is above the limit, False if none is, else None."""
    above = [value > limit for value in found.values]
    return True if above and all(above) else None if any(above) or not above else False


def all_of(answers: Sequence[bool | None]) -> bool | None:
    """False if one is, True if all are, else not decided."""
    if any(answer is False for answer in answers):
        return False
    return True if answers and all(answers) else None
