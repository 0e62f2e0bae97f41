"""Where the time of a recurrence's step goes: barrier, exchange, product and pointwise math.

The launch that the library makes is caught and made again: as it is, without its products, and with a step that
computes next to nothing; barrier and exchange are measured by kernels that do nothing else, with the plan's slices,
teams and warps. Loads, products and waiting overlap, so the parts need not add up, and a part may even be negative.
"""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..clock import Call, Stopwatch
from ..devices import describe, product_parts
from .exchange import ROUNDS, barrier_samples, exchange_of, exchange_samples
from .problems import Recurrence

CELLS = {"rnn": "rnn_tanh", "gru": "gru", "lstm": "lstm"}


@dataclass(frozen=True)
class Step:
    """Microseconds of one time step, measured in four ways, and of what stands beside it."""

    whole: float
    without_products: float
    without_pointwise: float
    barrier: float
    # Barrier included.
    exchange: float

    @property
    def parts(self) -> dict[str, float]:
        """What each part adds; ``rest`` is what they leave of the whole."""
        parts = {
            "barrier": self.barrier,
            "exchange": self.exchange - self.barrier,
            "product": self.whole - self.without_products,
            "pointwise": self.whole - self.without_pointwise,
        }
        return parts | {"rest": self.whole - sum(parts.values())}


def splits(problem: Recurrence, call: Call, clock: Stopwatch | None = None) -> list[dict[str, Any]]:
    """For forward and, in training, backward, of which the first launch counts: plan, steps, microseconds a step.

    ``call`` is the problem's, built on a GPU.
    """
    from ..kernels.recurrence import backward, forward

    kernels = {"forward": forward.recurrence_forward_kernel, "backward": backward.recurrence_backward_kernel}
    if problem.pass_ == "forward":
        del kernels["backward"]
    with contextlib.ExitStack() as stack:
        caught = {name: stack.enter_context(_first_launch(kernel)) for name, kernel in kernels.items()}
        call()
    clock = clock or Stopwatch("cuda")
    return [_split(problem, name, kernel, caught[name], clock) for name, kernel in kernels.items()]


def _split(problem: Recurrence, pass_: str, kernel: Any, arguments: dict[str, Any], clock: Stopwatch) -> dict[str, Any]:
    from ..kernels.recurrence import variants

    if pass_ == "forward":
        step = {"STEP": variants.touching_step}
    else:
        step = {"STEP_BACKWARD": getattr(variants, f"touching_{CELLS[problem.op]}_step_backward")}
    sizes = {"directions": problem.directions, "backward": pass_ == "backward"}
    plan, shape = plan_of(problem.op, problem.H, problem.B, problem.dtype, torch.device("cuda"), **sizes)

    def step_us(kernel: Any, **changed: Any) -> float:
        again = arguments | changed

        def launch() -> None:
            kernel[(programs(again),)](**again)

        prepare = arguments["counter_ptr"].zero_
        return 1e3 * statistics.median(clock(launch, prepare) for _ in range(ROUNDS)) / problem.T

    exchange = exchange_of(plan, shape)
    barrier_us = exchange_us = 0.0
    if exchange is not None:
        barrier_us = 1e3 * statistics.median(barrier_samples(clock, plan.slices, plan.teams, plan.num_warps))
        exchange_us = 1e3 * statistics.median(exchange_samples(clock, exchange))
    measured = Step(
        step_us(kernel), step_us(variants.without_products(kernel)), step_us(kernel, **step), barrier_us, exchange_us
    )
    return {
        "pass": pass_,
        "plan": str(plan),
        "regime": plan.regime,
        "steps": problem.T,
        "us_per_step": measured.whole,
        "parts": measured.parts,
    }


def plan_of(
    op: str, H: int, B: int, dtype: str, device: torch.device, *, backward: bool, directions: int = 1, blocks: int = 1
) -> tuple[Any, Any]:
    """How the library launches a layer, and the shape it was asked for."""
    from ..kernels.recurrence import plan as plans
    from ..kernels.work import GATES

    gpu, float_dtype = describe(device), getattr(torch, dtype)
    shape = plans.Shape(
        GATES[op], H // blocks, blocks, B, directions, float_dtype.itemsize, backward,
        parts=product_parts(float_dtype, gpu.arch),
    )  # fmt: skip
    return plans.make(shape, gpu), shape


def programs(arguments: dict[str, Any]) -> int:
    """The grid of a sequence kernel's launch, from its arguments."""
    a = arguments
    directions = a["w_hh_ptr"].numel() // (a["GATES"] * a["BLOCKS"] * a["UNITS"] ** 2)
    return directions * a["BLOCKS"] * a["groups"] * a["SLICES"]


@contextlib.contextmanager
def _first_launch(kernel: Any) -> Iterator[dict[str, Any]]:
    """The arguments, by name, of the first launch of ``kernel`` within the block."""
    caught: dict[str, Any] = {}

    def catch(*arguments: Any, **keywords: Any) -> None:
        if not caught:
            caught.update(zip(kernel.arg_names, arguments, strict=False))
            caught.update(keywords)
            # Triton's own, which it adds to every launch.
            for name in ("debug", "instrumentation_mode"):
                caught.pop(name, None)

    kernel.add_pre_run_hook(catch)
    try:
        yield caught
    finally:
        kernel.pre_run_hooks.remove(catch)
