"""Everything a machine with a GPU is asked, in stages that end: ``python -m benchmarks.campaign --out DIR``.

Runs from the root of a bare checkout with no network: the system's python3 with torch, Triton, NumPy, pytest,
pytest-benchmark and matplotlib. Kernels are compiled, never interpreted.

Whatever is finished, a test, a verified case, a time, a tuned problem, a profile, is a line of DIR/journal.jsonl. A
campaign that was stopped, or killed, and begins again with that file in DIR goes on from there, for the same sources
on the same machine. No more than eight files are written, all of them directly in DIR.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks.environment import ROOT, key
from benchmarks.measured import JOURNAL, MEASURED
from benchmarks.report import write_report
from benchmarks.stages import run_sanitizer
from benchmarks.stages.definitions import PROFILED, VERIFIED, Stage, stages
from benchmarks.stages.importable import clean_environment, make_importable
from seqcore.files import write_whole
from seqcore.journal import Journal

# "partly": all went well as far as it went, and going on will do more.
PASSED, PARTLY, FAILED, OVERRAN, HUNG = "passed", "partly", "failed", "overran", "hung"
# After the limit a stage is interrupted, so that it can still write what it has; after the grace it is killed.
GRACE_SECONDS = 20
TELL_SECONDS = 30
KEPT_LINES = 40
# A stage that crashes or hangs is begun again, as long as it gets further each time, if so many seconds are left.
WORTH_SECONDS = 20
# Of a command that judged and found fault. Any other is a crash, or a stop before the end.
FAULT = 1
# As a shell says of a command that was interrupted.
INTERRUPTED = 130


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    status: str
    seconds: float
    limit_s: float
    summary: str
    exit_status: int | None
    last_lines: list[str]
    date: str


class Campaign:
    """Runs stages, remembers how they ended, and skips those that passed before."""

    def __init__(self, out: Path, key: str, process_environment: dict[str, str], lock: IO | None = None):
        self.lock = lock
        self.journal = Journal(out / JOURNAL, key, "stage")
        self.log = out / "campaign.log"
        self.process_environment = process_environment

    def run(self, stage: Stage, seconds: float = float("inf")) -> Outcome:
        """Run one stage within its limit and ``seconds``, or take over how it ended if it passed before."""
        before = self.journal.done.get(stage.name)
        if before and before["status"] == PASSED:
            print(f"{stage.name}: passed before, {before['date']}; --force runs it again", flush=True)
            return Outcome(**before)
        limit_s = min(stage.limit_s, seconds)
        print(f"{stage.name}: {' '.join(stage.command_within(limit_s))} (at most {limit_s:.0f} s)", flush=True)
        if stage.written is not None:
            stage.written.unlink(missing_ok=True)
        begin = time.monotonic()
        status, exit_status, lines = self._execute(stage, limit_s)
        try:
            summary, left = stage.summary()
        except (OSError, ValueError, KeyError) as error:
            summary, left, status = f"results unreadable: {error!r}", True, FAILED if status == PASSED else status
        outcome = Outcome(
            stage.name,
            PARTLY if status == PASSED and left else status,
            round(time.monotonic() - begin, 1),
            limit_s,
            summary,
            exit_status,
            lines[-KEPT_LINES:],
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )
        self.journal.add(stage.name, asdict(outcome))
        print(f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s: {summary}", flush=True)
        return outcome

    def _execute(self, stage: Stage, limit_s: float) -> tuple[str, int | None, list[str]]:
        """The stage's command, again after each crash or hang that left more finished than there was before."""
        end = time.monotonic() + limit_s
        while True:
            finished, begin = stage.finished(), time.monotonic()
            status, exit_status, lines = self._once(stage, end - begin)
            crashed = status == HUNG or (status == FAILED and exit_status != FAULT)
            if not crashed or stage.finished() <= finished or end - time.monotonic() < WORTH_SECONDS:
                return status, exit_status, lines
            how = "hung" if status == HUNG else f"stopped with status {exit_status}"
            print(f"{stage.name}: {how}, {stage.finished()} finished; going on", flush=True)

    def _once(self, stage: Stage, limit_s: float) -> tuple[str, int | None, list[str]]:
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            command = stage.command_within(limit_s)
            log.write(f"\n==> {stage.name}: {' '.join(command)}\n")
            log.flush()
            log.seek(0, os.SEEK_END)
            start = log.tell()
            # A process group of its own, so that the stage's children end with it and nothing else does.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.process_environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=heed_interrupts,
                # The lock is theirs, too: a stage that outlives its campaign still writes the journal.
                pass_fds=[] if self.lock is None else [self.lock.fileno()],
            )
            status = wait_or_stop(process, limit_s, Watch(stage))
            log.seek(start)
            return status, process.returncode, log.read().splitlines()


