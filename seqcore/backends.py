"""Which backend is asked for, and the choice between them; what each can do is in ``capabilities.py``.

- ``"triton"``: seqcore's own kernels, on a GPU, or interpreted on a CPU for testing (``TRITON_INTERPRET=1``).
- ``"aten"``: torch's own operators: cuDNN, SDPA, oneDNN.
- ``"reference"``: plain PyTorch, differentiable any number of times, on any device, in any float dtype.
- ``"auto"``: the first that serves, fastest first as far as measured.

An argument ``backend=`` beats :func:`use_backend`, which beats the variable ``SEQCORE_BACKEND``, which beats
``"auto"``. A backend asked for by name never gives way to another: it serves or raises ``UnsupportedInput``.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .capabilities import CPU, Request, plans, recording, why_not, why_not_operator
from .errors import InvalidInput, UnsupportedInput
from .kernels import tuning
from .kernels.tuning import INTERPRETER, Device

NAMED = ("triton", "aten", "reference")
BACKENDS = ("auto", *NAMED)

_ENVIRONMENT = os.environ.get("SEQCORE_BACKEND") or "auto"


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a request, and for each other one why it does not."""

    request: Request
    asked: str
    chosen: str | None
    notes: dict[str, str]

    def __str__(self) -> str:
        request = self.request
        asked_for = ", ".join(request.features) or "no extras"
        lines = [
            f"{request.operation} on {request.device.arch} in {request.dtype}, {asked_for}; asked for {self.asked!r}",
            *plans(request),
            *(
                f"  {'->' if name == self.chosen else '  '} {name:<9} {self.notes[name]}"
                for name in NAMED
            ),
        ]
        if self.chosen is None:
            lines.append("  raises UnsupportedInput")
        return "\n".join(lines)


class _Local(threading.local):
    # A ContextVar would break torch.compile(fullgraph=True); a thread-local tuple does not. It must be the instance's
    # own: a default of the class would not be guarded, and compiled code would outlive a change of backend.
    def __init__(self) -> None:
        self.stack: tuple[str, ...] = ()
        self.explanations: list[Explanation] | None = None
        self.pretend: Device | None = None


_local = _Local()


def check_backend(name: str, origin: str = "backend") -> str:
    """``name`` if it is a backend's; ``origin`` tells where it came from.

    Raises:
        InvalidInput: otherwise.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise InvalidInput(f"unknown {origin}: got {name!r}, allowed are {', '.join(map(repr, BACKENDS))}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use ``name`` within the ``with`` block, in this thread, wherever no ``backend=`` is given. Nests.

    The choice is made in forward; backward follows it even outside the block. But ``torch.utils.checkpoint`` runs
    forward again where backward runs: inside it, name the backend by ``backend=``.

    Raises:
        InvalidInput: if ``name`` is not "auto", "triton", "aten" or "reference".
    """
    check_backend(name)
    before = _local.stack
    _local.stack = (*before, name)
    try:
        yield
    finally:
        _local.stack = before


def resolve(backend: str | None) -> str:
    """The backend in force: the argument, else the innermost context, else ``SEQCORE_BACKEND``, else "auto"."""
    if backend is not None:
        return check_backend(backend)
    return _local.stack[-1] if _local.stack else check_backend(_ENVIRONMENT, "SEQCORE_BACKEND")


def check_operator(request: Request) -> None:
    """Raise UnsupportedInput if seqcore's own operator cannot serve ``request``, whatever other backends can."""
    if reasons := why_not_operator(request):
        raise UnsupportedInput(f"seqcore's operator cannot serve this {request.operation}: {'; '.join(reasons)}")


def _automatic(request: Request) -> str:
    if request.transformed:
        return "reference"
    if (torch.compiler.is_compiling() and not recording()) or request.sharded:
        # torch's own recurrences unroll over time when compiled; ours is one node of the graph. And only operators of
        # ours know how to divide among processes.
        if not why_not_operator(request):
            return "triton"
    elif request.device.arch not in (CPU, INTERPRETER) and not why_not("triton", request):
        if why_not("aten", request) or tuning.is_no_slower(request.device.arch, request.operation):
            return "triton"
    for name in ("aten", "reference"):
        if not why_not(name, request):
            return name
    raise UnsupportedInput(f"no backend can serve this {request.operation}. {_others(request, None)}.")


