"""``seqcore precompile``"""

import argparse
import re

from ..errors import InvalidInput
from ..kernels.tuning import Device
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
    from ..precompile import cache_folder, precompile

    device = _device(options.arch, options.multiprocessors) if options.arch else None
    for chosen in [problem(options, pass_=options.pass_, dtype=dtype) for dtype in options.dtype]:
        print(f"{chosen.label}:", flush=True)
        for compiled in precompile(chosen, device):
            known = "in the cache already" if compiled.seconds is None else f"{compiled.seconds:.1f} s"
            print(f"  {compiled.kernel:<32} {known}")
    print(f"Triton's cache: {cache_folder()}")
    return 0


def _device(arch: str, multiprocessors: int) -> Device:
    if not re.fullmatch(r"(sm_|gfx)\w+", arch):
        raise InvalidInput(f"--arch must be a GPU's, like sm_90 or gfx942, got {arch!r}")
    try:
        return Device(arch, multiprocessors)
    except ValueError as error:
        raise InvalidInput(str(error)) from None
