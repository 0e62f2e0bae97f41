"""The command ``seqcore``, also ``python -m seqcore``."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from . import backends
from .commands import info, precompile, profile, tune, verify
from .errors import InvalidInput, UnsupportedInput
from .kernels.tables import BadTable
from .versions import why_no_triton

COMMANDS = {"info": info, "verify": verify, "profile": profile, "tune": tune, "precompile": precompile}
# These are about kernels, and nothing else.
OF_KERNELS = ("verify", "tune", "precompile")
# As a shell says of a command that wrote to a pipe which nobody reads: 128 and the number of SIGPIPE.
BROKEN_PIPE = 141
# How torch tells that the CPU's memory, or the numbers that count bytes, do not suffice: by a RuntimeError.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed", "numel: integer multiplication overflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0 if all is well, 1 if a check failed, 2 if it cannot run.

    3 is of one that stopped before its end and can go on, 141 of one whose output nobody reads any more.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            return _run(arguments)
        finally:
            # What cannot be written is to be known here, and not when Python ends.
            _flush()
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except (InvalidInput, UnsupportedInput, BadTable, OSError, MemoryError, RuntimeError) as error:
        if (fault := _fault(error)) is None:
            raise
        _drop_output()
        print(f"seqcore {arguments[0]}: {fault}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="seqcore", description="Fused kernels for recurrence and attention.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP))
    options = parser.parse_args(arguments)
    # As they came, for a command that has to begin again in another process.
    options.arguments = arguments
    if options.command in OF_KERNELS and (reasons := why_no_triton()):
        raise UnsupportedInput("; ".join(reasons))
    # SEQCORE_BACKEND may name none, which a command that goes on after errors would take for one of a kernel.
    backends.resolve(None)
    with warnings.catch_warnings():
        # Whoever measures or asks must know which tables it is about; training goes on without a broken one.
        warnings.simplefilter("error", BadTable)
        return COMMANDS[options.command].run(options)


def _fault(error: Exception) -> str | None:
    """What a user can do something about, in a line; None if ``error`` may be one of ours."""
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in OUT_OF_MEMORY):
        return f"not enough memory for these sizes; take smaller ones ({said or 'out of memory'})"
    return said if isinstance(error, (InvalidInput, UnsupportedInput, BadTable, OSError)) else None


def _flush() -> None:
    # None where there is no output, as after `>&-`.
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Forget what stands in the buffer if it cannot be written, or Python complains of it once more as it ends."""
    try:
        _flush()
    except OSError:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
