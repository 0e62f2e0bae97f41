"""One problem's profile: everything there is to find out about it here."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..clock import Call
from . import trace
from .kernel_tree import kernel_tree
from .problems import Problem, Recurrence
from .split import splits

TRACE, TREE = "trace.json", "kernels.hatchet"


def run(problem: Problem, repeats: int = 1) -> None:
    """Warm up, then do nothing but the problem, ``repeats`` times, in NVTX ranges: for ``ncu`` and ``nsys``."""
    call = problem.build(device())
    call()
    with trace.shown_to_nvidia():
        for _ in range(repeats):
            with trace.ranged(problem):
                call()


def profile(problem: Problem, repeats: int = 3, out: Path | None = None) -> dict[str, Any]:
    """Warm up, and profile ``repeats`` calls.

    Args:
        problem: a :class:`Recurrence` or :class:`Attention`.
        repeats: how often it runs in the trace and in the kernels' tree.
        out: where ``trace.json`` and ``kernels.hatchet`` stay; None for nowhere.

    Returns:
        What JSON holds: op, pass, dtype, backend, shape, label, device, repeats; ``trace_events``; ``kernels``, rows as
        in :func:`seqcore.profiling.kernel_tree.rows`; ``splits``, see :func:`seqcore.profiling.split.splits`, and
        ``split``, the parts of all passes added up; ``notes`` say why one of these is empty; ``files``, what was
        written.

    Raises:
        UnsupportedInput: if the problem's backend cannot serve it here.
    """
    found: dict[str, Any] = {
        "op": problem.op, "pass": problem.pass_, "dtype": problem.dtype, "backend": problem.backend,
        "shape": problem.shape, "label": problem.label, "device": device(), "repeats": repeats,
        "kernels": [], "splits": [], "split": {}, "notes": [], "files": [],
    }  # fmt: skip
    call = problem.build(device())
    call()
    with tempfile.TemporaryDirectory() as folder:
        kept = out or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        trace.record(call, problem, repeats, kept / TRACE)
        found["trace_events"] = json.loads((kept / TRACE).read_text())["traceEvents"]
        if found["device"] == "cuda":
            _on_gpu(problem, call, repeats, kept / TREE, found)
        else:
            found["notes"].append("no kernels and no step's parts: Proton and the kernels need a GPU")
        if out is not None:
            found["files"] = [str(out / name) for name in (TRACE, *([TREE] if found["kernels"] else []))]
    return found


def _on_gpu(problem: Problem, call: Call, repeats: int, tree: Path, found: dict[str, Any]) -> None:
    """Add kernels and splits; whatever keeps one of them from being found is noted, and loses nothing else."""
    try:
        found["kernels"] = kernel_tree(problem, repeats, tree)
    except Exception as error:
        found["notes"].append(f"no kernels: {error}")
    why_not = _why_no_split(problem)
    if why_not is None:
        try:
            found["splits"] = splits(problem, call)
        except Exception as error:
            why_not = repr(error)
    if why_not is not None:
        found["notes"].append(f"no step's parts: {why_not}")
    for part in found["splits"]:
        for name, us in part["parts"].items():
            found["split"][name] = found["split"].get(name, 0.0) + us


def _why_no_split(problem: Problem) -> str | None:
    if not isinstance(problem, Recurrence):
        return "attention has no steps"
    if problem.backend != "triton":
        return "they are those of the triton backend; pass --backend triton"
    if problem.T == 1:
        return "a single step has a kernel of its own"
    if problem.packed:
        return "packed sequences do not all have T steps"
    if torch.version.hip:
        return "the kernel without products is made for NVIDIA GPUs"
    return None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def defaults() -> dict[str, str]:
    """The dtype and backend of a problem for which nothing else is asked."""
    if device() == "cuda":
        return {"dtype": "bfloat16", "backend": "triton"}
    return {"dtype": "float32", "backend": "auto"}


def render(found: dict[str, Any]) -> str:
    """A profile as text: its kernels, and the parts of its steps."""
    lines = [f"{found['label']}, backend {found['backend']}, on {found['device']}"]
    if found["kernels"]:
        lines += ["", f"{'kernel':<58} {'launches':>8} {'ms':>9} {'GFLOP':>9} {'MB':>9} {'TFLOP/s':>8} {'GB/s':>7}"]
        lines += [_kernel_line(row) for row in found["kernels"]]
    for part in found["splits"]:
        lines += ["", f"{part['pass']}: {part['us_per_step']:.3f} µs a step, {part['steps']} steps; {part['plan']}"]
        lines += [f"  {name:<10} {us:>8.3f} µs" for name, us in part["parts"].items()]
    if found["splits"]:
        lines.append("  They overlap: the parts need not add up, and the rest may be negative.")
    return "\n".join(lines + [f"note: {note}" for note in found["notes"]] + found["files"])


def _kernel_line(row: dict[str, Any]) -> str:
    scaled = (("flops", 1e9, 9), ("bytes", 1e6, 9), ("tflops", 1, 8), ("gbytes_per_s", 1, 7))
    values = (f"{row[k] / by:>{w}.2f}" if row[k] is not None else f"{'-':>{w}}" for k, by, w in scaled)
    return f"{row['name'][:58]:<58} {row['launches']:>8.0f} {row['ms']:>9.4f} {' '.join(values)}"
