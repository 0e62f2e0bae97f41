"""What every module of kernels does at its end: names that are found again, and interpreted launches that take turns.

Triton caches a kernel under a name made of its source, that of the functions it calls, and the global constants they
use; but it takes a function's constants into account only if that function already had a name of its own. Left alone, a
process that compiles in another order finds nothing in the cache that the last one filled. So every module of kernels
has its functions named as it is imported, in the order of definition, in which those that are called come first.

Triton's interpreter keeps in globals which program of which grid it is at, and what it has put in the place of
triton.language meanwhile. Two threads that launched at once would mix their programs up, and would not even notice. So
interpreted launches take turns, those of autograd's threads, too.
"""

import functools
import threading
from typing import Any

import triton
from triton.runtime import KernelInterface

# Reentrant: what a launch calls may launch in its turn.
_interpreter = threading.RLock()


def settle(module: dict[str, Any]) -> None:
    """Name the functions that ``module``, its globals, defines; have interpreted ones take turns."""
    for value in list(module.values()):
        if isinstance(value, triton.JITFunction):
            if value.module == module["__name__"]:
                _ = value.cache_key
        elif isinstance(value, KernelInterface) and value.fn.__module__ == module["__name__"]:
            # Its class, and no attribute of its own: what tests put in the place of the stock class's run is to be run.
            value.__class__ = _taking_turns(type(value))


@functools.cache
def _taking_turns(kind: type) -> type:
    def run(self, *arguments: Any, **keywords: Any) -> Any:
        with _interpreter:
            return kind.run(self, *arguments, **keywords)

    return type(kind.__name__, (kind,), {"run": run})
