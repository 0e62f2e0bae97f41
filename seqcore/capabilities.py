"""What each backend can do, and every reason why it cannot serve a request."""

import sys
from dataclasses import dataclass, replace

import torch

from .devices import product_parts
from .kernels.recurrence import plan
from .kernels.tuning import INTERPRETER, Device
from .versions import why_no_triton

CPU = "cpu"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# AMD's with matrix cores and wavefronts of 64. Others do not get through Triton's compiler: tried with 3.7.1.
AMD = ("gfx90a", "gfx942", "gfx950")

# What an operation may be asked for beyond its plain form, and which backend serves it. The reference serves all.
TRITON_FEATURES = {
    "recurrence": {
        "packed input", "lengths", "reset", "proj_size", "blocks", "grad_clip", "recompute", "return_cells", "zoneout",
        "a cell of one's own", "a cell without reference_backward",
    },
    "attention": {
        "causal top_left", "causal lower_right", "mask", "mask with causal", "mask with gradient", "grouped heads",
        "log-sum-exp", "weights", "dropout", "dropout_seed", "window", "alibi_slopes", "sinks", "query_lengths",
        "key_lengths", "cu_seqlens_q", "softcap", "scale that is not positive", "mask of another dtype than queries",
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
    there are DTensors among the inputs, ``autocast`` if autocast takes a sequence's input to ``dtype``.
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
    autocast: bool = False


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
    """Whether torch exports to ONNX; not asked of a process that has not imported the exporter, which takes time."""
    return (torch.compiler.is_compiling() or "torch.onnx" in sys.modules) and torch.onnx.is_in_onnx_export()


def recording() -> bool:
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


def plans(request: Request) -> list[str]:
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


def _why_not_on(request: Request) -> list[str]:
    """Every reason why kernels cannot run where the request is."""
    arch = request.device.arch
    if arch != INTERPRETER and not arch.startswith(("sm_", "gfx")):
        return [
            f"needs a GPU, got {arch} tensors; to interpret the kernels on a CPU, for tests, set TRITON_INTERPRET=1 "
            "before seqcore is imported"
        ]
    reasons = []
    if arch == INTERPRETER and request.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter miscomputes bfloat16 (triton issue 11584); use float32 or float16")
    elif arch.startswith("sm_") and _arch_number(arch) < 80:
        reasons.append(f"needs compute capability 8.0 or newer, got {arch}")
    elif arch.startswith("gfx") and arch not in AMD:
        reasons.append(f"needs one of {', '.join(AMD)}, got {arch}")
    return reasons + why_no_triton()


def why_not_triton(request: Request) -> list[str]:
    """Every reason why seqcore's kernels cannot serve ``request``; none if they can."""
    reasons = [f"no kernel has {feature} yet" for feature in _missing(request, TRITON_FEATURES)]
    reasons += _why_not_on(request)
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
    if recording():
        reasons.append("TorchScript and ONNX cannot hold a kernel")
    return reasons


def why_not_aten(request: Request) -> list[str]:
    """Every reason why torch's own operator cannot serve ``request``; none if it can."""
    reasons = [f"torch's {request.operation} has no {feature}" for feature in _missing(request, ATEN_FEATURES)]
    if request.sharded and request.family == "recurrence":
        reasons.append("torch's recurrences take no DTensors")
    if _to_onnx() and "proj_size" in request.features:
        reasons.append("torch exports it to ONNX as an LSTM without its projection")
    if request.operation == "lstm" and _by_onednn_in_half(request):
        reasons.append("oneDNN, to which torch's autocast hands a CPU's LSTM, has none in float16 for many CPUs")
    return reasons


def _by_onednn_in_half(request: Request) -> bool:
    """Whether autocast takes a padded LSTM on a CPU to float16, for oneDNN; one in float16 torch runs itself."""
    if not request.autocast or request.dtype != torch.float16 or request.device.arch not in (CPU, INTERPRETER):
        return False
    if "packed input" in request.features or "proj_size" in request.features:
        return False
    # A switch that Dynamo cannot read.
    return torch.compiler.is_compiling() or (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def why_not_reference(request: Request) -> list[str]:
    """Why plain PyTorch cannot serve ``request``; it can nearly always."""
    return ["tensors that it makes for itself do not mix with DTensors"] if request.sharded else []


def why_not_operator(request: Request) -> list[str]:
    """As ``why_not_triton``, but for the operator in a compiled graph, which on a CPU runs the reference's formulas."""
    if request.device.arch in (CPU, INTERPRETER):
        reasons = [f"no kernel has {feature} yet" for feature in _missing(request, TRITON_FEATURES)]
        if request.device.arch == INTERPRETER:
            reasons += why_no_triton()
        if "a cell without reference_backward" in request.features:
            reasons.append("on a CPU the operator runs the cell's reference_backward, and it has none")
        return reasons
    return why_not_triton(request)


def why_not(backend: str, request: Request) -> list[str]:
    """Every reason why ``backend``, one that is named, cannot serve ``request``; none if it can."""
    return {"triton": why_not_triton, "aten": why_not_aten, "reference": why_not_reference}[backend](request)
