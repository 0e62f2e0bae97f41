"""Which way calls take through the library, where a test does not leave it to them."""

from contextlib import AbstractContextManager
from unittest import mock

from seqcore import backends


def by_the_operators() -> AbstractContextManager:
    """Within it all calls go through what a GPU's do, autograd.Functions over operators, on a CPU, too."""
    return mock.patch.object(backends, "choose", _triton)


def _triton(*_) -> str:
    # No Mock, since torch.compile reads what it calls.
    return "triton"
