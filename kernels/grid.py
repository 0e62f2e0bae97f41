"""The barrier between programs of one launch, in two halves, so that work can stand between them.

A counter in global memory, zero at launch, belongs to each set of programs that wait for one another. Everything a
program stored before ``signal`` is visible to a program that has returned from a ``wait`` which counted that signal:
the block-wide barrier orders the stores of all its threads before the one thread's release, and the acquire before
the loads of all threads after it. Those loads must bypass the first-level cache (``cache_modifier=".cg"``), which is
not coherent between multiprocessors.

All programs of the set must be resident at once, or they wait forever: launch with ``launch_cooperative_grid=True``,
which fails instead of hanging.
"""

import triton
import triton.language as tl

from .settled import settle

# int32 counters stand a cache line apart, so that sets of programs do not slow each other's polling down.
COUNTER_STRIDE = tl.constexpr(32)

# Whether interpreted programs run side by side: ``seqcore.testing.explore`` says so while it is at work. Otherwise they
# run one after another, and one that waits for another waits forever.
interleaved = False


@triton.jit
def signal(counter_ptr):
    """Count this program in, once its stores so far are visible to the whole device."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, target):
    """Return once ``target`` signals were counted. The difference is taken so that the counter may wrap around."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") - target < 0:
        pass
    tl.debug_barrier()


settle(globals())
