"""The search of one problem: what compiles and computes rightly runs against the present choice, which noise keeps."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..clock import Clock, percentile
from ..kernels.tuning import Device
from ..testing.precision import float32_products
from . import ahead
from .judge import Judge
from .problem import Fields, Problem
from .race import Deadline, race

# What another choice must take of the present one's time, at the median of all rounds.
BETTER = 0.98


@dataclass(frozen=True)
class Effort:
    """Rounds of the race of all, how many of it enter the final, and the rounds of that; at most so many candidates."""

    rounds: int = 5
    finalists: int = 3
    final_rounds: int = 31
    candidates: int | None = None


@dataclass(frozen=True)
class Bench:
    """Where problems are run: the kernels' view of the device and torch's, what compiles, and the clock.

    Nothing is compiled ahead where kernels are interpreted.
    """

    device: Device
    torch_device: torch.device
    compiler: ahead.Compiler | None
    clock: Clock
    deadline: Deadline
    effort: Effort = Effort()


def search(problem: Problem, bench: Bench) -> dict[str, Any]:
    """What was found, for the log: the choice and its milliseconds, and what became of the other candidates."""
    found: dict[str, Any] = {"choice": None, "dropped": {}, "refused": []}
    candidates = problem.candidates(bench.device)[: bench.effort.candidates]
    found["candidates"] = len(candidates)
    if bench.compiler is not None:
        verdicts = ahead.compiled(problem, candidates, bench.device, bench.compiler, bench.deadline)
        found["dropped"] = dict(Counter(verdict.dropped for verdict in verdicts if verdict.dropped))
        kept = [verdict.fields for verdict in verdicts if not verdict.dropped]
        bench.compiler.launches(problem, kept, bench.device, bench.deadline)
    else:
        kept = candidates
    with float32_products(problem.precision):
        right = _judged(problem, kept, bench, found["refused"])
        if not candidates or candidates[0] not in right:
            return found | {"failed": "the present choice does not run or errs" if candidates else "fits no plan here"}
        choice, times, ratios = _fastest(problem, right, bench)
    return found | {
        "choice": right[choice],
        "before": candidates[0],
        "ms": round(percentile(times[choice], 50), 4),
        "before_ms": round(percentile(times[0], 50), 4),
        "ratio": round(percentile(ratios[choice], 50), 4),
        "date": time.strftime("%Y-%m-%d"),
    }


def _judged(problem: Problem, candidates: list[Fields], bench: Bench, refused: list) -> list[Fields]:
    judge, right = Judge(problem, bench.torch_device), []
    for fields in candidates:
        bench.deadline.check()
        with problem.using(fields):
            refusal = judge.refusal()
        if refusal is None:
            right.append(fields)
        else:
            refused.append({"candidate": fields, "because": refusal})
    return right


def _fastest(problem: Problem, candidates: list[Fields], bench: Bench) -> tuple[int, dict, dict]:
    """Which is chosen; times of the final, and its ratios to the present choice's, which is number 0, by number."""
    call, effort = problem.call(bench.torch_device), bench.effort

    def run(entrants: list[int], rounds: int) -> dict[int, list[float]]:
        contestants = [(partial(problem.using, candidates[index]), call) for index in entrants]
        return dict(zip(entrants, race(contestants, rounds, bench.clock, bench.deadline), strict=True))

    everyone = run(list(range(len(candidates))), effort.rounds) if len(candidates) > 1 else {}
    others = sorted((index for index in everyone if index), key=lambda index: percentile(everyone[index], 50))
    # Times of their own: those that brought them here were the luckiest of many.
    times = run([0, *others[: effort.finalists]], effort.final_rounds)
    ratios = {index: _over(samples, times[0]) for index, samples in times.items()}
    better = [index for index in times if index and is_better(ratios[index])]
    return min(better, key=lambda index: percentile(ratios[index], 50), default=0), times, ratios


def _over(samples: Sequence[float], others: Sequence[float]) -> list[float]:
    return [mine / its for mine, its in zip(samples, others, strict=True)]


def is_better(ratios: Sequence[float]) -> bool:
    """Whether times over the present choice's, round by round, show more than noise: in most rounds, and by enough."""
    return percentile(ratios, 50) <= BETTER and percentile(ratios, 80) < 1


def compare(problem: Problem, bench: Bench) -> float:
    """How many times as long as the kernels torch's own operation takes, with the tables as they are."""
    with float32_products(problem.precision):
        contestants = [(nullcontext, problem.contestant(bench.torch_device, name)) for name in ("triton", "aten")]
        ours, theirs = race(contestants, bench.effort.final_rounds, bench.clock, bench.deadline)
    return percentile(_over(theirs, ours), 50)