def heed_interrupts() -> None:
    """Stages are interrupted at their limit. Who begins a campaign in the background may have it ignore interrupts, and
    what it begins would do so, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Watch:
    """Tells how far a stage is, and whether it has finished nothing for longer than it may."""

    def __init__(self, stage: Stage):
        self.stage, self.finished, self.since = stage, stage.finished(), time.monotonic()

    def __call__(self) -> bool:
        finished = self.stage.finished()
        if finished != self.finished:
            self.finished, self.since = finished, time.monotonic()
        idle = time.monotonic() - self.since
        since = f", nothing for {idle:.0f} s" if idle > TELL_SECONDS else ""
        print(f"{self.stage.name}: {finished} finished{since}", flush=True)
        return idle < self.stage.patience_s


def wait_or_stop(
    process: subprocess.Popen, limit_s: float, watch: Callable[[], bool], grace_s: float | None = None
) -> str:
    """How the process ended; past its limit it is interrupted, and past the grace killed with its whole group.

    So it is if ``watch``, asked every now and then, says that it goes on no more; a hung kernel leaves a process no
    other end. If this process is interrupted, so is the other.
    """
    grace_s = GRACE_SECONDS if grace_s is None else grace_s
    end = time.monotonic() + limit_s
    try:
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return PASSED if process.wait(min(left, TELL_SECONDS)) == 0 else FAILED
            if end > time.monotonic() and not watch():
                return HUNG
    finally:
        if process.poll() is None:
            stop(process, grace_s)
    return OVERRAN


def stop(process: subprocess.Popen, grace_s: float) -> None:
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    # Also when it has ended by itself: a child of it may not have.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def locked(journal: Path) -> IO:
    """The journal, as long as it is open no other campaign's.

    Raises BlockingIOError while a campaign, or what is left of one, has it.
    """
    file = journal.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def join_sanitized(out: Path, run_key: str) -> None:
    """What the sanitizer said, put beside the numerics in verify.json, whichever of the two ran again."""
    verified, found = out / VERIFIED, run_sanitizer.rows(Journal(out / JOURNAL, run_key, run_sanitizer.KIND))
    with contextlib.suppress(OSError, ValueError, TypeError):
        write_whole(verified, json.dumps(json.loads(verified.read_text()) | {"sanitizer": found}, indent=1))


def draw_report(out: Path) -> None:
    """report.md without pictures and report.html with all of them inside, of whatever was measured."""
    data, profile = out / MEASURED, out / PROFILED
    if not data.exists():
        return
    profile = profile if profile.exists() else None
    write_report([data], out, with_plots=False, profile=profile)
    with tempfile.TemporaryDirectory() as folder:
        write_report([data], Path(folder), profile=profile)
        shutil.copy(Path(folder) / "report.html", out)


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'stage':<8} {'status':<8} {'seconds':>8}  result")
    for outcome in outcomes:
        print(f"{outcome.stage:<8} {outcome.status:<8} {outcome.seconds:>8.0f}  {outcome.summary}")
        if outcome.status in (FAILED, OVERRAN, HUNG):
            print("\n".join(f"         | {line}" for line in outcome.last_lines[-8:]))


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in stages(Path(), "", False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--stage", choices=["all", *names], nargs="+", default=["all"])
    parser.add_argument("--seconds", type=positive, default=float("inf"), help="for all stages together")
    parser.add_argument("--tiny", action="store_true", help="the same path on a CPU, at tiny sizes")
    parser.add_argument("--force", action="store_true", help="forget what these stages finished before")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print(
            "No GPU: torch.cuda.is_available() is False, and a campaign measures compiled kernels on one. "
            "Use --tiny to try the path on a CPU, or `python -m benchmarks` to measure this CPU.",
            file=sys.stderr,
        )
        return 2

    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out / JOURNAL)
    except BlockingIOError:
        print(f"A campaign is at work in {out}, or a stage of one: wait for it, or end it first", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--out cannot be written: {error}; name another folder", file=sys.stderr)
        return 2
    # Else the stage would go on without its campaign.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(options, out, lock)


def run(options: argparse.Namespace, out: Path, lock: IO) -> int:
    """Run the stages that were chosen, draw the report, and print the table; the exit status."""
    end = time.monotonic() + options.seconds
    process_environment = clean_environment(options.tiny)
    make_importable(process_environment)
    run_key = key("cpu" if options.tiny else "cuda", *(["tiny"] if options.tiny else []))
    chosen = [stage for stage in stages(out, run_key, options.tiny) if {"all", stage.name} & set(options.stage)]
    if options.force:
        for stage in chosen:
            stage.forget()
    campaign, outcomes, interrupted = Campaign(out, run_key, process_environment, lock), [], False
    try:
        for stage in chosen:
            left = end - time.monotonic()
            if left < WORTH_SECONDS:
                print(f"{stage.name}: not begun, the {options.seconds:g} s are spent", flush=True)
                continue
            outcomes.append(campaign.run(stage, left))
    except KeyboardInterrupt:
        interrupted = True
    join_sanitized(out, run_key)
    draw_report(out)
    print_table(outcomes)
    if interrupted:
        print("interrupted; the same command goes on from here")
        return INTERRUPTED
    good = all(outcome.status in (PASSED, PARTLY) for outcome in outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
