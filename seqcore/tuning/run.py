"""A whole run: every problem not yet in the log, then torch's own beside it, then the table."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import info
from ..files import replaceable
from ..journal import Journal, discard
from ..kernels import tables, tuning
from ..kernels.tuning import INTERPRETER
from . import table
from .problem import Problem
from .problems import problems as all_problems
from .progress import Progress
from .race import OutOfTime
from .search import Bench, compare, search

# Of lines in the log.
TUNED_KIND, COMPARED_KIND = "tuned", "compared with torch's own"


@dataclass
class Outcome:
    """What a run came to."""

    results: list[tuple[Problem, dict[str, Any]]]
    left: list[str]
    no_slower: list[str]


def run(problems: Sequence[Problem], bench: Bench, out: Path, log: Path, force: bool) -> Outcome:
    """Search, compare, and write ``out``; out of time or interrupted, write what there is.

    With ``force`` neither the log nor the user's table is believed. A table in ``out`` keeps the rows that are not
    measured again.

    Raises:
        BadTable: if ``out`` or the user's table is none, and not ``force``.
        OSError: if ``out`` is no regular file, or ``log`` no journal.
    """
    before = _before(out, bench.device.arch, force)
    if force:
        discard(log)
    searched, compared = Journal(log, key(), TUNED_KIND), Journal(log, key(), COMPARED_KIND)
    with tuning.user_table(None) if force else contextlib.nullcontext():
        whole = _each({problem.name: partial(search, problem, bench) for problem in problems}, searched)
        done = [(problem, searched.done[problem.name]) for problem in problems if problem.name in searched]
        results = [(problem, found) for problem, found in done if found["choice"] is not None]
        found = table.make(bench.device, results, before)
    left = [problem.name for problem in problems if problem.name not in searched]
    if results:
        table.write(found, out)
    if whole and results and bench.device.arch != INTERPRETER:
        contests = {problem.contest: partial(compare, problem, bench) for problem, _ in results if problem.contest}
        with tuning.user_table(out):
            _each(contests, compared)
        left += [name for name in contests if name not in compared]
        found = table.judged(found, _decided(compared.done))
        table.write(found, out)
    return Outcome(results, left, found["no_slower"])


def _before(out: Path, arch: str, force: bool) -> dict[str, Any]:
    if not replaceable(out).exists():
        return {}
    try:
        return tables.read(out, arch)
    except tables.BadTable:
        if not force:
            raise
        return {}


def key() -> str:
    """What times depend on."""
    return hashlib.sha256(str({**table.versions(), "kernels": info.kernel_hashes()}).encode()).hexdigest()[:16]


def _each(tasks: dict[str, Callable[[], Any]], journal: Journal) -> bool:
    """Do what the journal does not have; whether all of it is done. What once began and never ended comes last."""
    todo = journal.suspects_last(name for name in tasks if name not in journal)
    with Progress(len(todo), "problem") as progress:
        try:
            for name in todo:
                progress.begin(name)
                journal.begin(name)
                journal.add(name, tasks[name]())
                progress.end(f"{name}: {_said(journal.done[name])}")
        except (OutOfTime, KeyboardInterrupt):
            return False
    return True


def _said(found: dict[str, Any] | float) -> str:
    if isinstance(found, float):
        return f"torch's own takes {found:.2f} times as long"
    dropped = [f"{count} {reason}" for reason, count in found["dropped"].items()]
    refused = [f"{len(found['refused'])} err"] if found["refused"] else []
    told = f"{found['candidates']} candidates" + "".join(f", {part}" for part in (*dropped, *refused))
    if "failed" in found:
        return f"{found['failed']} ({told})"
    if found["choice"] == found["before"]:
        return f"{found['ms']:.3f} ms, as it is ({told})"
    return f"{found['before_ms']:.3f} -> {found['ms']:.3f} ms ({told})"


def _decided(contests: dict[str, float]) -> dict[str, dict[str, float]]:
    """The contests of each operation of which none is missing: a verdict on some sizes is none on the others."""
    needed: dict[str, set[str]] = {}
    for problem in all_problems():
        if problem.contest:
            needed.setdefault(problem.operation, set()).add(problem.contest)
    return {
        operation: {name: round(contests[name], 3) for name in sorted(names)}
        for operation, names in needed.items()
        if names <= contests.keys()
    }
