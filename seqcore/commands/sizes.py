"""How problems are named on a command line: an operation, and its sizes by the letters of CONTRIBUTING's table."""

import argparse
from collections.abc import Iterator
from typing import Any

RECURRENCES = ("rnn", "gru", "lstm")
# With what they are if nothing is said; 0 stands for another size, which the words name.
RECURRENCE_SIZES = {
    "T": (1024, "time steps"), "B": (16, "sequences"), "H": (768, "hidden units"),
    "I": (0, "input features; H by default"), "layers": (1, "layers"), "directions": (1, "1 or 2"),
}  # fmt: skip
ATTENTION_SIZES = {
    "B": (1, "sequences"), "H": (16, "query heads"), "H-kv": (0, "key heads; H by default"), "M": (4096, "queries"),
    "N": (0, "keys; M by default"), "D": (128, "head dim"),
    "window": (0, "keys a query sees, with --causal; all by default"),
}  # fmt: skip


def add_operations(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A subparser for each operation, with its sizes; to each of them the command adds what is its own."""
    operations = parser.add_subparsers(dest="op", required=True, metavar="op")
    for op in (*RECURRENCES, "attention"):
        subparser = operations.add_parser(op)
        for name, (default, meaning) in (ATTENTION_SIZES if op == "attention" else RECURRENCE_SIZES).items():
            known = f"{meaning}; {default} by default" if default else meaning
            subparser.add_argument(f"--{name}", type=int, default=default, help=known)
        flag, meaning = ("causal", "hide later keys") if op == "attention" else ("packed", "lengths from T/4 to T")
        subparser.add_argument(f"--{flag}", action="store_true", help=meaning)
        yield subparser


def problem(options: argparse.Namespace, **more: Any):
    """The problem that ``options`` name; ``more`` are its other fields. Raises InvalidInput for sizes that are none."""
    from ..profiling import Attention, Recurrence

    attention = options.op == "attention"
    names = [*(ATTENTION_SIZES if attention else RECURRENCE_SIZES), "causal" if attention else "packed"]
    fields = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in ("op", *names)}
    return (Attention if attention else Recurrence)(**fields, **more)
