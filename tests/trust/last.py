"""What came out when promises and mutants were last tried, in results/last.json."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.environment import commit, cpu_name, source_hash, version
from seqcore.files import write_whole

from .kinds import Guard, Promise
from .mutating import Verdict
from .running import Outcome, of_promise
from .subjects import subjects

# In a folder of this name: no hash of sources hangs on it.
FILE = Path(__file__).with_name("results") / "last.json"


def read() -> dict[str, Any]:
    """By the words of each: {"promises": {…}, "guards": {…}}; of those that are as they were when they were tried."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {"promises": {}, "guards": {}}
    things = (thing for subject in subjects().values() for thing in (*subject.promises, *subject.guards))
    today = {thing.words: _hash(thing) for thing in things}
    return {
        kind: {words: kept for words, kept in of.items() if kept["of"] == today.get(words)}
        for kind, of in found.items()
    }


def held() -> frozenset[str]:
    """The words of promises that held and of guards whose mutants were killed, with all sources as they are today."""
    return frozenset(
        words
        for of in read().values()
        for words, kept in of.items()
        if kept.get("sources") == where()["sources"] and _is_good(kept)
    )


def _is_good(kept: dict[str, Any]) -> bool:
    return kept["mutant"] == "killed" if "mutant" in kept else kept["passed"] > 0 == kept["failed"]


def _hash(thing: Promise | Guard) -> str:
    """Of what it says, tries and replaces."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:12]


def write(found: dict[str, Any]) -> None:
    write_whole(FILE, json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


@functools.cache
def where() -> dict[str, Any]:
    """The day, the commit and the machine, as they are before anything is written."""
    # A night writes these two, subject by subject.
    head, changed, _ = (commit("tests/trust/results", "docs/trust.md") or "unknown").partition("-")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": head[:10] + (" with changes" if changed else ""),
        "sources": source_hash(),
        "on": f"{cpu_name()}, torch {version('torch')}, triton {version('triton')}",
    }


def of_promises(
    promises: Sequence[Promise], usual: Iterable[Outcome], nightly: Iterable[Outcome]
) -> dict[str, dict[str, Any]]:
    """How many cases every run and the nightly one try of each promise, and how the tests of the latter ended."""
    usual, nightly = list(usual), list(nightly)
    found = {}
    for promise in promises:
        of_night = of_promise(promise, nightly)
        ended = Counter(outcome.ended for outcome in of_night)
        found[promise.words] = {
            "usual": _cases(of_promise(promise, usual)),
            "nightly": _cases(of_night),
            **{word: ended[word] for word in ("passed", "failed", "skipped")},
            "of": _hash(promise),
            **where(),
        }
    return found


def _cases(outcomes: Iterable[Outcome]) -> int:
    return sum(outcome.cases for outcome in outcomes if outcome.ended != "skipped")


def of_guards(verdicts: Iterable[Verdict]) -> dict[str, dict[str, Any]]:
    """What became of each guard's mutant."""
    return {v.guard.words: {"mutant": v.word, "of": _hash(v.guard), **where()} for v in verdicts}
