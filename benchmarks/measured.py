"""What was measured, in one run or in several that went on from each other, as pytest-benchmark writes it of one."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import environment, key
from benchmarks.rows import add_roofs
from benchmarks.shapes import Sizes
from benchmarks.timing import RoofMeter, Roofs
from seqcore.files import write_whole
from seqcore.journal import Journal

# Files of a run: what is finished, line by line, and what came of all of it.
JOURNAL, MEASURED = "journal.jsonl", "bench.json"
ROW, SESSION = "benchmark", "benchmark session"
OUT_OF_TIME = "out of time"
ENDED = "the run ended before; --resume goes on from there"
METER = pytest.StashKey[RoofMeter]()


def run_key(sizes: Sizes, text: Path | None = None) -> str:
    """What rows depend on, the text that models train on included."""
    return key(sizes.device, f"sizes {sizes.name}", *([f"text {text}"] if text else []))


def is_finished(entry: dict) -> bool:
    """Whether a case need not run again: it has a time, or can have none here."""
    return entry["outcome"] == "passed" or (
        entry["outcome"] == "skipped" and not entry["reason"].startswith(OUT_OF_TIME)
    )


def row_of(item: pytest.Item) -> dict[str, Any]:
    """The row of a case that was just timed, and this machine's limits as far as they were seen."""
    row = item.funcargs["benchmark"].stats.as_dict()
    # Parameters are objects of ours, which pytest-benchmark writes as text, too.
    return {"row": json.loads(json.dumps(row, default=str)), "roofs": asdict(item.config.stash[METER].roofs)}


def best(all_roofs: list[Roofs]) -> Roofs:
    """The limits seen by several processes on one machine: nothing does more."""
    return Roofs(
        max(roofs.tflops for roofs in all_roofs),
        max(roofs.gigabytes_per_s for roofs in all_roofs),
        all_roofs[0].dtype,
        min(roofs.launch_us for roofs in all_roofs),
    )


def write(journal_path: Path, key: str, data: Path, device: str, left: Iterable[str] = ()) -> bool:
    """Write all rows that the journal holds under ``key``, and what is ``left``; False if there is no row."""
    entries = Journal(journal_path, key, ROW).done
    measured = [entry for entry in entries.values() if entry["outcome"] == "passed"]
    if not measured:
        return False
    roofs = best([Roofs(**entry["roofs"]) for entry in measured])
    rows = [entry["row"] for entry in measured]
    for row in rows:
        if "flops" in row["extra_info"]:
            add_roofs(row["extra_info"], roofs)
    # Of a run that was killed there is no header.
    header = Journal(journal_path, key, SESSION).done.get("last") or {
        "machine_info": {},
        "commit_info": {},
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seqcore": {"machine": environment(device)},
    }
    not_measured = [
        {"name": name.rpartition("::")[2], "outcome": entry["outcome"], "reason": entry["reason"]}
        for name, entry in entries.items()
        if entry["outcome"] != "passed"
    ]
    not_measured += [{"name": name.rpartition("::")[2], "outcome": "not begun", "reason": ENDED} for name in left]
    whole = {**header, "benchmarks": rows, "seqcore": {**header["seqcore"], "not_measured": not_measured}}
    write_whole(data, json.dumps(whole, indent=1))
    return True


def keep_header(journal_path: Path, key: str, data: Path) -> None:
    """Note in the journal what pytest-benchmark wrote beside the rows: machine, commit, date."""
    found = json.loads(data.read_text())
    header = {name: value for name, value in found.items() if name != "benchmarks"}
    Journal(journal_path, key, SESSION).add("last", header)
