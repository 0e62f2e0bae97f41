"""The stages of a campaign: what each runs, for how long, and one line about what came of it."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measured
from benchmarks.shapes import SIZES
from benchmarks.stages import run_sanitizer, run_tests
from seqcore.journal import Journal, forget, lines
from seqcore.kernels import tables
from seqcore.testing.shares import cores
from seqcore.tuning.problems import problems
from seqcore.tuning.run import COMPARED_KIND, TUNED_KIND
from seqcore.tuning.run import key as tuning_key

VERIFIED, TUNED, PROFILED = "verify.json", "tuned.json", "profile.json"
# Under nine minutes each, as long as a lease of a GPU may last, with what it takes to begin and to end.
LIMIT_SECONDS = 530
# What a stage that can end by itself is told to leave of its limit for that.
END_SECONDS = 50
# Without anything finished: no test and no verified case takes as long. Benchmarks are compiled first, tuning compiles
# many candidates of each problem, and profiles wait for Proton.
PATIENCE_SECONDS, BENCH_PATIENCE_SECONDS, LONG_PATIENCE_SECONDS = 120, 200, 300
# A test file that launches nothing and a case that is quick interpreted, to try the path.
TINY_TESTS, TINY_CASE = "tests/test_budget.py", "gru T=4 B=5 H=31 padded"


@dataclass(frozen=True)
class Stage:
    """One part of the campaign."""

    name: str
    command: list[str]
    limit_s: float
    # What came out in words, and whether going on would bring more.
    summary: Callable[[], tuple[str, bool]]
    # Which lines of the journal are this stage's, by kind and name.
    owns: Callable[[str, str], bool]
    journal: Path
    # Written by the command out of the journal; removed before it runs, so that what is found afterwards is its own.
    written: Path | None = None
    # After so long without anything finished it is taken to hang.
    patience_s: float = PATIENCE_SECONDS
    # Whether the command takes ``--seconds``.
    spends: bool = False

    def command_within(self, limit_s: float) -> list[str]:
        """The command, told how long it has."""
        return [*self.command, "--seconds", f"{max(limit_s - END_SECONDS, 1):.0f}"] if self.spends else self.command

    def finished(self) -> int:
        """How many lines it has written about what it finished, in all attempts."""
        return sum("value" in entry and self.owns(entry["kind"], entry["name"]) for entry in lines(self.journal))

    def forget(self) -> None:
        """Take all it has finished from the journal, and that it has ended."""
        forget(self.journal, lambda kind, name: self.owns(kind, name) or (kind, name) == ("stage", self.name))


def stages(out: Path, run_key: str, tiny: bool) -> list[Stage]:
    """The stages in their order: what makes all else worthless first, then what is worth most."""
    return [
        _tests(out, run_key, tiny),
        _verify(out, tiny),
        _sanitize(out, run_key, tiny),
        _measure("floors", ("floors",), 120, out, tiny),
        _measure("bench", ("recurrence", "attention", "bottleneck"), LIMIT_SECONDS, out, tiny),
        _tune(out, tiny),
        _profile(out, run_key, tiny),
        _measure("models", ("models",), 240, out, tiny),
    ]


def _python(*arguments: str | Path | float) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def _jobs(tiny: bool) -> int:
    """Processes that compile at the same time what is not timed."""
    return 2 if tiny else cores()


def _tests(out: Path, run_key: str, tiny: bool) -> Stage:
    journal = out / measured.JOURNAL
    command = _python("benchmarks.stages.run_tests", "--journal", journal, "--key", run_key, "--jobs", _jobs(tiny))

    def summary() -> tuple[str, bool]:
        outcomes = Counter(entry["outcome"] for entry in Journal(journal, run_key, run_tests.KIND).done.values())
        counts = ", ".join(f"{outcomes[name]} {name}" for name in ("passed", "failed", "skipped"))
        return counts, not outcomes

    return Stage(
        "tests",
        [*command, TINY_TESTS] if tiny else command,
        LIMIT_SECONDS,
        summary,
        lambda kind, name: kind == run_tests.KIND,
        journal,
    )


def _verify(out: Path, tiny: bool) -> Stage:
    journal, rows_file = out / measured.JOURNAL, out / VERIFIED
    command = _python("seqcore", "verify", "--out", rows_file, "--journal", journal, "--jobs", _jobs(tiny))

    def summary() -> tuple[str, bool]:
        if not rows_file.exists():
            return "no results", True
        found = json.loads(rows_file.read_text())
        bad = sum(not row["ok"] for row in found["rows"])
        left = 0 if tiny else len(found["left"])
        words = f"{len(found['rows'])} results, {bad} outside the budget or not repeatable"
        return f"{words}; {left} kernels left for another run" if left else words, bool(left)

    return Stage(
        "verify",
        [*command, "--case", TINY_CASE] if tiny else command,
        LIMIT_SECONDS,
        summary,
        lambda kind, name: kind == "verify",
        journal,
        rows_file,
    )


def _sanitize(out: Path, run_key: str, tiny: bool) -> Stage:
    journal = out / measured.JOURNAL
    command = _python("benchmarks.stages.run_sanitizer", "--journal", journal, "--key", run_key)

    def summary() -> tuple[str, bool]:
        return run_sanitizer.summary(Journal(journal, run_key, run_sanitizer.KIND), tiny)

    return Stage(
        "sanitize", [*command, "--tiny"] if tiny else command, LIMIT_SECONDS, summary,
        lambda kind, name: kind == run_sanitizer.KIND, journal, patience_s=LONG_PATIENCE_SECONDS, spends=True,
    )  # fmt: skip


def _measure(name: str, suites: tuple[str, ...], limit_s: float, out: Path, tiny: bool) -> Stage:
    journal, data, sizes = out / measured.JOURNAL, out / measured.MEASURED, SIZES["tiny" if tiny else "gpu"]
    command = _python("benchmarks", "--suite", *suites, "--sizes", sizes.name, "--out", out, "--resume", "--no-report")
    # A suite by itself has a budget of its own.
    several = len(suites) > 1
    command += ["--jobs", str(_jobs(tiny))] if several else []

    def owns(kind: str, nodeid: str) -> bool:
        return kind == measured.ROW and any(f"test_{suite}.py" in nodeid for suite in suites)

    def summary() -> tuple[str, bool]:
        row_key = measured.run_key(sizes)
        # Also after a stage that was killed.
        measured.write(journal, row_key, data, sizes.device)
        entries = Journal(journal, row_key, measured.ROW).done
        own = {nodeid: entry for nodeid, entry in entries.items() if owns(measured.ROW, nodeid)}
        outcomes = Counter(entry["outcome"] for entry in own.values())
        left = sum(not measured.is_finished(entry) for entry in own.values())
        words = f"{outcomes['passed']} rows, {outcomes['skipped']} skipped, {outcomes['failed']} failed"
        return f"{words}; {left} left for another run" if left else words, bool(left) or not own

    return Stage(name, command, limit_s, summary, owns, journal, patience_s=BENCH_PATIENCE_SECONDS, spends=several)


def _tune(out: Path, tiny: bool) -> Stage:
    journal, table = out / measured.JOURNAL, out / TUNED
    command = _python("seqcore", "tune", "--out", table, "--log", journal)

    def summary() -> tuple[str, bool]:
        if not table.exists():
            return "no table", True
        found = json.loads(table.read_text())
        words = f"{len(tables.rows(found))} rows for {found['measured_on']['device']}"
        done = Journal(journal, tuning_key(), TUNED_KIND).done
        left = 0 if tiny else sum(problem.name not in done for problem in problems())
        return f"{words}; {left} problems left for another run" if left else words, bool(left)

    return Stage(
        "tune", [*command, "--tiny"] if tiny else command, LIMIT_SECONDS, summary,
        lambda kind, name: kind in (TUNED_KIND, COMPARED_KIND), journal, table, LONG_PATIENCE_SECONDS, True,
    )  # fmt: skip


def _profile(out: Path, run_key: str, tiny: bool) -> Stage:
    journal, profiled = out / measured.JOURNAL, out / PROFILED
    command = _python("benchmarks.stages.run_profiles", "--out", profiled, "--journal", journal, "--key", run_key)

    def summary() -> tuple[str, bool]:
        if not profiled.exists():
            return "no profiles", True
        found = json.loads(profiled.read_text())
        done, failed, left = len(found["profiles"]), len(found["failed"]), found["left"]
        return f"{done} profiles, {failed} failed" + (f"; {left} left for another run" if left else ""), bool(left)

    return Stage(
        "profile", [*command, "--tiny"] if tiny else command, LIMIT_SECONDS, summary,
        lambda kind, name: kind == "profile", journal, profiled, LONG_PATIENCE_SECONDS, True,
    )  # fmt: skip
