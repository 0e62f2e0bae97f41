"""Everything a machine with a GPU is asked, in stages that end: ``python -m benchmarks.campaign --out DIR``.

Runs from the root of a bare checkout with no network: the system's python3 with torch, Triton, NumPy, pytest,
pytest-benchmark and matplotlib. Kernels are compiled, never interpreted. A stage that passed is not run again for the
same sources on the same machine. Nothing but a handful of files is written, all of them directly in DIR.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.environment import ROOT, environment, source_hash

PASSED, FAILED, OVERRAN = "passed", "failed", "overran"
# After the limit a stage is interrupted, so that it can still write what it has; after the grace it is killed.
GRACE_SECONDS = 20
KEPT_LINES = 40
# Stages that run the benchmarks: which suites, and their seconds. Each writes a file of its name, and the report anew.
MEASURED = {
    "floors": (("floors",), 120),
    "bench": (("recurrence", "bottleneck"), 530),
    "attention": (("attention",), 530),
    "models": (("models",), 200),
}


@dataclass(frozen=True)
class Stage:
    """One part of the campaign: a command, how long it may take, and one line about what came out."""

    name: str
    command: list[str]
    limit_s: float
    # Written by the command; removed before it runs, so that what is found afterwards is its own.
    results: tuple[Path, ...] = ()
    summary: Callable[[], str] = str


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    status: str
    key: str
    seconds: float
    limit_s: float
    summary: str
    exit_status: int | None
    last_lines: list[str]
    date: str


def stages(out: Path, tiny: bool) -> list[Stage]:
    """The stages in their order: what makes all else worthless first."""
    python = [sys.executable, "-m"]
    junit, tests, verified = (out / name for name in ("tests.xml", "tests.json", "verify.json"))
    # tests/test_benchmarks.py runs this program, and is left to `pytest tests`.
    pytest = [*python, "pytest", "tests", "--ignore=tests/test_benchmarks.py", "-q", f"--junitxml={junit}"]
    verify = [*python, "seqcore", "verify", "--out", str(verified)]
    return [
        Stage("tests", pytest, 500, (junit, tests), lambda: summarize_tests(junit, tests)),
        Stage("verify", verify, 500, (verified,), lambda: summarize_verify(verified)),
        *(_measuring(name, suites, limit_s, out, tiny) for name, (suites, limit_s) in MEASURED.items()),
    ]


def _measuring(name: str, suites: tuple[str, ...], limit_s: float, out: Path, tiny: bool) -> Stage:
    data, others = out / f"{name}.json", [f"{other}.json" for other in MEASURED if other != name]
    command = [sys.executable, "-m", "benchmarks", "--suite", *suites, "--sizes", "tiny" if tiny else "gpu"]
    command += ["--out", str(out), "--json", data.name, "--also", *others, "--no-plots"]
    return Stage(name, command, limit_s, (data, out / "report.md"), lambda: summarize_bench(data))


def summarize_tests(junit: Path, out: Path) -> str:
    """Turn pytest's XML into JSON: one row for each test that did not pass, and the counts."""
    if not junit.exists():
        return "no results"
    rows, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        found = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if found is None else "skipped" if found.tag == "skipped" else "failed"
        counts[outcome] += 1
        if found is not None:
            name = f"{case.get('classname')}::{case.get('name')}"
            rows.append({"name": name, "outcome": outcome, "reason": found.get("message", "")})
    out.write_text(json.dumps({"counts": counts, "not_passed": rows}, indent=1))
    junit.unlink()
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def summarize_verify(path: Path) -> str:
    """Counts from the rows of `seqcore verify`."""
    if not path.exists():
        return "no results"
    rows = json.loads(path.read_text())["rows"]
    bad = sum(not (row["within_budget"] and row["repeatable"]) for row in rows)
    return f"{len(rows)} results, {bad} outside the budget or not repeatable"


def summarize_bench(path: Path) -> str:
    """Counts from pytest-benchmark's JSON."""
    if not path.exists():
        return "no results"
    found = json.loads(path.read_text())
    return f"{len(found['benchmarks'])} rows, {len(found['seqcore']['not_measured'])} not measured"


