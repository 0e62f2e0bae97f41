"""``seqcore tune``"""

import argparse
import contextlib
import sys
import traceback
from pathlib import Path

import torch

from ..devices import INTERPRETED, describe
from ..kernels import tables
from ..kernels.tuning import TYPICAL, Device
from ..testing.shares import cores
from . import STOPPED, interpreted

HELP = "search the fastest tile sizes for this GPU and write a table of them, which the library reads"
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=("attention", "lstm", "gru", "rnn"), help="only these operations")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), help="only these dtypes")
    parser.add_argument("--seconds", type=float, help="end after so long; the next run goes on from there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: the user's cache)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what is finished (default: beside the table)")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes to compile in")
    parser.add_argument("--force", action="store_true", help="begin anew: believe neither the log nor the user's table")
    parser.add_argument("--dry-run", action="store_true", help="only list and compile candidates; needs no GPU")
    parser.add_argument("--arch", choices=TYPICAL, help="of --dry-run: for this GPU")
    parser.add_argument("--tiny", action="store_true", help="the whole path on a CPU; its times mean nothing")


def run(options: argparse.Namespace) -> int:
    if options.tiny and not INTERPRETED:
        return interpreted(options.arguments)
    fault = _fault(options)
    if fault:
        print(f"seqcore tune: {fault}", file=sys.stderr)
        return 2
    return _dry_run(options) if options.dry_run else _tune(options)


def _fault(options: argparse.Namespace) -> str | None:
    if options.arch and not options.dry_run:
        return "--arch is for --dry-run: times can only be measured on the GPU at hand"
    if INTERPRETED and not options.tiny:
        return "TRITON_INTERPRET is set, and interpreted kernels can neither be compiled nor timed: unset it"
    if not options.tiny and not options.arch and not torch.cuda.is_available():
        return (
            "there is no GPU here to measure on. Compile candidates for one that is elsewhere with "
            f"--dry-run --arch {{{','.join(TYPICAL)}}}, or try the path on this CPU with --tiny --out FILE"
        )
    if not options.dry_run and not options.out and tables.cache_folder() is None:
        return "SEQCORE_CACHE is empty, so that there is no cache to write to: name a file with --out"
    return None


def _problems(options: argparse.Namespace) -> list:
    from ..tuning import problems

    operations = options.op or tuple(problems.OPERATIONS)
    if options.tiny:
        return problems.tiny(operations)
    return problems.problems(operations, options.dtype or problems.DTYPES)


def _dry_run(options: argparse.Namespace) -> int:
    from ..tuning import ahead
    from ..tuning.race import Deadline, OutOfTime

    device = Device(options.arch) if options.arch else describe(torch.device("cuda"))
    deadline = Deadline(options.seconds)
    with ahead.Compiler(max(1, options.jobs)) as compiler:
        try:
            for problem in _problems(options):
                verdicts = ahead.compiled(problem, problem.candidates(device), device, compiler, deadline)
                print(f"{problem.name}: {sum(not v.dropped for v in verdicts)} of {len(verdicts)} would be measured")
                for verdict in verdicts:
                    print(f"  {_described(verdict)}", flush=True)
        except (OutOfTime, KeyboardInterrupt):
            print("ended before all problems were compiled")
    return 0


def _described(verdict) -> str:
    row = verdict.row
    sizes = " ".join(f"{name}={value}" for name, value in verdict.fields.items())
    takes = f"shared {row['shared']} registers {row['registers']} spills {row['spills']}"
    return f"{sizes}: {takes if row['registers'] is not None else row['error']}: {verdict.dropped or 'kept'}"


def _tune(options: argparse.Namespace) -> int:
    from ..clock import Stopwatch
    from ..tuning import ahead
    from ..tuning.race import Deadline
    from ..tuning.run import run
    from ..tuning.search import Bench, Effort

    torch_device = CPU if options.tiny else torch.device("cuda")
    device = describe(torch_device)
    out = options.out or tables.user_file(device.arch)
    log = options.log or out.with_suffix(".log.jsonl")
    effort = Effort(rounds=1, finalists=1, final_rounds=3, candidates=2) if options.tiny else Effort()
    with contextlib.ExitStack() as stack:
        compiler = None if options.tiny else stack.enter_context(ahead.Compiler(max(1, options.jobs)))
        bench = Bench(device, torch_device, compiler, Stopwatch(torch_device.type), Deadline(options.seconds), effort)
        try:
            outcome = run(_problems(options), bench, out, log, options.force)
        except RuntimeError:
            # A kernel broke the device: another process can go on, and leaves that problem to the end.
            traceback.print_exc()
            print(f"stopped; the same command goes on from {log}", file=sys.stderr)
            return STOPPED
    changed = sum(found["choice"] != found["before"] for _, found in outcome.results)
    print(f"{len(outcome.results)} problems measured, {changed} of them with another choice than before; table: {out}")
    print(f"no slower than torch's own: {', '.join(outcome.no_slower) or 'nothing, as far as is known'}")
    if outcome.left:
        print(f"{len(outcome.left)} left, first {outcome.left[0]}: run the same again to go on (log: {log})")
    return 0
