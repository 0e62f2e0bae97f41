"""Names in Triton's cache that do not depend on what a process compiled before.

Triton caches a kernel under a name made of its source, that of the functions it calls, and the global constants they
use; but it takes a function's constants into account only if that function already had a name of its own. Left alone, a
process that compiles in another order finds nothing in the cache that the last one filled. So every module of kernels
has its functions named as it is imported, in the order of definition, in which those that are called come first.
"""

from typing import Any

import triton


def settle(module: dict[str, Any]) -> None:
    """Name the functions that ``module``, its globals, defines. Interpreted functions need no names."""
    for value in list(module.values()):
        if isinstance(value, triton.JITFunction) and value.module == module["__name__"]:
            _ = value.cache_key
