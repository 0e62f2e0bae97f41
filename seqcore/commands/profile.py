"""``seqcore profile``"""

import argparse
from pathlib import Path

from ..errors import InvalidInput
from .sizes import add_operations, problem

HELP = "where the time of an operation goes: a Chrome trace, its kernels with their work, a step's parts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for subparser in add_operations(parser):
        subparser.add_argument("--pass", dest="pass_", default="forward", help="forward, or training: with backward")
        subparser.add_argument("--dtype", help="float16, bfloat16 (on a GPU by default) or float32")
        subparser.add_argument("--backend", help="triton on a GPU by default, else auto")
        subparser.add_argument("--repeats", type=int, default=3, help="calls that are profiled; 3 by default")
        subparser.add_argument("--out", type=Path, metavar="DIR", help="where the files go; profile-OP by default")
        subparser.add_argument("--only", choices=["run"], help="run: only warm up and run, for ncu and nsys")


def run(options: argparse.Namespace) -> int:
    from .. import profiling
    from ..profiling.session import defaults, render

    asked = {name: getattr(options, name) or default for name, default in defaults().items()}
    if options.repeats < 1:
        raise InvalidInput(f"{options.op}: repeats must be a positive number, got {options.repeats}; 3 by default")
    chosen = problem(options, pass_=options.pass_, **asked)
    if options.only == "run":
        profiling.run(chosen, options.repeats)
        return 0
    found = profiling.profile(chosen, options.repeats, options.out or Path(f"profile-{options.op}"))
    print(render(found))
    return 0
