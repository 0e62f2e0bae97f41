"""Every kernel under compute-sanitizer: ``python -m benchmarks.stages.run_sanitizer --journal FILE --key KEY``.

Each tool over each of a few small problems, in a process of its own: memory that is out of bounds or nobody's, reads of
what nobody wrote, threads of a program that race in shared memory or miss one of its barriers. Whatever has ended is a
line of the journal; begun again, only what did not come to an end is run. Without a compute-sanitizer nothing is run.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from seqcore.devices import INTERPRETED
from seqcore.journal import Journal
from seqcore.profiling.exchange import Exchange, run_barrier
from seqcore.testing.attention_cases import BACKWARD, DECODE, KERNELS, attention_case
from seqcore.testing.cases import Case, floats_as, recurrence_case
from seqcore.testing.verify import compute

KIND = "sanitize"
PROGRAM = "compute-sanitizer"
PACKAGE = "nvidia-cuda-sanitizer-api"
NOT_HERE = f"nothing checked: no {PROGRAM} on PATH, in CUDA_HOME, or of pip's {PACKAGE}"
# The most valuable first. Those that look at allocations need each tensor to be one.
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Instrumented, programs that wait for each other poll slowly, and each problem compiles first. Longer is a hang.
CASE_SECONDS = 200
# A case that ended says so, one way or the other; the others are tried again.
CLEAN, ERRORS, CRASHED, HUNG = "clean", "errors", "crashed", "hung"
ENDED = (CLEAN, ERRORS)

SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)", re.MULTILINE)
# "at kernel+0x1a0 in file.py:12" today, "at 0x1a0 in kernel" before.
PLACE = re.compile(r"\b(?:at (\w+)\+0x[0-9a-f]+|at 0x[0-9a-f]+ in (?:\S*:)?(\w+))")
FIRST = re.compile(r"^=+ ((?:Invalid|Uninitialized|Error:|Warning:|Barrier|Program hit|Race).*)$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """Something to launch; ``kernels`` are those that it launches, ``make(device)`` gives the call that does."""

    name: str
    kernels: tuple[str, ...]
    make: Callable[[torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """What one tool said of one problem."""

    tool: str
    problem: str
    kernels: tuple[str, ...]
    ended: str
    errors: int | None
    # The kernel of the first error, and its words; of what did not end, its last words.
    kernel: str | None
    first: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.tool} {self.problem}"


def problems() -> list[Problem]:
    """Every kernel once, sequences in both their regimes; few steps."""
    forward, backward = (f"recurrence_{which}_kernel" for which in ("forward", "backward"))

    def sequence(layout: str, *sizes: int, kernels: tuple[str, ...] = (forward, backward)) -> Problem:
        cell = "lstm" if layout == "padded" else "gru"
        make = lambda device: recurrence_case(_cell(cell), *sizes, layout, device)
        return _verified(f"{cell} {layout} T={sizes[0]} B={sizes[1]} H={sizes[3]}", kernels, make)

    def attends(name: str, M: int, N: int, kernels: dict[str, str], **options) -> Problem:
        named = tuple(dict.fromkeys(kernel for names in kernels.values() for kernel in names.split(", ")))
        return _verified(f"attention {name}", named, lambda device: attention_case(device, M, N, 64, **options))

    sides = {name: KERNELS[name] for name in ("dq", "dk")}
    return [
        sequence("padded", 3, 17, 96, 257, 1),
        attends("with a mask", 65, 90, {"out": KERNELS["default"], **sides, "dmask": BACKWARD.format("bias")},
                mask=(2, 1, 65, 90), causal="lower_right", dropout_p=0.3),
        sequence("ragged and reset", 4, 5, 96, 64, 1),
        sequence("recomputed and clipped", 3, 17, 96, 257, 1, kernels=(forward, "pointwise_kernel", backward)),
        attends("decoding", 1, 700, {"out": DECODE, **sides}),
        attends("averaged", 65, 90, {"out": KERNELS["default"], "weights": KERNELS["weights"], **sides},
                return_weights="average"),
        sequence("padded", 1, 17, 96, 257, 1, kernels=("recurrence_step_kernel", backward)),
        Problem("floors", ("empty_kernel", "barrier_kernel", "exchange_kernel"), _floors),
    ]  # fmt: skip


def _cell(name: str):
    from seqcore.cells import find

    return find(name)


def _verified(name: str, kernels: tuple[str, ...], case: Callable[[torch.device], Case]) -> Problem:
    def make(device: torch.device) -> Callable[[], object]:
        found = case(device)
        dtype = torch.float32 if INTERPRETED else torch.bfloat16
        inputs = floats_as(dtype, found.tensors)
        return lambda: compute(found, inputs, "triton")

    return Problem(name, kernels, make)


def _floors(device: torch.device) -> Callable[[], object]:
    from seqcore.kernels.floors import empty_kernel

    # Interpreted programs run one after another, so there each must be a team of its own.
    exchange = Exchange(1 if INTERPRETED else 8, 2, 16, 768, 96, 4)

    def run() -> None:
        empty_kernel[(1,)]()
        run_barrier(exchange.slices, exchange.teams, 3, str(device))
        rows = exchange.rows_of(3, str(device))
        exchange.run(rows, 3)

    return run


def find_program() -> str | None:
    """The compute-sanitizer of this machine: on PATH, of its CUDA toolkit, or installed by pip."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.path.join(home, *below) for home in homes for below in (("bin",), (PROGRAM,))]
    found = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=os.pathsep.join(folders) or os.devnull)
    return found or next(_from_pip(), None)


