"""How torch's own products are made beside ours: by a switch of the whole process, at which threads take turns."""

import contextlib
import threading
from collections.abc import Iterator

import torch

# Reentrant, for one layer's products may stand within another's; held while products are launched, not while they run.
_switching = threading.RLock()


@contextlib.contextmanager
def library_precision(precision: str) -> Iterator[None]:
    """Within the block torch's float32 products on a GPU are made as kernels of ``precision`` make theirs, whatever its
    own switch says, which comes back after the block.

    Threads take turns: else one would put the switch back under another, or take another's setting for the user's.
    """
    if precision == "ieee":
        # Not float32, or no GPU that has TF32: the switch decides nothing.
        yield
        return
    switch = torch.backends.cuda.matmul
    with _switching:
        before = switch.fp32_precision
        try:
            switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            yield
        finally:
            switch.fp32_precision = before
