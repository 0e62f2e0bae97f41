"""Options, marks and fixtures of the benchmarks."""

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks.attention_cases import AttentionCase
from benchmarks.environment import BUSY_CORES, busy_cores, environment
from benchmarks.floors import FloorMeter
from benchmarks.measured import METER, OUT_OF_TIME
from benchmarks.peers import versions
from benchmarks.resume import why
from benchmarks.rows import add_roofs
from benchmarks.shapes import SIZES, Case, Sizes, choose_sizes
from benchmarks.timing import RoofMeter
from seqcore.clock import Stopwatch

MARKS = {
    "bottleneck": "layer against layer: what stepping through time costs",
    "recurrence": "recurrences against torch.nn's, and beside their floors",
    "attention": "attention against each of torch's kernels by name",
    "floors": "what waiting, exchanging, copying, multiplying and launching cost here",
    "models": "character models trained on real text",
    "forward": "inference",
    "training": "forward and backward",
}
NOT_MEASURED = pytest.StashKey[list]()
BUSY = pytest.StashKey[float | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqcore")
    group.addoption(
        "--sizes",
        default="auto",
        choices=["auto", *SIZES],
        help="which sizes to measure; auto: the GPU's where there is one, else the CPU's",
    )
    group.addoption("--time-share", type=float, default=1.0, help="how much of its usual time each suite may take")
    group.addoption("--text", help="text file the models train on (default: Python's standard library)")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config_sizes(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    # In tests a warning is an error; a measurement of minutes on a new machine should not die of one.
    config.addinivalue_line("filterwarnings", "default")
    config.stash[NOT_MEASURED] = []
    config.stash[BUSY] = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.outcome != "passed":
        found = {"name": item.name, "outcome": report.outcome, "reason": why(report, call)}
        item.config.stash[NOT_MEASURED].append(found)
    return report


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    # The host's name says nothing about speed, and results are published.
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    sizes = config_sizes(config)
    for benchmark in output_json["benchmarks"]:
        # A case that was timed and failed afterwards has no row.
        if "flops" in benchmark["extra_info"]:
            add_roofs(benchmark["extra_info"], config.stash[METER].roofs)
    output_json["seqcore"] = {
        "sizes": sizes.name,
        "machine": {**environment(sizes.device), "peers": versions(), "busy_cores_at_start": config.stash[BUSY]},
        "not_measured": config.stash[NOT_MEASURED],
    }


def parameters(cases: Sequence[Case | AttentionCase]) -> list:
    """Cases as pytest's parameters, marked by their pass."""
    return [pytest.param(case, id=case.id, marks=getattr(pytest.mark, case.pass_)) for case in cases]


def config_sizes(config: pytest.Config) -> Sizes:
    return choose_sizes(config.getoption("sizes"))


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return config_sizes(request.config)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_if_busy(request: pytest.FixtureRequest, sizes: Sizes) -> None:
    """On a CPU that others use, take one thread.

    Several threads wait for each other at the end of each small product; if one of them has lost its core, all wait
    for the scheduler, and a recurrence takes a hundred times as long as it should.
    """
    busy = request.config.stash[BUSY] = busy_cores()
    if sizes.device == "cpu" and busy is not None and busy > BUSY_CORES:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stopwatch(sizes: Sizes) -> Stopwatch:
    return Stopwatch(sizes.device)


@pytest.fixture(scope="session")
def meter(
    request: pytest.FixtureRequest,
    sizes: Sizes,
    stopwatch: Stopwatch,
    floor_meter: FloorMeter | None,
    _one_thread_if_busy: None,
) -> RoofMeter:
    """This machine's limits, measured in the same process as everything that is compared with them."""
    meter = RoofMeter(stopwatch, sizes.device, sizes.dtype, sizes.peak_side, sizes.copy_bytes)
    meter.sample(10)
    if floor_meter is not None:
        meter.launch_us = 1e3 * floor_meter.graph_launch().ms_p50
    request.config.stash[METER] = meter
    return meter


@pytest.fixture(autouse=True)
def _sample_roofs(meter: RoofMeter) -> None:
    meter.sample(1)


@pytest.fixture(scope="session")
def describe(sizes: Sizes) -> Callable[[], dict]:
    """The environment at this moment, for a row."""
    return lambda: environment(sizes.device)


@pytest.fixture(scope="session")
def floor_meter(sizes: Sizes, stopwatch: Stopwatch) -> FloorMeter | None:
    """This GPU's floors; None on a CPU, where programs that wait for each other do not run at the same time."""
    return FloorMeter(stopwatch) if sizes.device == "cuda" else None


@pytest.fixture(scope="module")
def in_time(request: pytest.FixtureRequest) -> Callable[[float], None]:
    """Skip what would begin more than that many seconds, or the share of them that was asked for, after its suite."""
    begin, share = time.monotonic(), request.config.getoption("--time-share")

    def check(limit: float) -> None:
        limit *= share
        if time.monotonic() - begin > limit:
            pytest.skip(f"{OUT_OF_TIME}: the {limit:g} s up to here are spent")

    return check
