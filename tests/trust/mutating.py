"""The checkout with one guard taken out, to see whether the guard's test fails."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from .kinds import Guard
from .running import EVERY_TEST_COUNTS, FAILED, PASSED, environment, pytest_command
from .subjects import ROOT

LIMIT_SECONDS = 600
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
# At the top alone: benchmarks/study is a package.
RESULTS = {"build", "dist", "study"}


@dataclass(frozen=True)
class Verdict:
    """Of one mutant: "killed", "survived", or why neither can be said; how long its test took."""

    guard: Guard
    word: str
    seconds: float


class Copy:
    """A checkout of its own, whose ``seqcore`` tests import; files in it can be replaced and put back."""

    def __init__(self, folder: Path):
        self.checkout, self.path = folder / "checkout", folder / "path"
        shutil.copytree(ROOT, self.checkout, ignore=_left_out)
        # As if installed: the package, with the kernels in it.
        (self.path / "seqcore").mkdir(parents=True)
        for entry in (*(self.checkout / "seqcore").iterdir(), self.checkout / "kernels"):
            (self.path / "seqcore" / entry.name).symlink_to(entry)
        (self.path / "benchmarks").symlink_to(self.checkout / "benchmarks")

    @contextmanager
    def mutated(self, guard: Guard) -> Iterator[None]:
        """Within it the guard is taken out."""
        file = self.checkout / guard.file
        whole = file.read_text()
        file.write_text(mutant(guard, whole))
        yield
        file.write_text(whole)

    def status(self, test: str, interpreted: bool) -> int | None:
        """pytest's exit status after ``test``; None after the limit."""
        variables = environment(
            interpreted=interpreted,
            PYTHONPATH=str(self.path),
            PYTHONSAFEPATH="1",
            # A file changed twice within a second must not be taken for what was compiled of it before.
            PYTHONDONTWRITEBYTECODE="1",
            OMP_NUM_THREADS="1",
        )
        command = pytest_command(*EVERY_TEST_COUNTS, "-x", f"tests/{test}")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            return subprocess.call(command, cwd=self.checkout, env=variables, timeout=LIMIT_SECONDS, **quiet)
        except subprocess.TimeoutExpired:
            return None


def _left_out(folder: str, names: list[str]) -> set[str]:
    return NOT_SOURCES(folder, names) | (RESULTS if Path(folder) == ROOT else set())


def mutant(guard: Guard, whole: str) -> str:
    """``whole`` without the guard.

    Raises:
        ValueError: if what it is to take out does not stand there once.
    """
    if whole.count(guard.old) != 1:
        raise ValueError(f"{guard.old!r} stands {whole.count(guard.old)} times in {guard.file}, not once")
    return whole.replace(guard.old, guard.new)


def judge(guards: Sequence[Guard], jobs: int) -> Iterator[Verdict]:
    """Run each guard's test on its mutant, and before that on the whole: a test that fails there says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for index in range(jobs):
            copies.put(Copy(Path(folder) / str(index)))

        unmutated: dict[tuple[str, bool], int | None] = {}

        def judged(guard: Guard) -> Verdict:
            copy, begun, test = copies.get(), time.monotonic(), (guard.test, guard.interpreted)
            try:
                if test not in unmutated:
                    unmutated[test] = copy.status(*test)
                word = _word(copy, guard) if unmutated[test] == PASSED else _status(unmutated[test]) + " unmutated"
            finally:
                copies.put(copy)
            return Verdict(guard, word, time.monotonic() - begun)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(judged, guards)


def _word(copy: Copy, guard: Guard) -> str:
    with copy.mutated(guard):
        status = copy.status(guard.test, guard.interpreted)
    if status is not None and status < 0:
        # What reads or writes where it should not may take the process with it.
        return "killed"
    return {FAILED: "killed", PASSED: "survived"}.get(status) or _status(status)


def _status(status: int | None) -> str:
    return f"no end in {LIMIT_SECONDS} s" if status is None else f"pytest's status is {status}"