class Campaign:
    """Runs stages, remembers how they ended, and skips those that passed before."""

    def __init__(self, out: Path, key: str, process_environment: dict[str, str], force: bool = False):
        self.path = out / "campaign.json"
        self.log = out / "campaign.log"
        self.key = key
        self.process_environment = process_environment
        self.force = force
        self.outcomes: dict[str, Outcome] = {}
        if self.path.exists():
            for entry in json.loads(self.path.read_text())["stages"]:
                self.outcomes[entry["stage"]] = Outcome(**entry)

    def run(self, stage: Stage) -> Outcome:
        """Run one stage, or take over how it ended if it passed for the same sources here."""
        before = self.outcomes.get(stage.name)
        if before and before.status == PASSED and before.key == self.key and not self.force:
            print(f"{stage.name}: passed before, {before.date}; --force runs it again", flush=True)
            return before
        print(f"{stage.name}: {' '.join(stage.command)} (at most {stage.limit_s:g} s)", flush=True)
        for path in stage.results:
            path.unlink(missing_ok=True)
        begin = time.monotonic()
        status, exit_status, lines = self._execute(stage)
        try:
            summary = stage.summary()
        except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
            summary, status = f"results unreadable: {error}", FAILED if status == PASSED else status
        outcome = Outcome(
            stage.name,
            status,
            self.key,
            round(time.monotonic() - begin, 1),
            stage.limit_s,
            summary,
            exit_status,
            lines[-KEPT_LINES:],
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        self.outcomes[stage.name] = outcome
        self.save()
        print(f"{stage.name}: {status} after {outcome.seconds:.0f} s: {summary}", flush=True)
        return outcome

    def _execute(self, stage: Stage) -> tuple[str, int | None, list[str]]:
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n==> {stage.name}: {' '.join(stage.command)}\n")
            log.flush()
            log.seek(0, os.SEEK_END)
            start = log.tell()
            # A process group of its own, so that the stage's children end with it and nothing else does.
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=self.process_environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            status = wait_or_stop(process, stage.limit_s)
            log.seek(start)
            return status, process.returncode, log.read().splitlines()

    def save(self) -> None:
        """Write campaign.json; whole or not at all, since a campaign may be cut short at any moment."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        record = {
            "key": self.key,
            "machine": environment(device),
            "stages": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        fresh = self.path.with_suffix(".json.new")
        fresh.write_text(json.dumps(record, indent=1))
        fresh.replace(self.path)


def wait_or_stop(process: subprocess.Popen, limit_s: float, grace_s: float = GRACE_SECONDS) -> str:
    """How the process ended; past its limit it is interrupted, and past the grace killed with its whole group."""
    try:
        return PASSED if process.wait(limit_s) == 0 else FAILED
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    # Also when it has ended by itself: a child of it may not have.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return OVERRAN


def clean_environment(tiny: bool) -> dict[str, str]:
    """This process's environment without what would interpret kernels or force a backend; tiny: without GPUs."""
    unwanted = {"TRITON_INTERPRET", "SEQCORE_BACKEND", "PYTHONWARNINGS"}
    found = {key: value for key, value in os.environ.items() if key not in unwanted}
    if tiny:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def make_importable(process_environment: dict[str, str]) -> None:
    """See to it that the stages can import seqcore and its kernels from this checkout; say how."""
    if _imports(process_environment):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    # A system Python may be marked as managed by its distribution; an editable install only adds a link.
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env={**process_environment, "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode == 0 and _imports(process_environment):
        print("seqcore: installed as a link to this checkout", flush=True)
        return
    print(f"seqcore: `{' '.join(command)}` failed:\n{answer.stdout}{answer.stderr}", flush=True)
    process_environment["PYTHONPATH"] = f"{linked_package()}{os.pathsep}{ROOT}"
    # Otherwise the current folder comes first, where seqcore lacks its kernels.
    process_environment["PYTHONSAFEPATH"] = "1"
    if not _imports(process_environment):
        sys.exit("seqcore cannot be imported, neither installed nor linked: nothing can be run")
    print("seqcore: imported through links instead", flush=True)


def _imports(process_environment: dict[str, str]) -> bool:
    """Whether seqcore and its kernels are found, and in this checkout rather than another."""
    files = "import seqcore, seqcore.kernels; print(seqcore.__file__, seqcore.kernels.__file__, sep='\\n')"
    answer = subprocess.run(
        [sys.executable, "-c", files], cwd=ROOT, env=process_environment, capture_output=True, text=True, check=False
    )
    found = [Path(line).resolve() for line in answer.stdout.splitlines()]
    return answer.returncode == 0 and all(path.is_relative_to(ROOT) for path in found)


def linked_package() -> Path:
    """A folder in which ``seqcore`` is this checkout's, with its kernels inside, as an installation would have it."""
    folder = Path(tempfile.gettempdir()) / f"seqcore-links-{os.getuid()}-{source_hash()}"
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "seqcore"
    package.mkdir(parents=True)
    for entry in (ROOT / "seqcore").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'stage':<8} {'status':<8} {'seconds':>8}  result")
    for outcome in outcomes:
        print(f"{outcome.stage:<8} {outcome.status:<8} {outcome.seconds:>8.0f}  {outcome.summary}")
        if outcome.status != PASSED:
            print("\n".join(f"         | {line}" for line in outcome.last_lines[-8:]))


def main(arguments: list[str] | None = None) -> int:
    names = [stage.name for stage in stages(Path(), False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--stage", choices=["all", *names], default="all")
    parser.add_argument("--tiny", action="store_true", help="the same path on a CPU, at tiny sizes")
    parser.add_argument("--force", action="store_true", help="also run stages that passed before")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print(
            "No GPU: torch.cuda.is_available() is False, and a campaign measures compiled kernels on one. "
            "Use --tiny to try the path on a CPU, or `python -m benchmarks` to measure this CPU.",
            file=sys.stderr,
        )
        return 2

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    process_environment = clean_environment(options.tiny)
    make_importable(process_environment)
    device = "cpu" if options.tiny else torch.cuda.get_device_name()
    key = f"{device} torch {torch.__version__} sources {source_hash()}{' tiny' if options.tiny else ''}"
    campaign = Campaign(out, key, process_environment, options.force)
    chosen = [stage for stage in stages(out, options.tiny) if options.stage in ("all", stage.name)]
    outcomes = [campaign.run(stage) for stage in chosen]
    print_table(outcomes)
    return 0 if all(outcome.status == PASSED for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
