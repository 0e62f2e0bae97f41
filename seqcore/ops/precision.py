"""How torch's own products are made beside ours: by a switch of the whole process, which several threads share."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_changed = threading.Condition()
_users = 0
_before = ""


@contextlib.contextmanager
def library_precision(precision: str) -> Iterator[None]:
    """Within the block torch's float32 products on a GPU are made as kernels of ``precision`` make theirs, whatever its
    own switch says, which comes back after the block.

    Threads that want the same share the block; those that want another wait until it is over, and the last one out
    puts the switch back. Else the first would put it back under the others, or one would take another's for the user's.
    """
    if precision == "ieee":
        # Not float32, or no GPU that has TF32: the switch decides nothing.
        yield
        return
    wanted = "tf32" if precision == "tf32" else "ieee"
    _enter(wanted)
    try:
        yield
    finally:
        _leave()


def _enter(wanted: str) -> None:
    global _users, _before
    switch = torch.backends.cuda.matmul
    with _changed:
        _changed.wait_for(lambda: not _users or switch.fp32_precision == wanted)
        if not _users:
            _before, switch.fp32_precision = switch.fp32_precision, wanted
        _users += 1


def _leave() -> None:
    global _users
    with _changed:
        _users -= 1
        if not _users:
            torch.backends.cuda.matmul.fp32_precision = _before
            _changed.notify_all()
