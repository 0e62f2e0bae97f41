"""The command ``seqcore``, also ``python -m seqcore``."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from .commands import info, precompile, profile, tune, verify
from .kernels.tables import BadTable
from .versions import why_no_triton

COMMANDS = {"info": info, "verify": verify, "profile": profile, "tune": tune, "precompile": precompile}
# These are about kernels, and nothing else.
OF_KERNELS = ("verify", "tune", "precompile")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0 if all is well, 1 if a check failed, 2 if it cannot run."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="seqcore", description="Fused kernels for recurrence and attention.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP))
    options = parser.parse_args(arguments)
    # As they came, for a command that has to begin again in another process.
    options.arguments = arguments
    if options.command in OF_KERNELS and (reasons := why_no_triton()):
        print(f"seqcore {options.command}: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            # Whoever measures or asks must know which tables it is about; training goes on without a broken one.
            warnings.simplefilter("error", BadTable)
            return COMMANDS[options.command].run(options)
    except BadTable as error:
        print(f"seqcore {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"seqcore {options.command}: {error}", file=sys.stderr)
        return 2
