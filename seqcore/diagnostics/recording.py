"""Following a model's states while it runs: which tensors stand at which time step, under which name."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .. import nn as ours
from ..errors import InvalidInput
from .magnitude import row_norms
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


class Recorder:
    """Gathers ``series`` by name while the hooks of ``following`` are in place and it is ``on``."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.skipped: dict[str, str] = {}
        self.on = True
        self._watched: dict[str, list[tuple[Tensor, ...]]] = {}
        self._dims: dict[str, int] = {}
        self._sequences: dict[str, int] = {}

    def add(self, name: str, letter: str, pieces: list[Piece], reverse: bool = False) -> None:
        if self.on:
            self.series.setdefault(name, Series(letter, reverse)).pieces.extend(pieces)

    def attach(self, name: str, module: nn.Module) -> contextlib.AbstractContextManager | None:
        """What follows ``module`` while it is entered; None if that needs nothing."""
        if isinstance(module, nn.RNNBase):
            if type(module).forward in KNOWN and "forward" not in vars(module):
                return _replaced_forward(module, unrolled(module, name, partial(self._begin, name, module)))
            self.skipped[name] = (
                f"{type(module).__name__} has a forward of its own, which is not gone through step by step; name it in "
                "watch= to follow its output"
            )
        elif isinstance(module, nn.MultiheadAttention):
            return _removed(module.register_forward_pre_hook(partial(self._see_query, name), with_kwargs=True))
        elif isinstance(module, nn.RNNCellBase):
            return self.watch(name, module, None)
        return None

    def watch(self, name: str, module: nn.Module, dim: int | None) -> contextlib.AbstractContextManager:
        """Follow what ``module`` puts out, a step a call; or along ``dim``, if given, should it be called once."""
        if dim is not None:
            self._dims[name] = dim
            self.skipped[name] = "was not called"
        return _removed(module.register_forward_hook(partial(self._see_output, name)))

    def _call(self, name: str, anew: bool) -> str:
        """What tells the sequences of a module apart by name: nothing for its first one, "#2" for the second."""
        count = self._sequences.get(name, 0)
        self._sequences[name] = count = count + 1 if anew else max(count, 1)
        return "" if count == 1 else f"#{count}"

    def _begin(self, name: str, module: nn.RNNBase, anew: bool) -> See:
        return partial(self._see_layer, name, module, self._call(name, anew))

    def _see_layer(
        self, name: str, module: nn.RNNBase, call: str, layer: int, direction: int, steps: list[Step]
    ) -> None:
        place = f".{layer}" * (module.num_layers > 1) + ".reverse" * direction + call
        for part, letter in enumerate(STATES[: len(steps[0].state)]):
            pieces = [Piece(step.state[part], None, step.valid) for step in steps]
            self.add(joined(name, letter) + place, letter, pieces, reverse=bool(direction))

    def _see_query(self, name: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict):
        query = args[0] if args else kwargs.get("query")
        if not isinstance(query, Tensor) or query.is_nested:
            return None
        tensor = kept(query)
        # Self-attention must go on to see that its three inputs are one.
        same = lambda value: tensor if value is query else value
        time = time_dim(query, module.batch_first)
        # One position after another is one sequence that is being generated.
        call = self._call(name, anew=query.shape[time] > 1)
        self.add(joined(name, "input") + call, "x", [Piece(tensor, time)])
        return tuple(map(same, args)), {key: same(value) for key, value in kwargs.items()}

    def _see_output(self, name: str, module: nn.Module, args: tuple, output):
        found: list[Tensor] = []

        def through(value):
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append(kept(value))
                return found[-1]
            if type(value) in (tuple, list):
                return type(value)(through(part) for part in value)
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*(through(part) for part in value))
            return value

        output = through(output)
        if self.on and found:
            self._watched.setdefault(name, []).append(tuple(found))
        elif self.on:
            self.skipped[name] = f"puts out {type(output).__name__}, in which there is no floating-point Tensor"
        return output

    def finish(self) -> None:
        """Decide, now that they are counted, what the calls of watched modules were, and record no more."""
        for name, calls in self._watched.items():
            self.skipped.pop(name, None)
            if name in self._dims and len(calls) == 1:
                tensor = calls[0][0]
                time = min(self._dims[name], tensor.dim() - 1) if tensor.dim() else None
                self.add(joined(name, "h"), "h", [Piece(tensor, time)])
                continue
            for call in calls:
                for part, tensor in enumerate(call):
                    letter = STATES[part] if part < len(STATES) else f"s{part}"
                    self.add(joined(name, letter), letter, [Piece(tensor)])
        self.on = False


def joined(name: str, what: str) -> str:
    return f"{name}.{what}" if name else what


@contextlib.contextmanager
def following(model: nn.Module, watch: Mapping[str, int | None], recorder: Recorder) -> Iterator[None]:
    """Within, ``model`` shows ``recorder`` its states; afterwards, whatever happens, it is as it was."""
    before = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            # torch.compile puts modules into others with this one attribute.
            context = recorder.attach(".".join(part for part in name.split(".") if part != "_orig_mod"), module)
            if context is not None:
                stack.enter_context(context)
        for name, dim in watch.items():
            module = _submodule(model, name)
            dim = int(getattr(module, "batch_first", False)) if dim is None else dim
            if not isinstance(module, (nn.RNNCellBase, nn.MultiheadAttention)) and not _is_followed(module):
                stack.enter_context(recorder.watch(name, module, dim))
        # Else torch's Transformer layers, with nothing to train, pass their attention by.
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _is_followed(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and type(module).forward in KNOWN


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except (AttributeError, TypeError) as error:
        known = ", ".join(found for found, _ in model.named_modules() if found) or "none"
        raise InvalidInput(
            f"gradient_flow: watch must name submodules by their dotted names, got {name!r}; there are {known}"
        ) from error


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
