"""Swapping torch's recurrent and attention modules for seqcore's inside a model, and back."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn as torch_nn
from torch.nn.utils import parametrize

from . import nn
from .backends import check_backend
from .errors import InvalidInput
from .integrations import torchrl, transformers

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention")
OURS = {getattr(torch_nn, name): getattr(nn, name) for name in NAMES}
TORCHS = {ours: theirs for theirs, ours in OURS.items()} | torchrl.TORCHS

# What torch's classes lack, by the attribute that says so, and the value of it that asks for nothing.
BEYOND_TORCH = {
    "blocks": 1, "grad_clip": None, "recompute": False, "locked": False, "zoneout": 0.0, "rotary": None, "alibi": False,
}  # fmt: skip
# Where a TransformerEncoder keeps that it made nested tensors before its attention became ours.
NESTED = "_seqcore_made_nested_tensors"

ADVICE = (
    "Not seen here: scaled_dot_product_attention called as a function. Put `with seqcore.replace_sdpa():` around the "
    "forward."
)

Filter = Callable[[str, torch_nn.Module], bool]


@dataclass
class Report:
    """What :func:`replace` or :func:`restore` did: by the name of each module in the model, "" being the model itself.

    ``swapped`` says what became what, ``skipped`` why nothing did; all other modules are in neither. ``print`` it.
    """

    action: str
    swapped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    advice: str = ""

    def __str__(self) -> str:
        lines = [f"seqcore.{self.action}: {len(self.swapped)} swapped, {len(self.skipped)} skipped"]
        width = max((len(name or "(model)") for name in (*self.swapped, *self.skipped)), default=0)
        for mark, found in (("+", self.swapped), ("-", self.skipped)):
            lines += [f"  {mark} {name or '(model)':<{width}}  {text}" for name, text in found.items()]
        return "\n".join([*lines, *([self.advice] if self.advice else [])])


def replace(model: torch_nn.Module, filter_fn: Filter | None = None, *, backend: str | None = None) -> Report:
    """Make every RNN, GRU, LSTM, their Cells and MultiheadAttention of torch.nn in ``model`` seqcore's, in place.

    Parameters, buffers, hooks and ``state_dict`` stay the very same, so an optimizer goes on. Parametrized modules stay
    parametrized. A transformers model also gets seqcore's attention, by its ``set_attn_implementation``. Skipped, with
    the reason, are classes derived from torch's, which may do something else; scripted, quantized and sharded modules.

    Args:
        model: searched with all its modules; may itself be one of them, or a compiled model, which compiles anew.
        filter_fn: gets name and module of each candidate; False leaves it alone, and out of the report.
        backend: "triton", "aten", "reference" or "auto" for all that is swapped; None follows ``seqcore.use_backend``.

    Returns:
        What was swapped, and what was skipped and why.

    Raises:
        InvalidInput: if ``model`` is no module or ``backend`` unknown; nothing is swapped then.
    """
    if backend is not None:
        check_backend(backend)
    report = Report("replace", advice=ADVICE)
    for name, module, also in list(_chosen("replace", model, filter_fn, _is_theirs, report)):
        kind = parametrize.type_before_parametrizations(module)
        ours = torchrl.class_for(OURS.get(kind, kind), name, model)
        if kind in TORCHS and (ours is not kind or backend not in (None, module.backend)):
            # Ours already, but not in TorchRL's form, or on another backend.
            report.swapped[name] = f"{_title(kind)} -> {_title(ours)}, backend {backend or module.backend}{also}"
        elif reason := _why_not(module, kind, OURS) or _own_options(module):
            report.skipped[name] = reason
            continue
        else:
            report.swapped[name] = f"{_title(kind)} -> {_title(ours)}{also}"
        if ours is not kind:
            _assign_class(module, ours)
        if backend is not None:
            module.backend = backend
    _stop_nested_tensors(model, report)
    if _may_hold_transformers():
        switched = len(report.swapped)
        transformers.switch(model, filter_fn or _all, backend, report.swapped, report.skipped)
        report.advice = ADVICE if switched == len(report.swapped) else ""
    _forget_compiled(report)
    return report


def restore(model: torch_nn.Module, filter_fn: Filter | None = None) -> Report:
    """Make every module of ``model`` that is seqcore's, and that torch.nn can represent, torch's, in place.

    Undoes :func:`replace`, and goes further: modules made as seqcore's become torch's too, for exporters and quantizers
    that know only those. Parameters, buffers, hooks and ``state_dict`` stay the very same; a ``backend``, which torch's
    classes do not have, is dropped. Skipped are modules that use options torch lacks.

    Args:
        model: searched with all its modules; may itself be one of them.
        filter_fn: gets name and module of each candidate; False leaves it alone, and out of the report.

    Returns:
        What was swapped, and what was skipped and why.

    Raises:
        InvalidInput: if ``model`` is no module.
    """
    report = Report("restore")
    for name, module, also in list(_chosen("restore", model, filter_fn, _is_ours, report)):
        kind = parametrize.type_before_parametrizations(module)
        if reason := _why_not(module, kind, TORCHS) or _beyond_torch(module):
            report.skipped[name] = reason
            continue
        for option in ("backend", *BEYOND_TORCH):
            vars(module).pop(option, None)
        _assign_class(module, TORCHS[kind])
        report.swapped[name] = f"{_title(kind)} -> {_title(TORCHS[kind])}{also}"
    _allow_nested_tensors(model, report)
    if _may_hold_transformers():
        transformers.switch_back(model, filter_fn or _all, report.swapped, report.skipped)
    _forget_compiled(report)
    return report


def _may_hold_transformers() -> bool:
    """Whether there can be a model of transformers, which takes more than a second to import what makes them."""
    return "transformers.modeling_utils" in sys.modules


def _all(name: str, module: torch_nn.Module) -> bool:
    return True


def _chosen(
    action: str,
    model: torch_nn.Module,
    filter_fn: Filter | None,
    is_candidate: Callable[[torch_nn.Module], bool],
    report: Report,
) -> Iterator[tuple[str, torch_nn.Module, str]]:
    """Each candidate once, with its first name and a remark on the others."""
    if not isinstance(model, torch_nn.Module):
        raise InvalidInput(f"seqcore.{action}: model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise InvalidInput(
            f"seqcore.{action}: filter_fn must be a function of a name and a module, or None, got "
            f"{type(filter_fn).__name__}"
        )
    places: dict[torch_nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_candidate(module):
            places.setdefault(module, []).append(name)
    for module, names in places.items():
        left = [name for name in names if filter_fn is not None and not filter_fn(name, module)]
        also = f", also as {', '.join(names[1:])}" if names[1:] else ""
        if not left:
            yield names[0], module, also
        elif len(left) < len(names):
            report.skipped[names[0]] = f"stands in several places{also}; filter_fn leaves {', '.join(left)} alone"


def _is_ours(module: torch_nn.Module) -> bool:
    return isinstance(module, tuple(TORCHS))


def _is_theirs(module: torch_nn.Module) -> bool:
    """Whether one would ask what became of ``module``: all that recurs, and attention, also if it cannot be swapped."""
    kinds = (torch_nn.RNNBase, torch_nn.RNNCellBase, torch_nn.MultiheadAttention)
    return isinstance(module, kinds) or _scripted(module) or _quantized(module)


def _scripted(module: torch_nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", None) in NAMES


def _quantized(module: torch_nn.Module) -> bool:
    place = type(module).__module__
    return place.startswith("torch.ao.nn.") and ".quantized." in place and type(module).__name__ in NAMES


def _why_not(module: torch_nn.Module, kind: type, table: dict[type, type]) -> str:
    """Why ``module``, of class ``kind`` but for parametrizations, does not get the class in ``table``, or ""."""
    title = _title(kind)
    if kind in table:
        if "forward" in vars(module):
            return f"{title} with a forward of its instance's own, which a swap would not reach; take it off first"
        return ""
    if kind in TORCHS:
        return f"{title} already"
    if _scripted(module):
        return f"scripted {module.original_name}: its code is fixed; replace first, then compile"
    if _quantized(module):
        return f"{title}: quantized weights, for which there is no kernel"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        action = "replace" if table is OURS else "restore"
        return f"{title}: sharded, with a class made for that; call seqcore.{action} first, then fully_shard"
    if kind in (torch_nn.RNNBase, torch_nn.RNNCellBase):
        return f"{title}: the base of several kinds, itself none"
    return f"{title}: derived from {_title(kind.__bases__[0])}, and may do something of its own"


def _own_options(module: torch_nn.Module) -> str:
    """Why a module of torch's that has attributes of these names does not get a class to which they are options."""
    taken = [name for name in ("backend", *BEYOND_TORCH) if name in vars(module)]
    return f"has attributes that would be options of ours: {', '.join(taken)}; rename them" if taken else ""


