"""What each backend can do here, and why not; and the choice between them.

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

from .devices import product_parts
from .errors import InvalidInput, UnsupportedInput
from .kernels import tuning
from .kernels.recurrence import plan
from .kernels.tuning import INTERPRETER, Device

BACKENDS = ("auto", "triton", "aten", "reference")

_ENVIRONMENT = os.environ.get("SEQCORE_BACKEND") or "auto"

CPU = "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

# What an operation may be asked for beyond its plain form, and which backend serves it. The reference serves all.
TRITON_FEATURES = {
    "recurrence": {
        "packed input", "lengths", "reset", "proj_size", "blocks", "grad_clip", "recompute", "return_cells",
        "a cell of one's own", "a cell without reference_backward",
    },
    "attention": {
        "causal top_left", "causal lower_right", "mask", "mask with causal", "mask with gradient", "grouped heads",
        "log-sum-exp", "weights", "dropout", "dropout_seed", "window", "alibi_slopes", "sinks", "query_lengths",
        "key_lengths", "cu_seqlens_q", "softcap", "scale that is not positive", "float32 mask beside half queries",
    },
}
ATEN_FEATURES = {
    "recurrence": {"packed input", "proj_size"},
    "attention": {"causal top_left", "mask", "mask with gradient", "grouped heads", "dropout"},
}


@dataclass(frozen=True)
class Request:
    """One call, as far as the choice of a backend needs to know it.

    ``family`` is "recurrence" or "attention", ``operation`` the function's name, ``features`` the names (keys of the
    tables above) of what it asks beyond the plain operation, ``head_dim`` the larger of attention's two, ``shape``
    what a recurrence's plan depends on (None in a compiled graph, where sizes may have no values); ``sharded`` if
    there are DTensors among the inputs.
    """

    family: str
    operation: str
    device: Device
    dtype: torch.dtype
    features: tuple[str, ...] = ()
    head_dim: int = 0
    shape: plan.Shape | None = None
    transformed: bool = False
    sharded: bool = False


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
            *_plans(request),
            *(
                f"  {'->' if name == self.chosen else '  '} {name:<9} {self.notes[name]}"
                for name in ("triton", "aten", "reference")
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
    if name not in BACKENDS:
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


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is under way, through which no opaque operator can pass."""
    # Dynamo can trace this; neither a comparison of levels with None nor the stack's depth can it in every torch.
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return True
    if torch.compiler.is_compiling():
        return False
    from torch.autograd import forward_ad

    return forward_ad._current_level >= 0


def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _recording() -> bool:
    """Whether torch.jit or the exporter to ONNX records operators, neither of which can hold ours."""
    return torch.jit.is_tracing() or _to_onnx()


def _missing(request: Request, served: dict[str, set[str]]) -> list[str]:
    return [feature for feature in request.features if feature not in served[request.family]]


def _has_plan(request: Request) -> bool:
    return request.shape is not None and request.device.arch.startswith(("sm_", "gfx", INTERPRETER))


def _shapes(request: Request) -> tuple[plan.Shape, plan.Shape]:
    """The shapes of forward and backward on the request's device."""
    parts = product_parts(request.dtype, request.device.arch)
    return replace(request.shape, parts=parts), replace(request.shape, parts=parts, backward=True)


def _plans(request: Request) -> list[str]:
    """How the kernels would run a recurrence, a line a direction of the computation."""
    if not _has_plan(request) or request.shape.batch == 0:
        return []
    try:
        forward, backward = (plan.make(shape, request.device) for shape in _shapes(request))
    except plan.NoPlan:
        return []
    return [f"     forward   {forward}", f"     backward  {backward}"]


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0


def why_not_triton(request: Request) -> list[str]:
    """Every reason why seqcore's kernels cannot serve ``request``; none if they can."""
    reasons = [f"no kernel has {feature} yet" for feature in _missing(request, TRITON_FEATURES)]
    arch = request.device.arch
    if arch == INTERPRETER:
        if request.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter miscomputes bfloat16 (triton issue 11584); use float32 or float16")
    elif arch.startswith("sm_"):
        if _arch_number(arch) < 80:
            reasons.append(f"needs compute capability 8.0 or newer, got {arch}")
    elif not arch.startswith("gfx"):
        reasons.append(
            f"needs a GPU, got {arch} tensors; to interpret the kernels on a CPU, for tests, set TRITON_INTERPRET=1 "
            "before seqcore is imported"
        )
    if request.dtype not in KERNEL_DTYPES:
        reasons.append(f"needs float32, float16 or bfloat16, got {request.dtype}")
    if _has_plan(request) and request.shape.batch:
        try:
            for shape in _shapes(request):
                plan.make(shape, request.device)
        except plan.NoPlan as error:
            reasons.append(str(error))
    if request.head_dim > MAX_HEAD_DIM:
        reasons.append(f"needs head dims up to {MAX_HEAD_DIM}, got {request.head_dim}")
    if request.transformed:
        reasons.append("torch.func transforms and forward-mode AD cannot pass through a kernel")
    if _recording():
        reasons.append("TorchScript and ONNX cannot hold a kernel")
    return reasons


