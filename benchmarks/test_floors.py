"""What everything else is a multiple of: waiting, exchanging, reading, copying, multiplying, launching."""

from collections.abc import Callable

import pytest

from benchmarks.floors import NEEDS_A_GPU, Exchange, FloorMeter
from benchmarks.rows import floor_info
from benchmarks.timing import RoofMeter, Timing
from seqcore.clock import Stopwatch

pytestmark = pytest.mark.floors
PROGRAMS = (8, 16, 32, 64, 96, 132)
# Programs that exchange, and KiB that each of them reads.
EXCHANGES = [(programs, kib) for programs in (16, 64, 132) for kib in (4, 16, 64, 256)]
ROWS = 16
CALIBRATION = 10


@pytest.fixture
def gpu_floors(floor_meter: FloorMeter | None) -> FloorMeter:
    if floor_meter is None:
        pytest.skip(NEEDS_A_GPU)
    return floor_meter


@pytest.fixture
def record(benchmark, stopwatch: Stopwatch, describe: Callable[[], dict]) -> Callable[..., None]:
    """Write a row; pytest-benchmark's own statistics are those of the call that measures it, told as one round."""

    def write(op: str, shape: dict[str, int], unit: str, measure: Callable[[], tuple[float, Timing]]) -> None:
        value, timing = benchmark.pedantic(measure, rounds=1)
        benchmark.group = f"floors {op}"
        benchmark.extra_info |= floor_info(op, shape, value, unit, timing, describe())

    return write


def in_us(timing: Timing) -> tuple[float, Timing]:
    return 1e3 * timing.ms_p50, timing


def enough(programs: int, floors: FloorMeter) -> None:
    if programs > floors.multiprocessors:
        pytest.skip(f"this GPU has {floors.multiprocessors} multiprocessors")


@pytest.mark.parametrize("programs", PROGRAMS)
def test_barrier(programs: int, gpu_floors: FloorMeter, record: Callable) -> None:
    enough(programs, gpu_floors)
    record("barrier", {"programs": programs}, "µs", lambda: in_us(gpu_floors.barrier(programs)))


@pytest.mark.parametrize("programs, kib", EXCHANGES)
def test_exchange(programs: int, kib: int, gpu_floors: FloorMeter, record: Callable) -> None:
    enough(programs, gpu_floors)
    width = kib * 1024 // ROWS
    exchange = Exchange(programs, 1, ROWS, width, -(-width // programs), num_warps=4)
    shape = {"programs": programs, "rows": ROWS, "bytes": exchange.bytes_read}
    record("barrier and exchange", shape, "µs", lambda: in_us(gpu_floors.exchange(exchange)))


def test_l2(gpu_floors: FloorMeter, record: Callable) -> None:
    nothing = Timing(0.0, 0.0, 0.0)
    record("L2 reads, all programs", {}, "GB/s", lambda: (gpu_floors.l2_bytes_per_us / 1e3, nothing))


def test_shared_memory(gpu_floors: FloorMeter, record: Callable) -> None:
    nothing, rate = Timing(0.0, 0.0, 0.0), gpu_floors.shared_bytes_per_us / 1e3
    record("shared memory, one multiprocessor (computed)", {}, "GB/s", lambda: (rate, nothing))


def test_copy(gpu_floors: FloorMeter, meter: RoofMeter, stopwatch: Stopwatch, record: Callable) -> None:
    def measure() -> tuple[float, Timing]:
        timing = Timing.of([stopwatch(meter.copy) for _ in range(CALIBRATION)])
        return meter.bytes / (timing.ms_p50 * 1e6), timing

    record("copy, read and written", {"bytes": meter.bytes}, "GB/s", measure)


def test_matrix(gpu_floors: FloorMeter, meter: RoofMeter, stopwatch: Stopwatch, record: Callable) -> None:
    def measure() -> tuple[float, Timing]:
        timing = Timing.of([stopwatch(meter.product) for _ in range(CALIBRATION)])
        return meter.flops / (timing.ms_p50 * 1e9), timing

    record(f"{meter.dtype} matrix product", {"flops": meter.flops}, "TFLOP/s", measure)


def test_launch(gpu_floors: FloorMeter, record: Callable) -> None:
    record("launch from Python", {}, "µs", lambda: in_us(gpu_floors.launch()))


def test_graph_launch(gpu_floors: FloorMeter, record: Callable) -> None:
    record("launch in a CUDA graph", {}, "µs", lambda: in_us(gpu_floors.graph_launch()))
