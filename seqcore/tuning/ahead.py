"""Which candidates are worth a measurement, known from compiling them, with or without the GPU at hand."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.tuning import Device
from ..testing import aot, verify
from ..testing.aot_entry import Entry
from ..testing.cases import floats_as
from ..testing.launches import compiled_for
from ..testing.precision import float32_products
from .problem import Fields, Problem
from .race import Deadline

# Bytes a thread may spill beyond the candidate that spills least.
SPILL_ALLOWANCE = 32
NOT_COMPILED, TOO_LARGE, SPILLS = "does not compile", "does not fit", "spills more than others"


class Compiler:
    """Processes that compile, kept from one problem to the next since each takes seconds to begin."""

    def __init__(self, jobs: int):
        self.jobs, self._pool = jobs, _pool(jobs)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def rows(self, entries: list[Entry], deadline: Deadline) -> list[aot.Row]:
        """One row an entry, in their order."""
        futures = self._submit(aot.compile_entry, [(entry,) for entry in entries])
        rows, crashed = {}, []
        for index, future in enumerate(futures):
            deadline.check()
            try:
                rows[index] = future.result()
            except BrokenProcessPool:
                crashed.append(index)
        if crashed:
            # A crash takes the pool with it: each alone, so that only the culprit's row says so.
            rows |= {index: next(aot.compile_all([entries[index]], 1)) for index in crashed}
        return [rows[index] for index in range(len(entries))]

    def _submit(self, task: Callable[..., Any], calls: list[tuple]) -> list[Future]:
        try:
            return [self._pool.submit(task, *call) for call in calls]
        except BrokenProcessPool:
            # Of the crash of an earlier compile.
            self._pool = _pool(self.jobs)
            return [self._pool.submit(task, *call) for call in calls]

    def launches(self, problem: Problem, candidates: list[Fields], device: Device, deadline: Deadline) -> None:
        """Have Triton's cache hold what will be launched, which compiles in turn otherwise, a candidate at a time."""
        for future in self._submit(_launch, [(problem, fields, device) for fields in candidates]):
            deadline.check()
            # Whatever fails here will fail again where it is judged, and is told there.
            future.exception()


def _launch(problem: Problem, fields: Fields, device: Device) -> None:
    """Every launch of what is judged and of what is timed, compiled and not run."""
    cpu = torch.device("cpu")
    with compiled_for(device), problem.using(fields), float32_products(problem.precision):
        for case in problem.cases(cpu):
            verify.compute(case, floats_as(problem.dtype, case.tensors), "triton")
        problem.small().call(cpu)()


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Control-C is for the one that measures, which ends the others.
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), **ignore)


@dataclass(frozen=True)
class Compiled:
    """A candidate, what it takes, and why it is dropped, if it is."""

    fields: Fields
    row: aot.Row
    dropped: str | None


def compiled(
    problem: Problem, candidates: list[Fields], device: Device, compiler: Compiler, deadline: Deadline
) -> list[Compiled]:
    """Every candidate with a verdict. The first, the present choice, is dropped only if it cannot run."""
    entries = [problem.entries(fields, device) for fields in candidates]
    rows = compiler.rows([plain for plain, _ in entries], deadline)
    verdicts = [_cannot_run(row, device) for row in rows]
    running = [index for index, verdict in enumerate(verdicts) if verdict is None]
    least = min((rows[index]["spills"] for index in running), default=0)
    for index in running:
        if index and rows[index]["spills"] > least + SPILL_ALLOWANCE:
            verdicts[index] = SPILLS
    # With features it may spill, but a call with features must not fail for the sake of those without.
    left = [index for index, verdict in enumerate(verdicts) if verdict is None]
    for index, row in zip(left, compiler.rows([entries[index][1] for index in left], deadline), strict=True):
        verdicts[index] = _cannot_run(row, device)
    return [Compiled(*found) for found in zip(candidates, rows, verdicts, strict=True)]


def _cannot_run(row: aot.Row, device: Device) -> str | None:
    if row["registers"] is None:
        return NOT_COMPILED
    fits = row["shared"] <= device.shared_memory and row["tensor_memory"] <= aot.TENSOR_MEMORY_LIMIT
    return None if fits else TOO_LARGE
