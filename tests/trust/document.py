"""The tables of docs/trust.md, made of the subjects and of what came out last."""

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.marked import Marked
from benchmarks.reporting.tables import table

from . import last
from .kinds import Guard, Promise
from .subjects import ROOT, Subject, subjects

DOCUMENT = ROOT / "docs" / "trust.md"
MARKED = Marked("trust: made by `python -m tests.trust` from tests/trust/, not by hand", DOCUMENT)
NEVER = "not tried yet"

_table = functools.partial(table, words=True, aligned=False)


def section() -> str:
    """What stands between the marks."""
    found = last.read()
    return "\n\n".join(part for subject in subjects().values() for part in _of_subject(subject, found))


def _of_subject(subject: Subject, found: dict[str, Any]) -> Iterator[str]:
    yield f"## {subject.title}"
    header = ["promised", "how it is tested", "by", "cases in every run", "in the nightly run", "last result"]
    yield _table(header, (_promise(promise, found["promises"]) for promise in subject.promises))
    header = ["what stands guard", "mutant", "killed by", "last result"]
    yield _table(header, (_guard(guard, found["guards"]) for guard in subject.guards))


def _promise(promise: Promise, found: dict[str, Any]) -> list[str]:
    tests = ", ".join(f"`{test}`" for test in promise.tests)
    result = found.get(promise.words)
    if result is None:
        return [promise.words, promise.how, tests, "-", "-", NEVER]
    counts = (f"{result[word]:,} {word}" for word in ("passed", "failed", "skipped") if result[word])
    said = f"{', '.join(counts)} ({result['date']}, {result['commit']})"
    return [promise.words, promise.how, tests, f"{result['usual']:,}", f"{result['nightly']:,}", said]


def _guard(guard: Guard, found: dict[str, Any]) -> list[str]:
    result = found.get(guard.words)
    said = f"{result['mutant']} ({result['date']}, {result['commit']})" if result else NEVER
    change = f"{guard.file}: {_code(guard.old)} → {_code(guard.new)}"
    return [guard.words, change, f"`{guard.test}`", said]


def _code(text: str) -> str:
    """A piece of source in a cell of a table."""
    lines = [line.strip() for line in text.strip().splitlines()]
    shown = " ⏎ ".join(lines).replace("|", "\\|")
    return f"`` {shown} ``" if shown else "nothing"


def write() -> None:
    MARKED.write(section())


def is_current() -> bool:
    return MARKED.inside().strip() == section()