def why_not_aten(request: Request) -> list[str]:
    """Every reason why torch's own operator cannot serve ``request``; none if it can."""
    reasons = [f"torch's {request.operation} has no {feature}" for feature in _missing(request, ATEN_FEATURES)]
    if request.sharded and request.family == "recurrence":
        reasons.append("torch's recurrences take no DTensors")
    if _to_onnx() and "proj_size" in request.features:
        reasons.append("torch exports it to ONNX as an LSTM without its projection")
    return reasons


def why_not_reference(request: Request) -> list[str]:
    """Why plain PyTorch cannot serve ``request``; it can nearly always."""
    return ["tensors that it makes for itself do not mix with DTensors"] if request.sharded else []


def _why_not_operator(request: Request) -> list[str]:
    """As ``why_not_triton``, but for the operator in a compiled graph, which on a CPU runs the reference's formulas."""
    if request.device.arch in (CPU, INTERPRETER):
        reasons = [f"no kernel has {feature} yet" for feature in _missing(request, TRITON_FEATURES)]
        if "a cell without reference_backward" in request.features:
            reasons.append("on a CPU the operator runs the cell's reference_backward, and it has none")
        return reasons
    return why_not_triton(request)


def check_operator(request: Request) -> None:
    """Raise UnsupportedInput if seqcore's own operator cannot serve ``request``, whatever other backends can."""
    if reasons := _why_not_operator(request):
        raise UnsupportedInput(f"seqcore's operator cannot serve this {request.operation}: {'; '.join(reasons)}")


_WHY_NOT = {"triton": why_not_triton, "aten": why_not_aten, "reference": why_not_reference}


def _automatic(request: Request) -> str:
    if request.transformed:
        return "reference"
    if (torch.compiler.is_compiling() and not _recording()) or request.sharded:
        # torch's own recurrences unroll over time when compiled; ours is one node of the graph. And only operators of
        # ours know how to divide among processes.
        if not _why_not_operator(request):
            return "triton"
    elif request.device.arch not in (CPU, INTERPRETER) and not why_not_triton(request):
        if why_not_aten(request) or tuning.is_no_slower(request.device.arch, request.operation):
            return "triton"
    if not why_not_aten(request):
        return "aten"
    if reasons := why_not_reference(request):
        raise UnsupportedInput(
            f"no backend can serve this {request.operation}: triton: {'; '.join(why_not_triton(request))}. aten: "
            f"{'; '.join(why_not_aten(request))}. reference: {'; '.join(reasons)}. Pass DTensor.full_tensor() of each."
        )
    return "reference"


def _notes(request: Request, chosen: str | None, automatic: bool) -> dict[str, str]:
    triton, aten = "; ".join(why_not_triton(request)), "; ".join(why_not_aten(request))
    if not triton:
        triton = "can serve"
        if automatic and request.device.arch == INTERPRETER:
            triton += ", interpreted, but only when asked for by name"
        elif not tuning.is_measured(request.device.arch):
            triton += f", unmeasured here: no table was measured on {request.device.arch}"
    return {
        "triton": triton if triton != "can serve" or chosen == "triton" else "can serve; not known to be faster here",
        "aten": aten or "can serve",
        "reference": "; ".join(why_not_reference(request)) or "serves everything, slowly",
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
    reasons = _WHY_NOT[asked](request)
    if reasons:
        others = [
            f"{name}: {'; '.join(why(request)) or 'can'}"
            for name, why in _WHY_NOT.items()
            if name != asked
        ]
        raise UnsupportedInput(
            f"backend {asked!r} cannot serve this {request.operation}: {'; '.join(reasons)}. "
            f"Other backends: {'. '.join(others)}. Pass backend='auto' to take the best that can."
        )
    return asked


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
    """
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
