"""The tests, as a stage of the campaign: ``python -m benchmarks.stages.run_tests --journal FILE --key KEY [PATH...]``.

Those that launch kernels come first. Begun again, only what has not passed is run.
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.resume import Resume
from seqcore.journal import Journal

KIND = "test"
# These run the campaign and the benchmarks themselves, and are left to `pytest tests`.
LEFT_OUT = ("test_benchmarks.py", "test_campaign.py")


class KernelsFirst:
    """What launches kernels is what a GPU is asked for."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("kernels") is None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages.run_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True, metavar="FILE")
    parser.add_argument("--key", required=True, help="what outcomes depend on")
    parser.add_argument("paths", nargs="*", default=["tests"], help="default: all tests")
    options = parser.parse_args(arguments)
    journal = Journal(options.journal, options.key, KIND)
    ignored = [f"--ignore={ROOT / 'tests' / name}" for name in LEFT_OUT]
    paths = [str(ROOT / path) for path in options.paths]
    status = pytest.main([f"--rootdir={ROOT}", "-q", *ignored, *paths], plugins=[KernelsFirst(), Resume(journal)])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and journal.done:
        status = pytest.ExitCode.OK
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
