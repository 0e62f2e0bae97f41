"""Runs cases: those that are timed alone, the others side by side in processes of one thread each."""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

import seqcore
from benchmarks.study.experiment import Case, Row
from benchmarks.study.experiments import load
from seqcore.journal import Journal

KIND = "study"


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is measured: a key of each experiment's SIZES, a device, a backend."""

    sizes: str
    device: str
    backend: str


SETTINGS = {
    "tiny": Setting("tiny", "cpu", "auto"),
    "cpu": Setting("cpu", "cpu", "auto"),
    "gpu": Setting("gpu", "cuda", "triton"),
}


@dataclass(frozen=True)
class Task:
    """One case of one experiment."""

    experiment: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.experiment} {json.dumps(self.case)}"

    @property
    def title(self) -> str:
        return " ".join([self.experiment, *(f"{key}={value}" for key, value in self.case.items())])


def tasks_of(name: str, setting: Setting) -> list[Task]:
    experiment = load(name)
    return [Task(name, case) for case in experiment.cases(experiment.SIZES[setting.sizes])]


def measure(task: Task, setting: Setting) -> Row:
    """The case with its results, and the seconds they took.

    Raises:
        ValueError: if a result is no finite number, which JSON does not hold and no verdict should rest on.
    """
    experiment, begin = load(task.experiment), time.perf_counter()
    with seqcore.use_backend(setting.backend):
        found = experiment.measure(task.case, experiment.SIZES[setting.sizes], setting.device)
    row = {**task.case, **found, "seconds": round(time.perf_counter() - begin, 3)}
    json.dumps(row, allow_nan=False)
    return row


def finite(value: float) -> float | None:
    """A number as rows hold it: None in place of infinity and NaN."""
    return value if math.isfinite(value) else None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(setting: Setting) -> int:
    # Small models leave most of a GPU idle, so a few processes share it.
    return min(usable_cores(), 4 if setting.device == "cuda" else 16)


def run(tasks: list[Task], setting: Setting, journal: Journal, jobs: int) -> Iterator[tuple[Task, Row | Exception]]:
    """Each task that the journal does not hold, as it ends, with its row or with what was raised."""
    left = [task for task in tasks if task.name not in journal]
    alone = [task for task in left if load(task.experiment).ALONE]
    for task in alone:
        yield task, _attempt(task, setting, journal)
    together = [task for task in left if task not in alone]
    if not together:
        return
    # Processes begun afresh, since one that was forked may not use a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures: dict[Future, Task] = {pool.submit(measure, task, setting): task for task in together}
        for future in as_completed(futures):
            task, error = futures[future], future.exception()
            if error is None:
                journal.add(task.name, future.result())
            yield task, future.result() if error is None else error
    finally:
        # Also when whoever listens has stopped: what has not begun is not waited for.
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(task: Task, setting: Setting, journal: Journal) -> Row | Exception:
    try:
        row = measure(task, setting)
    except Exception as error:
        return error
    journal.add(task.name, row)
    return row
