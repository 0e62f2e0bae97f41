"""What an experiment is: a module with these names, its rows in, verdicts and a picture out."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Repeats of one thing: their median, least and largest."""

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return self.text("{:.3g}".format)

    def text(self, form: Callable[[float], str]) -> str:
        """Median, and the range where there is one."""
        if form(self.low) == form(self.high):
            return form(self.median)
        return f"{form(self.median)} ({form(self.low)} to {form(self.high)})"

    def clearly_above(self, other: "Spread") -> bool:
        """Whether every repeat here lies above every repeat there."""
        return self.low > other.high


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values), len(values))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """Each value of ``key`` once, in the rows' order."""
    return list(dict.fromkeys(row[key] for row in rows))


def order_of(first: Spread, second: Spread) -> bool | None:
    """True if the first is clearly above the second, False if clearly below, None while their ranges overlap."""
    if first.clearly_above(second):
        return True
    return False if second.clearly_above(first) else None


def all_of(answers: Sequence[bool | None]) -> bool | None:
    """False if one is, True if all are, else not decided."""
    if any(answer is False for answer in answers):
        return False
    return True if answers and all(answers) else None
