"""Measure what is taught, and write the report: ``python -m benchmarks.study [NAME...]``."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.environment import ROOT, cpu_name, environment, key
from benchmarks.study import report
from benchmarks.study.experiment import Row
from benchmarks.study.experiments import NAMES, load
from benchmarks.study.progress import Progress
from benchmarks.study.run import KIND, SETTINGS, Setting, Task, default_jobs, run, tasks_of
from seqcore.files import write_whole
from seqcore.journal import Journal, forget

JOURNAL = "journal.jsonl"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        return show(options.out)
    setting, path = SETTINGS[options.sizes], options.out / JOURNAL
    if not options.resume:
        # What other experiments have finished stays, to be gone on from.
        forget(path, lambda kind, name: kind == KIND and name.split(" ")[0] in options.names)
    conditions = setting.sizes, setting.backend, cpu_name()
    journal = Journal(path, key(setting.device, *conditions), KIND)
    if options.resume and not journal.done:
        print(f"Nothing of these sources, sizes and machine in {path}: begins anew.", flush=True)
    machine = environment(setting.device)
    jobs = options.jobs or default_jobs(setting)
    try:
        failed = measure_all(options.names, setting, journal, jobs, options.out, machine)
    except KeyboardInterrupt:
        print("\nStopped: the same with --resume goes on from here.", file=sys.stderr)
        return 130
    for task, error in failed:
        print(f"FAILED {task.title}: {type(error).__name__}: {error}", file=sys.stderr)
    return show(options.out) or int(bool(failed))


def measure_all(
    names: list[str], setting: Setting, journal: Journal, jobs: int, out: Path, machine: dict
) -> list[tuple[Task, Exception]]:
    """Measure what the journal does not hold yet, and write each experiment's file as soon as it is complete."""
    tasks = {name: tasks_of(name, setting) for name in names}
    every = [task for found in tasks.values() for task in found]
    failed: list[tuple[Task, Exception]] = []
    left = {name: {task.name for task in found if task.name not in journal} for name, found in tasks.items()}
    with Progress(len(every), sum(task.name in journal for task in every)) as progress:
        for name in [name for name in names if not left[name]]:
            keep(name, tasks[name], setting, journal, out, machine)
        for task, outcome in run(every, setting, journal, jobs):
            if isinstance(outcome, Exception):
                failed.append((task, outcome))
            else:
                left[task.experiment].discard(task.name)
            progress.ended(task, outcome)
            if not left[task.experiment]:
                keep(task.experiment, tasks[task.experiment], setting, journal, out, machine)
    return failed


def keep(name: str, tasks: list[Task], setting: Setting, journal: Journal, out: Path, machine: dict) -> None:
    """Write the experiment's file: its rows in the order of its cases, its verdicts, how and where it was measured."""
    rows: list[Row] = [journal.done[task.name] for task in tasks if task.name in journal]
    if not rows:
        return
    experiment = load(name)
    sizes = experiment.SIZES[setting.sizes]
    data = {
        "experiment": name,
        "sizes": setting.sizes,
        "parameters": asdict(sizes),
        "how": experiment.how(sizes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "machine": machine,
        "verdicts": verdicts_of(name, rows),
    }
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    text = json.dumps(data, indent=1, allow_nan=False).rstrip("}\n") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    write_whole(out / f"{name}.json", text)


def verdicts_of(name: str, rows: list[Row]) -> list[dict]:
    """As JSON holds them; none where the rows cannot be judged, which the report then says."""
    try:
        return [asdict(verdict) for verdict in load(name).verdicts(rows)]
    except Exception:
        return []


def show(out: Path) -> int:
    try:
        sections, written = report.write(out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for section in sections:
        print(f"\n{section.title}")
        for verdict in section.verdicts:
            print(f"  {report.MARKS[verdict.holds]} {verdict.claim} {verdict.sentence}")
    print("\nWritten:\n" + "\n".join(f"  {path}" for path in written))
    broken = [section for section in sections if section.error]
    for section in broken:
        print(f"FAILED to report {section.study.name}: {section.error}", file=sys.stderr)
    return int(bool(broken))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "study", help="default: study")
    parser.add_argument("--sizes", choices=["auto", *SETTINGS], default="auto", help="auto: what suits this machine")
    parser.add_argument("--jobs", type=int, help="processes side by side (default: one a core, on a GPU at most four)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUT/journal.jsonl, where a run of the same sources stopped"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report of what is in OUT")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options.names = [name for name in NAMES if not options.names or name in options.names]
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    on_gpu = torch.cuda.is_available()
    if options.sizes == "auto":
        options.sizes = "gpu" if on_gpu else "cpu"
    if SETTINGS[options.sizes].device == "cuda" and not on_gpu:
        parser.error("the sizes 'gpu' need a GPU, and torch.cuda.is_available() is False; take cpu, tiny or auto")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    begin = time.monotonic()
    status = main()
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    sys.exit(status)
