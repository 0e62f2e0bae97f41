"""The table that is written: rows with their times, and what they were measured on."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, info
from ..devices import INTERPRETED
from ..files import write_whole
from ..kernels import tables
from ..kernels.tuning import INTERPRETER, Device
from .problem import Problem

MEANINGLESS = "Times of interpreted kernels on a CPU, which mean nothing: written to try the path, and never read."

# Of a table that had rows before.
OTHERS = " Rows without times: "


def versions() -> dict[str, str | None]:
    """What a time depends on besides the problem and the kernels."""
    import triton

    on_gpu = torch.cuda.is_available() and not INTERPRETED
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "driver": info.nvidia_smi("driver_version") if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seqcore": __version__,
    }


def measured_on() -> dict[str, Any]:
    """The provenance of a whole run."""
    found = {**versions(), "kernels": info.kernel_hashes(), "date": time.strftime("%Y-%m-%d")}
    return found | ({"clocks": info.nvidia_smi("clocks.sm,clocks.mem", units=True)} if found["driver"] else {})


def make(
    device: Device,
    results: Iterable[tuple[Problem, dict[str, Any]]],
    before: dict[str, Any],
) -> dict[str, Any]:
    """The rows of ``results``, and those of the table ``before`` that they do not replace."""
    here, rows = measured_on(), {}
    for problem, found in results:
        measured = {name: found[name] for name in ("ms", "before_ms", "date")}
        measured |= {name: here[name] for name in ("device", "driver", "torch", "triton")}
        measured["kernels"] = info.family_hash(problem.family)
        rows.setdefault(problem.section, []).append(problem.row(found["choice"], device) | {"measured": measured})
    said = f"Measured by seqcore tune on {here['device']}, torch {here['torch']}, triton {here['triton']}."
    if any("measured" not in row for _, row in tables.rows(before)):
        said += OTHERS + before.get("provenance", "").rpartition(OTHERS)[2]
    new = {
        "format": tables.FORMAT,
        "arch": device.arch,
        "provenance": MEANINGLESS if device.arch == INTERPRETER else said,
        "measured_on": here,
    }
    return tables.merged(new | rows, before)


def judged(table: dict[str, Any], compared: dict[str, dict[str, float]]) -> dict[str, Any]:
    """``table`` with verdicts on ``compared``: by operation and problem, how many times as long torch's own takes."""
    no_slower = [operation for operation, ratios in compared.items() if min(ratios.values()) >= 1]
    return tables.merged({"no_slower": no_slower, "compared": compared}, table)


def write(table: dict[str, Any], path: Path) -> None:
    """One row a line."""
    parts = []
    for name, value in table.items():
        if name in tables.SECTIONS:
            lines = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f"  {json.dumps(name)}: [\n{lines}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")
