"""Work that several processes of the same command do together, each a share of it.

What takes longest on a machine whose GPU is new to it is compiling, one kernel at a time in each process.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
LAST_SECONDS = 3


@dataclass(frozen=True)
class Share:
    """The part number ``index`` of ``count``; as text "index/count"."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Raises ValueError if ``text`` is no share."""
        index, count = map(int, text.split("/"))
        if not 0 <= index < count:
            raise ValueError(f"a share is like 0/4, got {text!r}")
        return cls(index, count)

    def of(self, items: Sequence[T]) -> list[T]:
        """Every item is in one share; neighbours, which are alike, in different ones."""
        return list(items[self.index :: self.count])


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_shares(command: Sequence[str], count: int) -> list[int]:
    """Run ``command`` ``count`` times at once, each with ``--share I/N`` of its own; their exit statuses.

    What each printed is printed in one piece. If this process is interrupted, so are they.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, outputs = [], []
        try:
            for index in range(count):
                outputs.append(open(os.path.join(folder, str(index)), "w+", errors="replace"))  # noqa: SIM115
                own = [*command, "--share", f"{index}/{count}"]
                processes.append(subprocess.Popen(own, stdout=outputs[-1], stderr=subprocess.STDOUT))
            return [process.wait() for process in processes]
        finally:
            left = [process for process in processes if process.poll() is None]
            for process in left:
                process.kill()
            for process in left:
                # One whose GPU hangs may take long to go.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LAST_SECONDS)
            for output in outputs:
                output.seek(0)
                sys.stdout.write(output.read())
                output.close()
            sys.stdout.flush()
