"""Options, marks and fixtures of the benchmarks."""

import time
from collections.abc import Callable

import pytest

from benchmarks.environment import environment
from benchmarks.shapes import SIZES, Sizes, choose_sizes
from benchmarks.timing import Roofs, Stopwatch, measure_roofs

MARKS = {
    "bottleneck": "layer against layer: what stepping through time costs",
    "models": "character models trained on real text",
    "forward": "inference",
    "training": "forward and backward",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqcore")
    group.addoption(
        "--sizes",
        default="auto",
        choices=["auto", *SIZES],
        help="which sizes to measure; auto: the GPU's where there is one, else the CPU's",
    )
    group.addoption("--text", help="text file the models train on (default: Python's standard library)")


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    config.stash[NOT_MEASURED] = []


NOT_MEASURED = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.outcome != "passed":
        # A skip's reason is the last of (file, line, reason); a failure's is what was raised.
        reason = report.longrepr[-1] if report.skipped else str(call.excinfo.value)
        found = {"name": item.name, "outcome": report.outcome, "reason": reason.removeprefix("Skipped: ")}
        item.config.stash[NOT_MEASURED].append(found)
    return report


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    # The host's name says nothing about speed, and results are published.
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    sizes = config_sizes(config)
    output_json["seqcore"] = {
        "sizes": sizes.name,
        "machine": environment(sizes.device),
        "not_measured": config.stash[NOT_MEASURED],
    }


def config_sizes(config: pytest.Config) -> Sizes:
    return choose_sizes(config.getoption("sizes"))


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return config_sizes(request.config)


@pytest.fixture(scope="session")
def stopwatch(sizes: Sizes) -> Stopwatch:
    return Stopwatch(sizes.device)


@pytest.fixture(scope="session")
def roofs(sizes: Sizes, stopwatch: Stopwatch) -> Roofs:
    """This machine's limits, measured in the same process as everything that is compared with them."""
    return measure_roofs(stopwatch, sizes.device, sizes.dtype, sizes.peak_side, sizes.copy_bytes)


@pytest.fixture(scope="session")
def describe(sizes: Sizes) -> Callable[[], dict]:
    """The environment at this moment, for a row."""
    return lambda: environment(sizes.device)


@pytest.fixture(scope="session")
def in_time(sizes: Sizes) -> Callable[[], None]:
    """Skip the rest of the bottleneck suite once its time is spent."""
    begin = time.monotonic()

    def check() -> None:
        if time.monotonic() - begin > sizes.suite_seconds:
            pytest.skip(f"out of time: the suite's {sizes.suite_seconds} s are spent")

    return check
