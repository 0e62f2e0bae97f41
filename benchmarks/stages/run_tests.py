"""The tests, as a stage of the campaign: ``python -m benchmarks.stages.run_tests --journal FILE --key KEY [PATH...]``.

Those that launch kernels come first. Begun again, only what has not passed is run. With ``--jobs`` several processes
share them, since most of a first run's time goes into compiling; what one of them left, for it crashed, is run at last.
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.resume import Resume
from seqcore.journal import Journal
from seqcore.testing.shares import Share, run_shares

KIND = "test"
# These run the campaign and the benchmarks themselves, and are left to `pytest tests`.
LEFT_OUT = ("test_benchmarks.py", "test_campaign.py")


class KernelsFirst:
    """What launches kernels is what a GPU is asked for. Of all tests only those of ``share``."""

    def __init__(self, share: Share | None = None):
        self.share = share

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("kernels") is None)
        if self.share is not None:
            # Before any are left out as finished: all processes must agree on whose they are.
            items[:] = self.share.of(items)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages.run_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True, metavar="FILE")
    parser.add_argument("--key", required=True, help="what outcomes depend on")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the tests")
    parser.add_argument("--share", type=Share.parse, help="only this part of the tests, like 0/4")
    parser.add_argument("paths", nargs="*", default=["tests"], help="default: all tests")
    options = parser.parse_args(arguments)
    if options.jobs > 1:
        command = [sys.executable, "-m", "benchmarks.stages.run_tests"]
        run_shares([*command, "--journal", str(options.journal), "--key", options.key, *options.paths], options.jobs)
    journal = Journal(options.journal, options.key, KIND)
    # What fails here has failed in its share just now, and is run again when the stage is.
    finished = {"finished": lambda entry: True} if options.jobs > 1 else {}
    ignored = [f"--ignore={ROOT / 'tests' / name}" for name in LEFT_OUT]
    paths = [str(ROOT / path) for path in options.paths]
    plugins = [KernelsFirst(options.share), Resume(journal, **finished)]
    status = pytest.main([f"--rootdir={ROOT}", "-q", *ignored, *paths], plugins=plugins)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and journal.done:
        status = pytest.ExitCode.OK
    if status == pytest.ExitCode.OK and any(entry["outcome"] == "failed" for entry in journal.done.values()):
        status = pytest.ExitCode.TESTS_FAILED
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
