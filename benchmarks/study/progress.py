"""How far the study is: a bar in a terminal, a line for each case elsewhere."""

import sys
import time

from benchmarks.study.experiment import Row
from benchmarks.study.run import Task

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Of ``total`` cases, ``done`` before this run began."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.begin = total, done, time.monotonic()
        self.bar = None
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="case", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        if self.done:
            print(f"{self.done} of {self.total} cases were measured before.", flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def ended(self, task: Task, outcome: Row | Exception) -> None:
        """A case has ended, with its row or an error."""
        self.done += 1
        said = f"failed: {outcome}" if isinstance(outcome, Exception) else f"{outcome['seconds']:.1f} s"
        if self.bar is not None:
            self.bar.set_description(task.experiment)
            self.bar.update()
        else:
            elapsed = time.monotonic() - self.begin
            print(f"[{self.done}/{self.total}, {elapsed:.0f} s] {task.title}: {said}", flush=True)
