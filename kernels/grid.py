"""The barrier between programs of one launch, in two halves, so that work can stand between them.

A counter in global memory, zero at launch, belongs to each set of programs that wait for one another. Everything a
program stored before ``signal`` is visible to a program that has returned from a ``wait`` which counted that signal:
the block-wide barrier orders the stores of all its threads before the one thread's release, and the acquire before
the loads of all threads after it. Those loads must bypass the first-level cache (``cache_modifier=".cg"``), which is
not coherent between multiprocessors.

All programs of the set must be resident at once, or they wait forever: launch with ``launch_cooperative_grid=True``,
which fails instead of hanging.

With ``SEQCORE_DEBUG=1`` no program waits forever, whatever is wrong: after ``MOST_POLLS`` it stops the launch. Launches
of kernels that wait then need ``LAUNCH_OPTIONS``, which are none otherwise.
"""

import os

import triton
import triton.language as tl

from .settled import settle

# int32 counters stand a cache line apart, so that sets of programs do not slow each other's polling down.
COUNTER_STRIDE = tl.constexpr(32)

# Whether interpreted programs run side by side: ``seqcore.testing.explore`` says so while it is at work. Otherwise they
# run one after another, and one that waits for another waits forever.
interleaved = False

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Read once, since kernels are compiled with it.
WATCHED = tl.constexpr(os.environ.get("SEQCORE_DEBUG", "0").lower() in ("1", "true", "on", "yes", "y"))
# A poll goes to the second-level cache and back, which takes no GPU less than a tenth of a microsecond: this many last
# longer than a second, and what is waited for, a step of a program that is already running, takes microseconds.
# Interpreted, nothing changes while a program polls, but for other programs that the explorer lets go on in between.
MOST_POLLS = tl.constexpr(20_000 if INTERPRETED.value else 1 << 24)
# Without the checks of every sum that come with "debug": a counter may wrap around.
LAUNCH_OPTIONS = {"debug": True, "sanitize_overflow": False} if WATCHED.value else {}


@triton.jit
def _give_up(polls):
    """Stop the launch if this is one poll too many."""
    if INTERPRETED:
        if polls > MOST_POLLS:
            raise RuntimeError(
                f"a program has polled its counter {MOST_POLLS.value} times: what it waits for never signals, or "
                "is not running; programs that wait for each other run within seqcore.testing.explore(seed)"
            )
    else:
        tl.device_assert(polls <= MOST_POLLS, "seqcore: a program waited too long for the others of its launch")


@triton.jit
def signal(counter_ptr):
    """Count this program in, once its stores so far are visible to the whole device."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, target):
    """Return once ``target`` signals were counted. The difference is taken so that the counter may wrap around."""
    if WATCHED:
        polls = 0
    while tl.atomic_add(counter_ptr, 0, sem="acquire") - target < 0:
        if WATCHED:
            polls += 1
            _give_up(polls)
    tl.debug_barrier()


settle(globals())
