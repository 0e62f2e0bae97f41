"""Two runs side by side: ``python -m benchmarks.compare A.json B.json [--threshold 5%] [--out FILE.md]``

A row is slower or faster if it changed by more than the threshold, and if the ranges from the 20th to the 80th
percentile of both runs do not overlap. Where a peer from elsewhere ran in turn with ours in both runs, the times judged
are ours over the peer's, so that a machine that was slower as a whole changes nothing. Exit status: 1 if a row got
slower or lost its time, 2 if nothing can be compared, otherwise 0.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.fits import geometric_mean
from benchmarks.reporting.tables import number, table
from benchmarks.rows import OURS, Results, Row
from seqcore.files import write_whole

# Peers out of this checkout, which change with it.
OWN = {"aten", "reference"}
# What must be the same for times to mean the same, and what should be.
MACHINE = ("gpu", "cpu")
CONDITIONS = ("threads", "driver", "cuda", "cudnn", "torch", "triton", "python")
DISTINGUISHING = ("suite", "op", "pass", "dtype", "sweep", "backend", "causal", "window")
SLOWER, FASTER, UNCLEAR, SAME = "slower", "faster", "unclear", "same"
# The machine's own figures, which no change of ours can make slower.
NOT_OURS = "floors"


class NotComparable(Exception):
    """Why two runs cannot be compared."""


@dataclass(frozen=True)
class Run:
    """One run: its rows by what distinguishes them."""

    results: Results
    rows: dict[tuple, Row]

    @classmethod
    def load(cls, path: Path) -> "Run":
        results = Results.load(path)
        return cls(results, {key(row): row for row in results.rows if row.info["suite"] != NOT_OURS})

    def why_lost(self, name: str) -> str | None:
        """Why the row of that name is not there, if this run tried."""
        tried = [case for case in self.results.not_measured if case["name"] == name]
        return f"{tried[0]['outcome']}, {tried[0]['reason']}" if tried else None


def key(row: Row) -> tuple:
    info = row.info
    return (*(info.get(name) for name in DISTINGUISHING), tuple(sorted(info["shape"].items())))


def label(row: Row) -> str:
    """Whatever tells the row from others, in words."""
    info = row.info
    told = [info["suite"], NAMES.get(row.op, row.op), info["pass"], info["dtype"], info.get("sweep")]
    told.append("causal" if info.get("causal") else "")
    sizes = ", ".join(f"{name} = {count:,}" for name, count in info["shape"].items())
    return f"{' '.join(part for part in told if part)}: {sizes}"


@dataclass(frozen=True)
class Change:
    """One row in both runs. Ranges are p20, p50 and p80 of ours, in milliseconds or, with a peer, in its times."""

    row: Row
    peer: str | None
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    # Of ours in milliseconds, whatever the peer did.
    before_ms: float
    after_ms: float

    @classmethod
    def between(cls, before: Row, after: Row) -> "Change":
        peer = common_peer(before, after)
        ranges = (judged(row, peer) for row in (before, after))
        return cls(after, peer, *ranges, before.info["ms_p50"], after.info["ms_p50"])

    @property
    def factor(self) -> float:
        return self.after[1] / self.before[1]

    def verdict(self, threshold: float) -> str:
        if 1 / (1 + threshold) <= self.factor <= 1 + threshold:
            return SAME
        if self.factor > 1:
            return SLOWER if self.after[0] > self.before[2] else UNCLEAR
        return FASTER if self.after[2] < self.before[0] else UNCLEAR


def common_peer(before: Row, after: Row) -> str | None:
    """Who ran in turn with ours in both runs and does not change with it: the best of them before, if it is there."""
    common = [name for name in before.info["peers"] if name in after.info["peers"] and name not in OWN]
    return min(common, key=before.info["peers"].__getitem__, default=None)


def judged(row: Row, peer: str | None) -> tuple[float, float, float]:
    """p20, p50 and p80 of ours over the peer's time: from round to round where that is known."""
    info = row.info
    mine = info["ms_p20"], info["ms_p50"], info["ms_p80"]
    if peer is None:
        return mine
    low, middle, high = (ms / info["peers"][peer] for ms in mine)
    if peer == info["best_peer"] and info["ratio_p20"]:
        low, high = 1 / info["ratio_p80"], 1 / info["ratio_p20"]
    return low, middle, high


def differences(before: Results, after: Results, names: tuple[str, ...]) -> list[str]:
    pairs = [(name, before.machine.get(name), after.machine.get(name)) for name in names]
    return [f"{name} was {a}, is {b}" for name, a, b in pairs if a != b]


