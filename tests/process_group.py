"""Processes that form a gloo group and run, all together, the functions that tests hand them.

A job is a function at the top of a test module. Each process imports that module, calls the job with the arguments it
was sent, and sends back what it returns; a job learns its rank from ``torch.distributed``.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A program under torchrun on two processes, and what an environment has for processes that share a few cores.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
TIMEOUT = 120  # seconds for one job; some wait for a compiler


class Processes:
    """``size`` processes in one group, kept from job to job, since a process takes seconds to begin."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        listener = Listener(authkey=b"tests")
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        environment = os.environ | SMALL | {"PYTHONPATH": path}
        store = Path(self._folder.name, "store")
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.process_group", str(listener.address), str(store), str(rank), str(size)],
                env=environment, cwd=self._folder.name,
            )
            for rank in range(size)
        ]  # fmt: skip
        accepted = [listener.accept() for _ in range(size)]
        listener.close()
        self._connections = [connection for _, connection in sorted((c.recv(), c) for c in accepted)]

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``job(*arguments)`` returned in each process, by rank. Raises AssertionError if it raised in one."""
        for connection in self._connections:
            connection.send((job.__module__, job.__name__, pickle.dumps(arguments)))
        answers: dict[int, Any] = {}
        waiting, end = dict(zip(self._connections, range(self.size), strict=True)), time.monotonic() + TIMEOUT
        while waiting:
            # Whoever fails first says why; the others may be waiting for it, and are of no use any more.
            ready = wait(waiting, timeout=max(end - time.monotonic(), 0))
            failure = None if ready else f"no answer of ranks {[*waiting.values()]} in {TIMEOUT} s"
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    ok, answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    ok, answers[rank] = False, "the process ended"
                failure = failure if ok else f"rank {rank}:\n{answers[rank]}"
            if failure:
                self.close()
                raise AssertionError(f"{job.__name__} on {self.size} processes: {failure}")
        return [answers[rank] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


def _serve(address: str, store: str, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    connection = Client(address, authkey=b"tests")
    connection.send(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            module, name, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            torch.manual_seed(0)
            answer = True, getattr(importlib.import_module(module), name)(*pickle.loads(arguments))
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
