"""Runs cases: those that are timed alone, the others side by side in processes of one thread each."""

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

import seqcore
from benchmarks.environment import busy_cores
from benchmarks.resume import is_broken
from benchmarks.study.experiment import Case, Row
from benchmarks.study.experiments import load
from seqcore.journal import Journal, lines

KIND = "study"
# A case whose process died so often is given up.
MOST_DEATHS = 2


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


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(setting: Setting) -> int:
    # Small models leave most of a GPU idle, so a few processes share it.
    return min(usable_cores(), 4 if setting.device == "cuda" else 16)


def run(tasks: list[Task], setting: Setting, journal: Journal, jobs: int) -> Iterator[tuple[Task, Row | Exception]]:
    """Each task that the journal does not hold, as it ends, with its row or with what was raised."""
    left = [task for task in tasks if task.name not in journal]
    together = [task for task in left if not load(task.experiment).ALONE]
    for task in left:
        if task not in together:
            yield task, _alone(task, setting, journal)
    deaths: Counter[str] = Counter()
    while together:
        # Those that may have killed a process come last, and one by one, so that none is blamed for another.
        together.sort(key=lambda task: deaths[task.name])
        trusted = [task for task in together if not deaths[task.name]]
        before = _begun(journal)
        for task, outcome in _side_by_side(trusted or together, setting, journal, jobs if trusted else 1):
            together.remove(task)
            yield task, outcome
        dead = _begun(journal) - before
        deaths.update({task.name for task in together if dead[task.name]})
        for task in [task for task in together if deaths[task.name] >= MOST_DEATHS]:
            together.remove(task)
            yield task, RuntimeError(f"the process that measured it died, {MOST_DEATHS} times")


def _alone(task: Task, setting: Setting, journal: Journal) -> Row | Exception:
    busy = busy_cores(0.2)
    try:
        row = {**measure(task, setting), "busy_cores": busy}
    except Exception as error:
        return error
    journal.add(task.name, row)
    return row


def _side_by_side(
    tasks: list[Task], setting: Setting, journal: Journal, jobs: int
) -> Iterator[tuple[Task, Row | Exception]]:
    """What has ended, in processes; if one of them dies, what was not ended then is missing."""
    # Begun afresh, since a process that was forked may not use a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin_process, initargs=(os.getpid(),))
    try:
        futures: dict[Future, Task] = {
            pool.submit(_noted, task, setting, journal.path, journal.key): task for task in tasks
        }
        for future in as_completed(futures):
            task, error = futures[future], future.exception()
            if isinstance(error, BrokenProcessPool):
                continue
            if error is None:
                journal.add(task.name, future.result())
            yield task, future.result() if error is None else error
    finally:
        # Also when whoever listens has stopped: what has not begun is not waited for.
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_process(parent: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed told nobody, and its processes would wait for work for good."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _noted(task: Task, setting: Setting, journal: Path, key: str) -> Row:
    """In a process of its own: note that the case begins, so that it is known should the process die of it."""
    Journal(journal, key, KIND).begin(task.name)
    try:
        return measure(task, setting)
    except Exception as error:
        if is_broken(str(error)):
            # The GPU answers this process no more; another one may go on.
            os._exit(1)
        raise


def _begun(journal: Journal) -> Counter[str]:
    """How often each case was begun in a process."""
    return Counter(entry["name"] for entry in lines(journal.path) if entry["kind"] == KIND and "value" not in entry)
