"""``seqcore precompile``"""

import argparse
import re
import sys

from ..errors import InvalidInput, UnsupportedInput
from .sizes import add_operations, problem

HELP = "fill Triton's cache for the sizes named, so that the first call does not stall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for subparser in add_operations(parser):
        subparser.add_argument(
            "--pass", dest="pass_", default="training", help="training, by default: with backward; or forward"
        )
        subparser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="bfloat16 by default; or several")
        subparser.add_argument("--arch", help="a GPU that is not here, like sm_90; then carry Triton's cache to it")
        subparser.add_argument("--multiprocessors", type=int, default=0, help="with --arch: of that GPU, if unusual")


def run(options: argparse.Namespace) -> int:
    from ..kernels.tuning import Device
    from ..precompile import cache_folder, precompile

    device = Device(options.arch, options.multiprocessors) if options.arch else None
    try:
        if device is not None and not re.fullmatch(r"sm_\d{2,3}|gfx\w+", options.arch):
            raise InvalidInput(f"--arch must be a GPU's, like sm_90 or gfx942, got {options.arch!r}")
        for chosen in [problem(options, pass_=options.pass_, dtype=dtype) for dtype in options.dtype]:
            print(f"{chosen.label}:", flush=True)
            for compiled in precompile(chosen, device):
                known = "in the cache already" if compiled.seconds is None else f"{compiled.seconds:.1f} s"
                print(f"  {compiled.kernel:<32} {known}")
    except (InvalidInput, UnsupportedInput) as error:
        print(f"seqcore precompile: {error}", file=sys.stderr)
        return 2
    print(f"Triton's cache: {cache_folder()}")
    return 0
