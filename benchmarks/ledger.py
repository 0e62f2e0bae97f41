"""What is known of every kernel as it stands: on which GPU it was verified, and when it was last timed.

    python -m benchmarks.ledger             print it
    python -m benchmarks.ledger --check     for CI: what waits; fails if README or a result disagree with the files
    python -m benchmarks.ledger --take DIR  put a campaign's results below benchmarks/results/, and README in order

A kernel was verified by a run of ``seqcore verify`` on a GPU in which all of its results are there, within the error
budget, and repeatable, and was timed by a profile, or by a floor, both with the very sources of today: its file's and
those of every file that it imports. What older sources did says nothing.
"""

import argparse
import ast
import functools
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from seqcore.files import read_json
from seqcore.info import kernel_hashes

KERNELS = ROOT / "kernels"
RESULTS = ROOT / "benchmarks" / "results"
WAITS = "waits for a GPU"
# Files of a campaign, and how they are called among the results.
TAKEN = {"bench.json": "", "verify.json": "-verify", "profile.json": "-profile", "tuned.json": "-tuned"}
# Kernels that the floors suite measures by themselves, by the name of the floor.
FLOORS = {
    "barrier": "barrier_kernel",
    "barrier and exchange": "exchange_kernel",
    "launch in a CUDA graph": "empty_kernel",
}
# They count what kernels do, for profilers, and change nothing about it.
COUNTING = {"work.py", "launch_work.py"}


@functools.cache
def kernels() -> dict[str, str]:
    """Every kernel's name and the file, below ``kernels/``, that defines it."""
    found = {}
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found[node.name] = path.relative_to(KERNELS).as_posix()
    return found


@functools.cache
def sources(file: str) -> frozenset[str]:
    """``file`` and every file below ``kernels/`` that it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        name = waiting.pop()
        if name in found | COUNTING:
            continue
        found.add(name)
        folder = (KERNELS / name).parent
        for node in ast.walk(ast.parse((KERNELS / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
                candidates = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [c.resolve().relative_to(KERNELS).as_posix() for c in candidates if c.is_file()]
    return frozenset(found)


def source_hash(file: str) -> str:
    """One hash of a file and all that it imports."""
    today = kernel_hashes()
    return hashlib.sha256("".join(today[name] for name in sorted(sources(file))).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One file of results from a GPU."""

    path: Path
    found: dict[str, Any]

    @property
    def machine(self) -> dict[str, Any]:
        return self.found.get("info") or self.found.get("machine") or self.found.get("seqcore", {}).get("machine", {})

    @property
    def gpu(self) -> str | None:
        machine = self.machine
        # What `seqcore info` gathers tells the device's name, whatever it is.
        return machine.get("gpu") or (machine.get("device") if machine.get("multiprocessors") else None)

    @property
    def date(self) -> str:
        return self.path.name[:10]

    def has_todays(self, file: str) -> bool:
        """Whether it ran with this file, and all that it imports, as they are."""
        then, today = self.machine.get("kernels", {}), kernel_hashes()
        return all(then.get(name) == today[name] for name in sources(file))


def _run(path: Path) -> Run:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not JSON: it holds no object")
    return Run(path, found)


def runs(results: Path = RESULTS) -> list[Run]:
    """Every result from a GPU, the oldest first. Raises ValueError, naming the file, if one cannot be read."""
    found = []
    for path in sorted(results.rglob("*.json"), key=lambda path: path.name):
        try:
            found.append(_run(path))
        except ValueError as error:
            raise ValueError(f"{error}; remove it, or take the campaign's results again") from None
    return [run for run in found if run.gpu and not run.machine.get("interpreter")]


@dataclass
class Entry:
    """One kernel's line."""

    kernel: str
    file: str
    verified: str | None = None
    timed: str | None = None


