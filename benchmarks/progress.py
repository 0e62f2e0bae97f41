"""How far a run of the benchmarks is: a bar in a terminal, a line for each case elsewhere."""

import sys
import time

import pytest

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """A pytest plugin that takes the place of pytest's own terminal output."""

    def __init__(self) -> None:
        self.bar = None
        self.done = 0
        self.total = 0
        self.failures: list[str] = []
        # Why cases were skipped, each reason once.
        self.reasons: dict[str, None] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, unit="case", dynamic_ncols=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report.nodeid or "collection", report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin = time.monotonic()
        if self.bar is not None:
            self.bar.set_description(_short(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(report.nodeid, report)
        if report.skipped:
            self.reasons[report.longrepr[-1].removeprefix("Skipped: ")] = None
        if report.when != "teardown":
            self.outcome = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        else:
            seconds = time.monotonic() - self.begin
            print(f"[{self.done}/{self.total}] {_short(nodeid)}: {self.outcome}, {seconds:.1f} s", flush=True)

    def pytest_sessionfinish(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _fail(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.failures.append(name)
        # Where and what; the whole traceback is for `pytest benchmarks`.
        where = getattr(report.longrepr, "reprcrash", None) or report.longreprtext
        (print if self.bar is None else self.bar.write)(f"FAILED {name}\n{where}")


def _short(nodeid: str) -> str:
    return nodeid.partition("[")[2].removesuffix("]") or nodeid.rpartition("::")[2]
