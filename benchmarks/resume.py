"""A pytest plugin by which a run goes on where another stopped, whatever stopped it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from seqcore.journal import Journal

# How torch begins to say that the GPU answers this process no more; whatever comes after would fail of it too.
BROKEN = "CUDA error"


def is_broken(reason: str) -> bool:
    """Whether what failed for that reason left a GPU that answers no more; Triton says it in words of its own."""
    if BROKEN in reason or not torch.cuda.is_initialized():
        return BROKEN in reason
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Resume:
    """What the journal says is finished is not run again; what was begun there and never finished comes last.

    Args:
        journal: read at the beginning, written as each item ends: {"outcome", "reason"} and what ``more`` tells.
        finished: whether such an entry means that the item need not run again.
        more: further entries of an item that passed.
    """

    def __init__(
        self,
        journal: Journal,
        finished: Callable[[dict], bool] = lambda entry: entry["outcome"] != "failed",
        more: Callable[[pytest.Item], dict[str, Any]] = lambda item: {},
    ):
        self.journal, self.finished, self.more = journal, finished, more
        self.collected: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = {name for name, entry in self.journal.done.items() if self.finished(entry)}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        last = self.journal.suspects | self.journal.done.keys()
        items[:] = sorted((item for item in items if item.nodeid not in done), key=lambda item: item.nodeid in last)
        self.collected = [item.nodeid for item in items]

    @property
    def left(self) -> list[str]:
        """What was to run and has not ended, since the run ended before."""
        return [name for name in self.collected if name not in self.journal]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.journal.begin(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if report.when == "call" or report.outcome != "passed":
            entry = {"outcome": report.outcome, "reason": why(report, call)}
            self.journal.add(item.nodeid, entry | (self.more(item) if report.passed else {}))
            if report.failed and is_broken(entry["reason"]):
                item.session.shouldstop = "the GPU answers this process no more"
        return report


def why(report: pytest.TestReport, call: pytest.CallInfo) -> str:
    """Why an item did not pass: what a skip says, what was expected to fail, or what was raised."""
    if report.passed:
        return ""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    # A skip tells file, line and reason.
    return report.longrepr[-1].removeprefix("Skipped: ") if report.skipped else str(call.excinfo.value)