def _notes(request: Request, chosen: str | None, automatic: bool) -> dict[str, str]:
    triton, aten, reference = ("; ".join(why_not(name, request)) for name in NAMED)
    if not triton:
        triton = "can serve"
        if automatic and request.device.arch == INTERPRETER:
            triton += ", interpreted, but only when asked for by name"
        elif not tuning.is_measured(request.device.arch):
            triton += f", unmeasured here: no table was measured on {request.device.arch}"
    return {
        "triton": triton if triton != "can serve" or chosen == "triton" else "can serve; not known to be faster here",
        "aten": aten or "can serve",
        "reference": reference or "serves everything, slowly",
    }


def choose(request: Request, backend: str | None) -> str:
    """The backend that serves ``request``: "triton", "aten" or "reference".

    Raises:
        UnsupportedInput: if ``backend`` (or the one in force) was named and cannot serve it.
    """
    asked = resolve(backend)
    if torch.compiler.is_compiling():
        return _decide(request, asked)
    if _local.explanations is not None:
        subject = request if _local.pretend is None else _on(request, _local.pretend)
        try:
            chosen = _decide(subject, asked)
        except UnsupportedInput:
            chosen = None
        _local.explanations.append(Explanation(subject, asked, chosen, _notes(subject, chosen, asked == "auto")))
        return chosen if chosen and _local.pretend is None else "reference"
    return _decide(request, asked)


def _on(request: Request, device: Device) -> Request:
    return replace(request, device=device)


def _decide(request: Request, asked: str) -> str:
    if asked == "auto":
        return _automatic(request)
    if reasons := why_not(asked, request):
        raise UnsupportedInput(
            f"backend {asked!r} cannot serve this {request.operation}: {'; '.join(reasons)}. "
            f"Other backends: {_others(request, asked)}. Pass backend='auto' to take the best that can."
        )
    return asked


def _others(request: Request, asked: str | None) -> str:
    return ". ".join(f"{name}: {'; '.join(why_not(name, request)) or 'can'}" for name in NAMED if name != asked)


def explain(
    function: Callable[..., Any], *inputs: Any, device: Device | None = None, **keywords: Any
) -> "list[Explanation]":
    """Which backend serves each seqcore call that ``function(*inputs, **keywords)`` makes, and why not the others.

    The call is really made, with the backends it would take, and its result thrown away; where a backend named by
    the call cannot serve, the reference steps in so that later calls are explained too. ``print`` what is returned.

    Args:
        function: a module of ``seqcore.nn``, a function of ``seqcore.functional``, or anything that calls them.
        inputs, keywords: its arguments.
        device: ask for this device instead of the tensors' own, e.g. ``Device("sm_90")`` where no GPU is.

    Returns:
        A printable list with one :class:`Explanation` a call.

    Raises:
        InvalidInput: if ``function`` cannot be called, or ``device`` is no Device; and what the call raises.
    """
    if not callable(function):
        raise InvalidInput(f"explain: function must be callable, got {type(function).__name__}; inputs come after it")
    if device is not None and not isinstance(device, Device):
        raise InvalidInput(
            f"explain: device must be a seqcore.Device, such as Device('sm_90'), or None for the tensors' own, got "
            f"{type(device).__name__}"
        )
    before = _local.explanations, _local.pretend
    _local.explanations, _local.pretend = explanations, _ = _Explanations(), device
    try:
        function(*inputs, **keywords)
    finally:
        _local.explanations, _local.pretend = before
    return explanations


class _Explanations(list):
    def __str__(self) -> str:
        return "\n".join(map(str, self)) or (
            "no seqcore operation was called; with backend='aten', MultiheadAttention is torch's own from end to end"
        )
