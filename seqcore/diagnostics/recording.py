"""Following a model's states while it runs: which tensors stand at which time step, under which name."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import nn as ours
from ..errors import InvalidInput
from .magnitude import row_norms
from .sequences import Sequences
from .unrolled import See, Step, kept, unrolled

# The forwards that ``unrolled`` does the same as; a class with another one may do more.
KNOWN = {getattr(library, kind).forward for library in (nn, ours) for kind in ("RNN", "GRU", "LSTM")}
STATES = ("h", "c")


@dataclass(frozen=True)
class Piece:
    """Part of a series: one step's tensor, or, with ``time``, a tensor of many steps along that dimension."""

    tensor: Tensor
    time: int | None = None
    valid: Tensor | None = None  # [B] bool: the rows of a step that count

    @property
    def steps(self) -> int:
        return 1 if self.time is None else self.tensor.shape[self.time]

    def norms(self, gradient: Tensor | None) -> Tensor:
        """[steps] float64: the norm of ``gradient``, which is shaped like the tensor, None for zeros."""
        if gradient is None:
            return torch.zeros(self.steps, dtype=torch.float64)
        if self.valid is not None:
            gradient = torch.where(self.valid[:, None], gradient, 0)
        rows = gradient[None] if self.time is None else gradient.movedim(self.time, 0)
        return row_norms(rows.reshape(self.steps, -1))


@dataclass
class Series:
    """The states of one kind over time; ``letter`` is theirs in formulas."""

    letter: str
    reverse: bool = False
    pieces: list[Piece] = field(default_factory=list)

    @property
    def floor(self) -> float:
        """The largest norm of a step's gradient all of whose elements may be subnormal."""
        return max(
            torch.finfo(piece.tensor.dtype).tiny * math.sqrt(piece.tensor.numel() / max(piece.steps, 1))
            for piece in self.pieces
        )


def time_dim(tensor: Tensor, batch_first: bool) -> int:
    return 1 if batch_first and tensor.dim() > 2 else 0


def plain(module: nn.Module) -> bool:
    """Whether ``module`` is an RNN, GRU or LSTM with the forward of its kind, not one of its own."""
    return isinstance(module, nn.RNNBase) and type(module).forward in KNOWN and "forward" not in vars(module)


