"""Calls of torch's ``scaled_dot_product_attention`` served by seqcore's, inside a context and without patching."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import functional
from .backends import check_backend, resolve
from .errors import InvalidInput


class _Local(threading.local):
    # The instance's own, so that compiled code is guarded by it; see seqcore.backends.
    def __init__(self) -> None:
        self.serving = False


_local = _Local()


class _Serve(TorchFunctionMode):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # Torch takes this mode off while it runs here, but not those around it: the backend "aten" calls func again.
        if func is not F.scaled_dot_product_attention or _local.serving:
            return func(*args, **kwargs)
        _local.serving = True
        try:
            return functional.scaled_dot_product_attention(*args, **kwargs, backend=self.backend)
        except InvalidInput:
            if resolve(self.backend) != "auto":
                raise
            # What we refuse and torch may know, such as nested tensors; if it does not, the error is torch's own.
            return func(*args, **kwargs)
        finally:
            _local.serving = False


@contextlib.contextmanager
def replace_sdpa(backend: str | None = None) -> Iterator[None]:
    """Within, ``torch.nn.functional.scaled_dot_product_attention`` is seqcore's, for all code in this thread. Nests.

    A ``torch.overrides.TorchFunctionMode``: nothing is patched, and code outside the ``with`` block is not touched.
    Backward follows the forward that ran inside. Not seen are calls from C++ and from inside
    ``torch.nn.functional.multi_head_attention_forward``: for ``torch.nn.MultiheadAttention`` there is
    :func:`seqcore.replace`. Nor are those from ``torch.utils.checkpoint``, which runs forward again within backward:
    enter the context inside the function it is given, or by its ``context_fn``.

    Args:
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``. Under "auto" torch
            itself serves what :func:`seqcore.functional.scaled_dot_product_attention` refuses, such as nested tensors.

    Raises:
        InvalidInput: if ``backend`` is none of these; from calls inside that seqcore refuses, under a backend named.
        UnsupportedInput: from calls inside that the backend named cannot serve.

    Source: https://docs.pytorch.org/docs/stable/torch.overrides.html
    """
    if backend is not None:
        check_backend(backend)
    with _Serve(backend):
        yield
