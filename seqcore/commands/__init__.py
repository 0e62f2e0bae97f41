"""The subcommands of ``seqcore``: in each file ``HELP``, ``add_arguments(parser)`` and ``run(options)``, the status."""

# The status of a command that did not come to its end, and can be given again; 1 says that it did, and found fault.
STOPPED = 3