def compare(before: Run, after: Run, threshold: float, force: bool = False) -> tuple[str, bool]:
    """The comparison in Markdown, and whether anything got slower or lost its time.

    Raises:
        NotComparable: if no row is in both runs or, without ``force``, they are from different machines.
    """
    other_machine = differences(before.results, after.results, MACHINE)
    if other_machine and not force:
        raise NotComparable(f"different machines: {'; '.join(other_machine)}; --force compares them all the same")
    changes = [Change.between(before.rows[its], after.rows[its]) for its in before.rows if its in after.rows]
    changes.sort(key=lambda change: -change.factor)
    if not changes:
        raise NotComparable("no row is in both runs; measure the same suites at the same sizes")
    by_verdict = {verdict: [] for verdict in (SLOWER, FASTER, UNCLEAR, SAME)}
    for change in changes:
        by_verdict[change.verdict(threshold)].append(change)
    gone = {row.name: after.why_lost(row.name) for its, row in before.rows.items() if its not in after.rows}
    # A budget of time that ran out says nothing about a row.
    lost = {name: why for name, why in gone.items() if why and "out of time" not in why}
    others = [f"{name}: {why}" if why else name for name, why in gone.items() if name not in lost]

    commits = " and ".join(str(run.results.machine.get("commit")) for run in (before, after))
    parts = [f"# Before and after: commits {commits}"]
    warnings = other_machine + differences(before.results, after.results, CONDITIONS)
    parts += [f"**Not the same conditions: {'; '.join(warnings)}.**" if warnings else "Same machine, same versions."]
    parts += [summary(changes, by_verdict, lost, threshold)]
    if shown := [change for change in changes if change not in by_verdict[SAME]]:
        parts += [f"## Changed\n\n{READING}", changes_table(shown, threshold)]
    for title, lines in (
        ("Lost their time", [f"- {name}: {why}" for name, why in lost.items()]),
        ("Only before", [f"- {name}" for name in others]),
        ("Only after", [f"- {row.name}" for its, row in after.rows.items() if its not in before.rows]),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n", bool(by_verdict[SLOWER] or lost)


def summary(changes: list[Change], by_verdict: dict[str, list[Change]], lost: dict, threshold: float) -> str:
    """Geometric means, over all and by suite, and how many changed."""
    mean = lambda some: f"{geometric_mean([change.factor for change in some]):.3f}"
    suites = dict.fromkeys(change.row.info["suite"] for change in changes)
    parts = [f"{name} {mean([c for c in changes if c.row.info['suite'] == name])}" for name in suites]
    counts = ", ".join(f"{len(found)} {verdict}" for verdict, found in by_verdict.items())
    return (
        f"Time after over time before, judged as below, geometric mean of {len(changes)} rows in both: "
        f"**{mean(changes)}** ({'; '.join(parts)}). "
        f"Beyond {100 * threshold:g} %: {counts}; {len(lost)} lost their time."
    )


def changes_table(changes: list[Change], threshold: float) -> str:
    header = ["row", "verdict", "change", "ms before", "ms after", "judged by"]
    header += ["before", "20 to 80 %", "after", "20 to 80 %"]
    lines = []
    for change in changes:
        line = [label(change.row), change.verdict(threshold), f"{100 * (change.factor - 1):+.1f} %"]
        line += [number(change.before_ms), number(change.after_ms)]
        line.append(f"{OURS} / {change.peer}" if change.peer else "ms")
        for low, middle, high in (change.before, change.after):
            line += [number(middle), f"{number(low)} to {number(high)}"]
        lines.append(line)
    return table(header, lines)


READING = f"""\
*judged by*: {OURS}'s time over that of a peer that ran in turn with it, so that what slows both is no change; \
milliseconds where no peer is in both runs. *unclear* is beyond the threshold, within the spread."""


def fraction(text: str) -> float:
    """5% or 0.05."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not value > 0:
        raise ValueError(text)
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="What changed from A to B.")
    parser.add_argument("before", type=Path, metavar="A.json", help="pytest-benchmark's JSON of the run before")
    parser.add_argument("after", type=Path, metavar="B.json", help="and of the run after")
    parser.add_argument("--threshold", type=fraction, default=0.05, help="what counts as a change (default: 5%%)")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the comparison there too")
    parser.add_argument("--force", action="store_true", help="compare runs of different machines")
    options = parser.parse_args(arguments)
    try:
        text, worse = compare(Run.load(options.before), Run.load(options.after), options.threshold, options.force)
        if options.out:
            write_whole(options.out, text)
    except (OSError, ValueError, NotComparable) as error:
        print(f"Cannot compare: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
