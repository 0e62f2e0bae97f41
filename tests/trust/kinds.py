"""What the subjects beside this file are made of: promises, and guards with a mutant each."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """What holds whatever a caller does, how that is tested, and by which tests.

    ``tests`` are pytest's names from ``tests/`` on: of a whole file, "test_limits.py", of one test,
    "test_limits.py::test_batch", or of that with its parameters in brackets.
    """

    words: str
    how: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Guard:
    """Something in the source that keeps a promise, and the mutant without it, which ``test`` must kill.

    The mutant is ``file`` with ``new`` in place of ``old``, which stands there once; ``test`` is one name as in a
    promise, and runs where kernels are ``interpreted``, or in the ordinary process.
    """

    words: str
    file: str
    old: str
    new: str
    test: str
    interpreted: bool = False


def interpreted_in(tests: str) -> Callable[[str, str, str, str, str], Guard]:
    """What makes guards, out of words, file, old, new and a test in the file ``tests``, that are interpreted."""
    return lambda words, file, old, new, test: Guard(words, file, old, new, f"{tests}::{test}", interpreted=True)
