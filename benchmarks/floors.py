"""The least time a recurrence can take on this GPU: what is measured for it, and what its floor is made of.

A step of one layer, split over the GPU as its plan says, cannot take less than

    step = exchange + max(weights, products)

    exchange  every program stores its share of the state, passes the barrier and reads all of its team's: measured,
              by a kernel that does nothing else, with the plan's slices, teams, rows and warps. Forward exchanges h,
              H/N columns of N blocks; backward the gates' gradients, G H/N columns. One slice exchanges nothing.
    weights   each program reads its G · units · H/N weights once: out of shared memory at 128 bytes a cycle, at the
              highest clock and times the programs on one multiprocessor; or, streamed, all programs together out of
              L2, at the rate measured there.
    products  2 · B · G · H · H/N · D operations at the rate of a large bfloat16 product, whatever the dtype.

The sequence takes T steps forward and as many backward, and several layers, or a batch that needs several launches,
that many times more. All other products run over all steps at once: their operations at the matrix rate or, if that
is longer, the layer's bytes at the copy bandwidth. The kernels that must follow each other each take a launch. The
floor of the layer is the sum.
"""

import functools
from dataclasses import asdict, dataclass

import torch

from benchmarks.shapes import Case
from benchmarks.timing import Roofs, Timing
from seqcore.clock import Call, Stopwatch
from seqcore.kernels.work import GATES, recurrent_flops
from seqcore.profiling import split
from seqcore.profiling.exchange import ROUNDS, Exchange, barrier_samples, exchange_of, exchange_samples

NEEDS_A_GPU = "needs a GPU: programs that run at the same time and wait for each other"
SHARED_BYTES_PER_CYCLE = 128
LAUNCHES = 200


class FloorMeter:
    """Measures this GPU's floors, each once, by the clock that measures everything compared with them."""

    def __init__(self, stopwatch: Stopwatch):
        properties = torch.cuda.get_device_properties()
        self.stopwatch = stopwatch
        self.multiprocessors = properties.multi_processor_count
        self.clock_hz = properties.clock_rate * 1e3
        self.exchange = functools.cache(self._exchange)

    @property
    def shared_bytes_per_us(self) -> float:
        """Of one multiprocessor; by the architecture, not measured."""
        return SHARED_BYTES_PER_CYCLE * self.clock_hz / 1e6

    def barrier(self, programs: int) -> Timing:
        """Milliseconds of one barrier among that many programs."""
        return Timing.of(barrier_samples(self.stopwatch, programs, 1))

    def _exchange(self, exchange: Exchange) -> Timing:
        return Timing.of(exchange_samples(self.stopwatch, exchange))

    @functools.cached_property
    def l2_bytes_per_us(self) -> float:
        """Of the whole GPU: what more bytes cost all programs that exchange them."""
        few, many = (
            Exchange(self.multiprocessors, 1, 16, kib * 1024 // 16, kib * 1024 // 16 // self.multiprocessors + 1, 4)
            for kib in (32, 256)
        )
        more_us = 1e3 * (self.exchange(many).ms_p50 - self.exchange(few).ms_p50)
        return self.multiprocessors * (many.bytes_read - few.bytes_read) / more_us

    def launch(self) -> Timing:
        """Milliseconds of an empty kernel, one launch of many in a row, from Python."""
        return self._each(_launch_many)

    def graph_launch(self) -> Timing:
        """Milliseconds of an empty kernel in the replay of a CUDA graph of many."""
        _launch_many()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _launch_many()
        return self._each(graph.replay)

    def _each(self, call: Call) -> Timing:
        self.stopwatch(call)
        return Timing.of([self.stopwatch(call) / LAUNCHES for _ in range(ROUNDS)])


def _launch_many() -> None:
    from seqcore.kernels import floors

    for _ in range(LAUNCHES):
        floors.empty_kernel[(1,)]()


@dataclass(frozen=True)
class Steps:
    """One pass through time of one layer: how many steps follow each other, and what each costs at least."""

    pass_: str
    plan: str
    regime: str
    steps: int
    exchange_us: float
    weights_us: float
    flops: float


def step_floors(case: Case, meter: FloorMeter) -> list[dict]:
    """Of the case's pass, forward and, in training, backward; plain dicts, as rows hold them."""
    passes = ("forward", "backward") if case.pass_ == "training" else ("forward",)
    return [asdict(_steps(case, meter, pass_)) for pass_ in passes]


def plan_of(case: Case, backward: bool, device: torch.device):
    """How the library launches the case, and the shape it was asked for."""
    sizes = {"directions": case.directions, "blocks": case.blocks, "backward": backward}
    return split.plan_of(case.op, case.H, case.B, case.dtype, device, **sizes)


def _steps(case: Case, meter: FloorMeter, pass_: str) -> Steps:
    plan, shape = plan_of(case, pass_ == "backward", torch.device("cuda"))
    exchange = exchange_of(plan, shape)
    return Steps(
        pass_,
        str(plan),
        plan.regime,
        case.layers * case.T * plan.launches,
        0.0 if exchange is None else 1e3 * meter.exchange(exchange).ms_p50,
        weights_us(plan, shape, meter),
        recurrent_flops(GATES[case.op], case.shape) / (case.layers * plan.launches),
    )


def weights_us(plan, shape, meter: FloorMeter) -> float:
    """Microseconds in which one step's weights can be read."""
    of_program = shape.gates * min(plan.units, shape.units) * shape.units * shape.itemsize
    programs = plan.slices * plan.teams
    if not plan.hold:
        return programs * of_program / meter.l2_bytes_per_us
    return of_program * -(-programs // meter.multiprocessors) / meter.shared_bytes_per_us


def layer_floor(info: dict, roofs: Roofs) -> dict[str, float]:
    """Milliseconds of each part of the floor of a row with ``step_floors``; they add up to the floor."""
    parts = {"exchange": 0.0, "weights": 0.0, "products": 0.0, "launches": info["launches"] * roofs.launch_us / 1e3}
    beside = info["flops"]
    for steps in info["step_floors"]:
        products_us = steps["flops"] / roofs.tflops / 1e6
        limit = "weights" if steps["weights_us"] >= products_us else "products"
        parts["exchange"] += steps["steps"] * steps["exchange_us"] / 1e3
        parts[limit] += steps["steps"] * max(steps["weights_us"], products_us) / 1e3
        beside -= steps["steps"] * steps["flops"]
    return parts | {"beside the steps": roofs.floor(beside, info["bytes"])[0]}