def _from_pip() -> Iterator[str]:
    for distribution in metadata.distributions():
        if (distribution.metadata["Name"] or "").replace("_", "-").lower().startswith(PACKAGE):
            for file in distribution.files or ():
                path = Path(distribution.locate_file(file))
                if path.name == PROGRAM and os.access(path, os.X_OK) and path.is_file():
                    yield str(path)


def read(problem: Problem, tool: str, text: str, status: int | None, seconds: float) -> Row:
    """What ``tool`` printed of ``problem``, as a row; ``status`` is None if it had to be ended."""
    summaries = [int(one or other) for one, other in SUMMARY.findall(text)]
    errors = sum(summaries) if summaries else None
    kernel = next((one or other for one, other in PLACE.findall(text)), None)
    said = FIRST.search(text)
    first = said[1].strip() if said else ""
    if status is None:
        ended = HUNG
    elif errors:
        ended = ERRORS
    else:
        # Also if it saw no error: what it was to watch has ended before its end.
        ended = CLEAN if errors == 0 and status == 0 else CRASHED
    if ended in (CRASHED, HUNG):
        first = first or next((line for line in reversed(text.splitlines()) if line.strip()), "nothing printed")
    return Row(tool, problem.name, problem.kernels, ended, errors, kernel, first[:300], round(seconds, 1))


def check(program: str, tool: str, problem: Problem, limit_s: float, tiny: bool) -> Row:
    """One problem under one tool, in a process of its own, which is ended after ``limit_s``."""
    # The assembler, a process of its own, has no kernels to look at.
    command = [program, "--tool", tool, "--target-processes", "application-only", "--print-limit", "20"]
    command += [sys.executable, "-m", "benchmarks.stages.run_sanitizer", "--only", problem.name]
    environment = os.environ | (UNPOOLED if tool in ("memcheck", "initcheck") else {})
    environment |= {"TRITON_INTERPRET": "1"} if tiny else {}
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=limit_s)
            status = process.returncode
    finally:
        # The sanitizer, and what it watches, which would outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return read(problem, tool, text, status, time.monotonic() - begin)


def rows(journal: Journal) -> list[dict]:
    """What stands in the journal, without the line that says where the compute-sanitizer is."""
    return [row for name, row in journal.done.items() if name != PROGRAM]


def chosen(tiny: bool) -> list[tuple[str, Problem]]:
    """What to run in what order: tool by tool; tiny: of each one problem."""
    found = problems()[:1] if tiny else problems()
    return [(tool, problem) for tool in TOOLS for problem in found]


def summary(journal: Journal, tiny: bool) -> tuple[str, bool]:
    """In words what the journal holds, and whether going on would bring more."""
    found = rows(journal)
    if not found and PROGRAM in journal and journal.done[PROGRAM] is None:
        return NOT_HERE, True
    bad = [row for row in found if row["ended"] != CLEAN]
    left = len(chosen(tiny)) - sum(row["ended"] in ENDED for row in found)
    words = f"{len(found)} checked, {len(bad)} not clean"
    if bad:
        worst = bad[0]
        where = f" in {worst['kernel']}" if worst["kernel"] else ""
        words += f", first {worst['tool']} of {worst['problem']}: {worst['ended']}{where}"
    return f"{words}; {left} left for another run" if left else words, bool(left)


def main(arguments: list[str] | None = None) -> int:
    prog = "python -m benchmarks.stages.run_sanitizer"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="run this problem, here and now: what the sanitizer watches")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="what was finished before, and will be")
    parser.add_argument("--key", default="", help="what results depend on; others' are not taken from the journal")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for everything together")
    parser.add_argument("--case-seconds", type=float, default=CASE_SECONDS, help="for each tool on each problem")
    parser.add_argument("--tiny", action="store_true", help="one problem a tool, on a CPU")
    options = parser.parse_args(arguments)
    if options.only:
        [problem] = [problem for problem in problems() if problem.name == options.only]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        problem.make(device)()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 0
    if options.journal is None:
        parser.error("--journal FILE is needed, or --only NAME")
    return run(options, Journal(options.journal, options.key, KIND))


def run(options: argparse.Namespace, journal: Journal) -> int:
    """All that has not come to an end before; 1 if anything is not clean."""
    program = find_program()
    journal.add(PROGRAM, program)
    if program is None:
        print(NOT_HERE)
        return 0
    end, bad = time.monotonic() + options.seconds, 0
    for tool, problem in journal.suspects_last(chosen(options.tiny), lambda one: f"{one[0]} {one[1].name}"):
        name = f"{tool} {problem.name}"
        row = journal.done.get(name)
        if row is None or row["ended"] not in ENDED:
            limit_s = min(options.case_seconds, end - time.monotonic())
            if limit_s < min(options.case_seconds, 20):
                continue
            journal.begin(name)
            row = asdict(check(program, tool, problem, limit_s, options.tiny))
            if row["ended"] == HUNG and limit_s < options.case_seconds:
                # The time of all was spent, not its own: it comes last the next time.
                print(f"{name}: cut short after {limit_s:.0f} s", flush=True)
                continue
            journal.add(name, row)
            where = f" in {row['kernel']}" if row["kernel"] else ""
            print(f"{name}: {row['ended']}{where} {row['first']} ({row['seconds']:.0f} s)", flush=True)
        bad += row["ended"] != CLEAN
    print(summary(journal, options.tiny)[0])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
