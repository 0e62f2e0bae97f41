"""Proton's tree of a problem's kernels, with what each had to do, and its rates.

It is made in a process of its own: two profilers do not share one, and torch's is at work in the other.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .problems import Problem, problem_of

SECONDS = 240
SUFFIX = ".hatchet"
# Proton's scope around what computes a launch's metadata.
METADATA_SCOPE = "__proton_launch_metadata"


def kernel_tree(problem: Problem, repeats: int, path: Path) -> list[dict[str, Any]]:
    """Write Proton's tree of ``repeats`` calls to ``path``, which ends in SUFFIX, and return its rows: :func:`rows`.

    Raises:
        RuntimeError: if Proton writes none, with its last words.
    """
    arguments = json.dumps((asdict(problem), repeats, str(path)))
    command = [sys.executable, "-c", f"import {__name__} as tree; tree.main()", arguments]
    path.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"Proton took more than {SECONDS} s") from None
    if done.returncode or not path.exists():
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"Proton wrote no tree: {said[-1]}")
    return rows(json.loads(path.read_text()), repeats)


def rows(tree: list[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """For each kernel of a ``.hatchet`` tree, what one call spent in it, the longest first.

    name, launches, ms, flops, bytes, tflops and gbytes_per_s; the last four None for kernels that are not ours.
    """
    found: dict[str, dict[str, float]] = {}

    def visit(node: dict[str, Any]) -> None:
        name = node["frame"]["name"]
        if name == METADATA_SCOPE:
            return
        metrics = node.get("metrics", {})
        # The work stands where a launch is, the time where the kernel is: in one node, or below each other.
        works = {key: metrics[key] for key in ("flops16", "flops32", "bytes") if key in metrics}
        times = {key: metrics[key] for key in ("time (ns)", "count") if metrics.get("time (ns)") and key in metrics}
        for key, value in (works | times).items():
            entry = found.setdefault(name, {})
            entry[key] = entry.get(key, 0) + value
        for child in node.get("children", ()):
            visit(child)

    # What follows the tree describes the device.
    visit(tree[0])
    timed = {name: entry for name, entry in found.items() if entry.get("time (ns)")}
    made = [_row(name, entry, repeats) for name, entry in timed.items()]
    return sorted(made, key=lambda row: -row["ms"])


def _row(name: str, entry: dict[str, float], repeats: int) -> dict[str, Any]:
    ms = entry["time (ns)"] / 1e6 / repeats
    flops = traffic = None
    if "bytes" in entry:
        flops = (entry.get("flops16", 0) + entry.get("flops32", 0)) / repeats
        traffic = entry["bytes"] / repeats
    return {
        "name": name,
        "launches": entry.get("count", repeats) / repeats,
        "ms": ms,
        "flops": flops,
        "bytes": traffic,
        "tflops": None if flops is None else flops / ms / 1e9,
        "gbytes_per_s": None if traffic is None else traffic / ms / 1e6,
    }


def main() -> None:
    """What the other process does: :func:`write` with what its command line holds as JSON."""
    write(*json.loads(sys.argv[1]))


def write(fields: dict[str, Any], repeats: int, path: str) -> None:
    """Write the tree of ``repeats`` calls of the problem of these fields."""
    import torch
    import triton.profiler as proton

    from ..kernels.launch_work import counted

    problem = problem_of(fields)
    call = problem.build("cuda")
    call()
    with counted():
        # Proton appends the suffix.
        session = proton.start(path.removesuffix(SUFFIX), hook="triton")
        with proton.scope(problem.label):
            for _ in range(repeats):
                call()
        torch.cuda.synchronize()
        proton.finalize(session)
