"""Races in which every contestant runs in turn, and when they must end."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from ..clock import Call, Clock

# What a contestant runs within: the choice of its tiles, or of a backend.
Setting = Callable[[], AbstractContextManager]


class OutOfTime(Exception):
    """The seconds that were given are over."""


class Deadline:
    """``seconds`` from now, or never."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime


def race(
    contestants: Sequence[tuple[Setting, Call]], rounds: int, clock: Clock, deadline: Deadline
) -> list[list[float]]:
    """Milliseconds of each contestant, round by round; each round begins with another one.

    A round before the first fills caches and compiles what has not run yet.
    """
    samples: list[list[float]] = [[] for _ in contestants]
    for turn in range(-1, rounds):
        deadline.check()
        for place in range(len(contestants)):
            index = (place + turn) % len(contestants)
            setting, call = contestants[index]
            with setting():
                milliseconds = clock(call)
            if turn >= 0:
                samples[index].append(milliseconds)
    return samples
