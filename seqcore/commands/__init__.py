"""The subcommands of ``seqcore``: in each file ``HELP``, ``add_arguments(parser)`` and ``run(options)``, the status."""