class Recorder:
    """Gathers ``series`` by name while the hooks of ``following`` are in place and it is ``on``."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.skipped: dict[str, str] = {}
        self.on = True
        self._watched: dict[str, list[list[Tensor]]] = {}
        self._dims: dict[str, int] = {}
        self._sequences: defaultdict[str, Sequences] = defaultdict(Sequences)
        self._input: tuple[Tensor, Tensor] | None = None  # recorded, handed to the model

    def add(self, name: str, letter: str, pieces: list[Piece], reverse: bool = False) -> None:
        if self.on:
            self.series.setdefault(name, Series(letter, reverse)).pieces.extend(pieces)

    def attach(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager | None:
        """What follows ``module`` while it is entered; None if that needs nothing."""
        if isinstance(module, nn.RNNBase):
            if plain(module):
                return _replaced_forward(module, unrolled(module, name, partial(self._begin, name, module)))
            self.skipped[name] = (
                f"{type(module).__name__} has a forward of its own, which is not gone through step by step; name it in "
                "watch= to follow its output"
            )
            see = lambda module, args: self._see_input(args[0] if args else None, module.batch_first)
            return _removed(module.register_forward_pre_hook(see))
        if isinstance(module, nn.MultiheadAttention):
            return _removed(module.register_forward_pre_hook(partial(self._see_query, name), with_kwargs=True))
        if isinstance(module, nn.RNNCellBase):
            return _removed(module.register_forward_hook(partial(self._see_cell, name), with_kwargs=True))
        return None

    def watch(self, name: str, module: nn.Module, dim: int) -> contextlib.AbstractContextManager:
        """Follow what ``module`` puts out, a step a call; or along ``dim`` should it be called once."""
        self._dims[name] = dim
        self.skipped[name] = "was not called"
        return _removed(module.register_forward_hook(partial(self._see_output, name)))

    def enter(self, x: Tensor, batch_first: bool | None) -> Tensor:
        """What to hand the model for its own input ``x``, followed if and when its dimension of time is known."""
        recorded = kept(x)
        self._input = recorded, recorded.clone()
        if batch_first is not None:
            self._see_input(self._input[1], batch_first)
        return self._input[1]

    def _see_input(self, value: Any, batch_first: bool) -> None:
        if self._input is not None and value is self._input[1] and "input" not in self.series:
            self.add("input", "x", [Piece(self._input[0], time_dim(value, batch_first))])

    def _begin(self, name: str, module: nn.RNNBase, input: Tensor, hx: Any) -> See:
        if not self.on:
            return lambda layer, direction, steps: None
        self._see_input(input, module.batch_first)
        return partial(self._see_layer, name, module, self._sequences[name].entered(_tensors(hx)))

    def _see_layer(
        self, name: str, module: nn.RNNBase, number: int, layer: int, direction: int, steps: list[Step]
    ) -> None:
        self._sequences[name].left(number, steps[0 if direction else -1].state)
        place = f".{layer}" * (module.num_layers > 1) + ".reverse" * direction + _suffix(number)
        for part, letter in enumerate(STATES[: len(steps[0].state)]):
            pieces = [Piece(step.state[part], None, step.valid) for step in steps]
            self.add(joined(name, letter) + place, letter, pieces, reverse=bool(direction))

    def _see_query(self, name: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict):
        query = args[0] if args else kwargs.get("query")
        if not isinstance(query, Tensor) or query.is_nested:
            return None
        recorded = kept(query)
        handed = recorded.clone()
        # Self-attention must go on to see that its three inputs are one.
        same = lambda value: handed if value is query else value
        for value in (*args, *kwargs.values()):
            self._see_input(value, module.batch_first)
        time, sequences = time_dim(query, module.batch_first), self._sequences[name]
        # One position after another is one sequence that is being generated.
        number = sequences.count if sequences.count and query.shape[time] == 1 else sequences.another()
        self.add(joined(name, "input") + _suffix(number), "x", [Piece(recorded, time)])
        return tuple(map(same, args)), {key: same(value) for key, value in kwargs.items()}

    def _see_cell(self, name: str, module: nn.RNNCellBase, args: tuple, kwargs: dict, output):
        handed, recorded = _shown(output)
        if self.on and recorded:
            given = _tensors([*args[1:], *(value for key, value in kwargs.items() if key != "input")])
            number = self._sequences[name].entered(given)
            self._sequences[name].left(number, recorded)
            self._add_step(name, recorded, _suffix(number))
        return handed

    def _see_output(self, name: str, module: nn.Module, args: tuple, output):
        handed, recorded = _shown(output)
        if self.on and recorded:
            self._watched.setdefault(name, []).append(recorded)
        elif self.on:
            self.skipped[name] = (
                f"puts out {type(output).__name__}, with no floating-point Tensor in it; looked into are tuples, lists "
                "and dicts"
            )
        return handed

    def _add_step(self, name: str, parts: list[Tensor], call: str = "") -> None:
        for part, tensor in enumerate(parts):
            letter = STATES[part] if part < len(STATES) else f"s{part}"
            self.add(joined(name, letter) + call, letter, [Piece(tensor)])

    def finish(self) -> None:
        """Decide, now that they are counted, what the calls of watched modules were, and record no more."""
        for name, calls in self._watched.items():
            self.skipped.pop(name, None)
            if len(calls) == 1:
                tensor = calls[0][0]
                self.add(joined(name, "h"), "h", [Piece(tensor, self._time(name, tensor))])
            else:
                for call in calls:
                    self._add_step(name, call)
        if self._input is not None and "input" not in self.series:
            self.skipped["input"] = (
                "which of its dimensions is time is not known: the model has no batch_first, and gives it, as it is, "
                "to no recurrence or attention"
            )
        self.on = False

    def _time(self, name: str, tensor: Tensor) -> int | None:
        dim = self._dims[name]
        if tensor.dim() and not -tensor.dim() <= dim < tensor.dim():
            raise InvalidInput(
                f"gradient_flow: watch must name a dimension of time that {name!r} puts out, got {dim} for "
                f"{list(tensor.shape)}; allowed are {-tensor.dim()} … {tensor.dim() - 1}, as watch={{{name!r}: 0}}"
            )
        return dim if tensor.dim() else None


def _suffix(number: int) -> str:
    """What tells the sequences of a module apart by name: nothing for its first one, "#2" for the second."""
    return "" if number == 1 else f"#{number}"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _shown(output: Any) -> tuple[Any, list[Tensor]]:
    """``output`` to hand on, and to record the floating-point Tensors in it.

    What is handed on is a copy, so that operations in place leave alone what is recorded.
    """
    recorded: list[Tensor] = []

    def through(value):
        if isinstance(value, Tensor) and value.is_floating_point():
            recorded.append(kept(value))
            return recorded[-1].clone()
        if type(value) in (tuple, list):
            return type(value)(through(part) for part in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(through(part) for part in value))
        if type(value) is dict:
            return {key: through(part) for key, part in value.items()}
        return value

    return through(output), recorded


def joined(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what


@contextlib.contextmanager
def following(model: nn.Module, watch: Mapping[str, int | None], recorder: Recorder) -> Iterator[None]:
    """Within, ``model`` shows ``recorder`` its states; afterwards, whatever happens, it is as it was."""
    watched = {name: (_submodule(model, name), _checked_dim(name, dim)) for name, dim in watch.items()}
    # Before their forwards are replaced.
    followed = {module for module in model.modules() if isinstance(module, nn.RNNCellBase) or plain(module)}
    before = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored_buffers(model))
        for name, module in model.named_modules():
            # torch.compile puts modules into others with this one attribute.
            context = recorder.attach(".".join(part for part in name.split(".") if part != "_orig_mod"), module)
            if context is not None:
                stack.enter_context(context)
        for name, (module, dim) in watched.items():
            dim = int(getattr(module, "batch_first", False)) if dim is None else dim
            if isinstance(module, nn.MultiheadAttention):
                recorder.skipped[joined(name, "h")] = (
                    "attention is followed by its input; watch the module around it for what it puts out"
                )
            elif module not in followed:
                stack.enter_context(recorder.watch(name, module, dim))
        # Else torch's Transformer layers, with nothing to train, pass their attention by.
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _checked_dim(name: str, dim: Any) -> int | None:
    if dim is not None and type(dim) is not int:
        raise InvalidInput(
            f"gradient_flow: watch must map {name!r} to the dimension of time, an int, got {dim!r}; leave it out for "
            "the first one"
        )
    return dim


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except (AttributeError, TypeError) as error:
        known = ", ".join(found for found, _ in model.named_modules() if found) or "none"
        raise InvalidInput(
            f"gradient_flow: watch must name submodules by their dotted names, got {name!r}; there are {known}"
        ) from error


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` may change its buffers, as BatchNorm does; afterwards they are as they were."""
    registered = [(module, dict(module._buffers)) for module in model.modules()]
    # Inference tensors cannot be changed out of inference mode.
    saved = [(b, b.detach().clone()) for b in model.buffers() if not (is_lazy(b) or b.is_inference())]
    try:
        yield
    finally:
        for module, buffers in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, values in saved:
                # Nor can expanded ones. Batch normalisation does not count its changes as versions.
                if buffer.layout != torch.strided or not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