def ledger(results: Path = RESULTS) -> list[Entry]:
    """What is known of every kernel as it stands; later runs take the place of earlier ones."""
    entries = {name: Entry(name, file) for name, file in kernels().items()}
    for run in runs(results):
        for entry in entries.values():
            if run.has_todays(entry.file):
                entry.verified = _verified(run, entry.kernel) or entry.verified
                entry.timed = _timed(run, entry.kernel) or entry.timed
    return list(entries.values())


def _verified(run: Run, kernel: str) -> str | None:
    rows = [row for row in run.found.get("rows", ()) if kernel in row["kernel"].split(", ")]
    if not rows or kernel in run.found["left"] or not all(row["ok"] for row in rows):
        return None
    return f"{run.gpu}, {run.date} ({', '.join(sorted({row['dtype'] for row in rows}))})"


def _timed(run: Run, kernel: str) -> str | None:
    """The time of its longest part in any profile, or of the floor that it is."""
    times = [
        (part["ms"], f"{profile['op']} {profile['pass']} {profile['dtype']} {_sizes(profile['shape'])}")
        for profile in run.found.get("profiles", ())
        for part in profile["kernels"]
        if part["name"] == kernel
    ]
    rows = (entry["extra_info"] for entry in run.found.get("benchmarks", ()))
    times += [
        (row["ms_p50"], f"{row['op']} {_sizes(row['shape'])}".strip())
        for row in rows
        if row.get("suite") == "floors" and FLOORS.get(row["op"]) == kernel
    ]
    if not times:
        return None
    ms, what = max(times)
    return f"{ms:.3g} ms in {what} ({run.gpu}, {run.date})"


def _sizes(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={count}" for name, count in shape.items())


def take(campaign: Path, results: Path = RESULTS) -> list[Path]:
    """Copy what a campaign wrote to where it is committed; say where.

    Raises ValueError if it is from no GPU or nothing is there.
    """
    paths = [campaign / name for name in TAKEN if (campaign / name).exists()]
    present = [_run(path) for path in paths]
    if not present:
        raise ValueError(f"{campaign} holds none of {', '.join(TAKEN)}; make them with `make gpu`")
    measured = next((run for run in present if run.gpu and "seqcore" in run.found), None)
    if measured is None:
        raise ValueError(f"{campaign} holds nothing measured on a GPU, and only that is kept; run `make gpu` on one")
    machine, date = measured.machine, measured.found["datetime"][:10]
    commit = (machine["commit"] or "unknown")[:10] + ("-dirty" if str(machine["commit"]).endswith("-dirty") else "")
    folder = results / re.sub(r"[^a-z0-9]+", "-", measured.gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(run.path, folder / f"{date}-{commit}{TAKEN[run.path.name]}.json")) for run in present]


def print_ledger(entries: list[Entry]) -> None:
    width = max(len(entry.kernel) for entry in entries)
    print(f"{'kernel':<{width}}  {'source':<12}  verified; timed")
    for entry in entries:
        known = f"{entry.verified or WAITS}; {entry.timed or 'not timed on a GPU yet'}"
        print(f"{entry.kernel:<{width}}  {source_hash(entry.file):<12}  {known}")
    verified, timed = (sum(getattr(entry, what) is not None for entry in entries) for what in ("verified", "timed"))
    print(f"\n{len(entries)} kernels: {verified} verified on a GPU as they stand, {timed} timed, the others wait")


def main(arguments: list[str] | None = None) -> int:
    from benchmarks import readme

    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.splitlines()[0])
    check = "fail if README says other than the results do; waiting for a GPU is no failure"
    take_help = "copy a campaign's results to benchmarks/results/, and write README's figures from them"
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--take", type=Path, metavar="DIR", help=take_help)
    options = parser.parse_args(arguments)
    try:
        if options.take:
            print("\n".join(f"written: {path}" for path in take(options.take)))
            readme.write()
        entries = ledger()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print_ledger(entries)
    if options.check and not readme.is_current():
        print("README's performance section is out of date: run `python -m benchmarks.readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
