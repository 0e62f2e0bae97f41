"""Runs of the tests that promises name: how each ended, and how many cases it tried."""

import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .kinds import Promise
from .subjects import ROOT

# Of pytest: all passed; some failed; none was chosen.
PASSED, FAILED, NONE_CHOSEN = 0, 1, 5
EVERY_TEST_COUNTS = ["-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Outcome:
    """Of one test: "passed", "failed" or "skipped", and the cases that it tried."""

    name: str
    ended: str
    cases: int


def pytest_command(*arguments: str) -> list[str]:
    # The script, since `python -m pytest` would put the checkout's folder `kernels` before a package of that name.
    return [str(Path(sysconfig.get_path("scripts")) / "pytest"), *arguments]


def run(tests: Sequence[str], interpreted: bool, nightly: bool, jobs: int) -> list[Outcome]:
    """Run ``tests``, as a promise names them, where kernels are ``interpreted`` or in the ordinary process.

    Raises:
        RuntimeError: if pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = [*EVERY_TEST_COUNTS, "-n", str(jobs), "--junitxml", str(report)]
        command = pytest_command(*options, *(f"tests/{test}" for test in tests))
        status = subprocess.call(command, cwd=ROOT, env=environment(interpreted=interpreted, nightly=nightly))
        if status not in (PASSED, FAILED, NONE_CHOSEN):
            raise RuntimeError(f"pytest ended with status {status}: {' '.join(command)}")
        return list(outcomes(report))


def environment(*, interpreted: bool, nightly: bool = False, **more: str) -> dict[str, str]:
    """This process's variables, with those that decide which tests run and how much they try."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SEQCORE_NIGHTLY")}
    chosen = {"TRITON_INTERPRET": "1"} if interpreted else {}
    return {**kept, **chosen, **({"SEQCORE_NIGHTLY": "1"} if nightly else {}), **more}


def outcomes(report: Path) -> Iterable[Outcome]:
    """Those in a report of pytest's, in the form of JUnit."""
    for case in ElementTree.parse(report).iter("testcase"):
        # "tests.test_limits", and behind it a class where there is one; nothing where a whole file is skipped.
        _, module, *inside = (case.get("classname") or case.get("name")).split(".")
        name = "::".join([f"{module}.py", *inside, *([case.get("name")] if case.get("classname") else [])])
        faults = {child.tag for child in case}
        ended = "failed" if faults & {"failure", "error"} else "skipped" if "skipped" in faults else "passed"
        cases = case.find("properties/property[@name='cases']")
        yield Outcome(name, ended, int(cases.get("value")) if cases is not None else 1)


def of_promise(promise: Promise, found: Iterable[Outcome]) -> list[Outcome]:
    """Those of the tests that ``promise`` names."""
    return [outcome for outcome in found if any(is_named(outcome.name, test) for test in promise.tests)]


def is_named(name: str, test: str) -> bool:
    """Whether the test called ``name`` is ``test`` or one of those in it."""
    return name == test or name.startswith((f"{test}::", f"{test}["))