def _beyond_torch(module: torch_nn.Module) -> str:
    options = {name: getattr(module, name, plain) for name, plain in BEYOND_TORCH.items()}
    # What asks for nothing in another way.
    if isinstance(options["zoneout"], (tuple, list)) and not any(options["zoneout"]):
        options["zoneout"] = BEYOND_TORCH["zoneout"]
    if options["locked"] and not (module.dropout and module.num_layers > 1):
        options["locked"] = BEYOND_TORCH["locked"]
    used = [f"{name}={value}" for name, value in options.items() if value != BEYOND_TORCH[name]]
    return f"uses what torch's class lacks: {', '.join(used)}" if used else ""


def _title(kind: type) -> str:
    """``kind`` by the name it is imported by."""
    place = next((p for p in ("torch.nn", "seqcore.nn") if kind.__module__.startswith(f"{p}.")), kind.__module__)
    return f"{place}.{kind.__name__}"


def _assign_class(module: torch_nn.Module, kind: type) -> None:
    if parametrize.is_parametrized(module):
        # torch made a class for this module alone, which holds a property for each parametrized tensor.
        made = {name: value for name, value in vars(type(module)).items() if name not in ("__module__", "__doc__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), made)
    module.__class__ = kind


def _forget_compiled(report: Report) -> None:
    """Before torch 2.13 compiled code does not see that a module of torch.nn has another class by now."""
    if report.swapped and torch.__version__ < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _encoders(model: torch_nn.Module) -> Iterator[tuple[str, torch_nn.TransformerEncoder, bool]]:
    """Each encoder's name, itself, and whether attention in its layers is ours, and not torch's by name."""
    for name, module in model.named_modules():
        if isinstance(module, torch_nn.TransformerEncoder):
            attentions = [inner for inner in module.layers.modules() if isinstance(inner, nn.MultiheadAttention)]
            yield name, module, any(inner.backend != "aten" for inner in attentions)


def _stop_nested_tensors(model: torch_nn.Module, report: Report) -> None:
    """An encoder decides when it is made whether to nest padded input in evaluation, which our attention refuses."""
    for name, encoder, has_ours in _encoders(model):
        if has_ours and getattr(encoder, "use_nested_tensor", False):
            encoder.use_nested_tensor = False
            setattr(encoder, NESTED, True)
            report.swapped[name] = "use_nested_tensor: True -> False; in evaluation padding is no longer zeros"


def _allow_nested_tensors(model: torch_nn.Module, report: Report) -> None:
    for name, encoder, has_ours in _encoders(model):
        if not has_ours and vars(encoder).pop(NESTED, False):
            encoder.use_nested_tensor = True
            report.swapped[name] = "use_nested_tensor: False -> True"
