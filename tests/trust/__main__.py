"""Try what seqcore promises as a night allows, kill the mutants, and write both into docs/trust.md."""

import argparse
import sys
from collections.abc import Sequence

from seqcore.testing.shares import cores

from . import document, last
from .kinds import Guard, Promise
from .mutating import judge
from .running import of_promise, run
from .subjects import TITLES, named_tests, subjects


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"some of {', '.join(TITLES)}; all by default")
    parser.add_argument("--only", choices=("promises", "mutants", "table"), help="one of the three parts")
    parser.add_argument("--rest", action="store_true", help="only what has not held yet with these sources")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes at the same time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.subjects) - TITLES.keys():
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    chosen = [subject for name, subject in subjects().items() if not options.subjects or name in options.subjects]
    held = last.held() if options.rest else frozenset()
    last.where()
    broken = []
    if options.only in (None, "promises"):
        # A subject at a time: a night that is ended keeps what it has.
        for subject in chosen:
            broken += _promises([promise for promise in subject.promises if promise.words not in held], options.jobs)
    if options.only in (None, "mutants"):
        guards = [guard for subject in chosen for guard in subject.guards if guard.words not in held]
        broken += _mutants(guards, options.jobs)
    document.write()
    print(*broken, f"{len(broken)} promises or guards did not hold", sep="\n")
    return 1 if broken else 0


def _promises(promises: Sequence[Promise], jobs: int) -> list[str]:
    """Try them; which did not hold."""
    if not promises:
        return []
    tests = named_tests(promises)
    usual, nightly = (
        [outcome for interpreted in (False, True) for outcome in run(tests, interpreted, at_night, jobs)]
        for at_night in (False, True)
    )
    found = last.read()
    found["promises"] |= last.of_promises(promises, usual, nightly)
    last.write(found)
    return [
        f"{promise.words}: {', '.join(names) or 'no test of it was found'}"
        for promise in promises
        if (names := [o.name for o in of_promise(promise, [*usual, *nightly]) if o.ended == "failed"])
        or not of_promise(promise, nightly)
    ]


def _mutants(guards: Sequence[Guard], jobs: int) -> list[str]:
    """Try to kill them; which were not."""
    found, alive = last.read(), []
    for verdict in judge(guards, jobs):
        print(f"{verdict.word:10} {verdict.seconds:4.0f} s  {verdict.guard.words}", flush=True)
        found["guards"] |= last.of_guards([verdict])
        last.write(found)
        if verdict.word != "killed":
            alive.append(f"{verdict.guard.words}: {verdict.word}")
    return alive


if __name__ == "__main__":
    sys.exit(main())
