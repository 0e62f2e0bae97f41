"""The subcommands of ``seqcore``: in each file ``HELP``, ``add_arguments(parser)`` and ``run(options)``, the status."""

import os
import subprocess
import sys
from collections.abc import Sequence

# The status of a command that did not come to its end, and can be given again; 1 says that it did, and found fault.
STOPPED = 3


def interpreted(arguments: Sequence[str]) -> int:
    """The whole command again, in a process that interprets kernels; its status."""
    command = [sys.executable, "-m", "seqcore", *arguments]
    return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
