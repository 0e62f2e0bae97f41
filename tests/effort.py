"""How much a test tries: a little in every run, a lot in the nightly one (SEQCORE_NIGHTLY=1).

Every run draws the same cases. The nightly one draws others each night, and prints what it finds wrong in a form that
can be run again, to be kept as a test with a name.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

NIGHTLY = bool(os.environ.get("SEQCORE_NIGHTLY"))

_tried = 0


def effort(usual: int, nightly: int) -> int:
    """How many cases, seeds or schedules to try in this run."""
    return nightly if NIGHTLY else usual


def tried(cases: int = 1) -> None:
    """Count ``cases`` towards those that the running test has tried; one that never says so has tried one."""
    global _tried
    _tried += cases


def take_tried() -> int:
    """How many cases were tried since this was last asked."""
    global _tried
    count, _tried = _tried, 0
    return count


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Within it, and in what it decorates, torch draws the same numbers, whatever was drawn or imported before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def drawn(usual: int, nightly: int, **strategies: Any) -> Callable:
    """Run a test on cases drawn by hypothesis, each argument from its strategy; the others are pytest's fixtures.

    Hypothesis is imported here, since a machine with a GPU may lack it: skip the file first (``pytest.importorskip``).
    """
    from hypothesis import HealthCheck, given, settings

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def counted(*arguments: Any, **keywords: Any) -> None:
            tried()
            # For each case, not once for all: a case that failed is to have the same numbers when it is run alone.
            with seeded():
                test(*arguments, **keywords)

        chosen = settings(
            max_examples=effort(usual, nightly),
            deadline=None,
            derandomize=not NIGHTLY,
            print_blob=True,
            # Fixtures here say where to run, and stay the same; how long a case takes is up to the kernels.
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )
        return chosen(given(**strategies)(counted))

    return decorate
