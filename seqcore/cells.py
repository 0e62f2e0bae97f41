"""What a recurrent cell is, by name: the built-in ones and those of your own, all through the same door."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import InvalidInput
from .reference import cells as plain

# More tiles than this no program holds at once.
MOST_GATES = 64

_registry: dict[str, "Cell"] = {}


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence, pointwise: each unit's new state from its gates and its own entering state.

    With x_t [B, I], h [B, H] and G gates, a step is

        x_gates = x_t W_ih^T + b_ih,   h_gates = h W_hh^T + b_hh     (the library's part, G tiles each)
        (new state), (saved) = step(x_gates, h_gates, state)         (the cell's)

    A cell is made of short functions on tuples of tiles; ``kernels/recurrence/cells.py`` and ``reference/cells.py``
    hold the built-in ones, and ``docs/write-a-cell.md`` takes you through one of your own. A unit may look at
    nothing but itself: what mixes units (a layer normalisation, say) has no place in a step.

    Args:
        name: what it is registered by. A later definition of the same name and origin replaces the earlier.
        gates: how many pre-activations a unit has; weights are [gates * H, …], one gate after the other.
        states: ("h",) or ("h", "c"); h is what is put out and multiplied with W_hh, c stays with the unit.
        step: Triton function, ``(x_gates, h_gates, state) -> (state, saved)``, on float32 tiles of any shape.
        step_backward: Triton function, ``(saved, state, new_state, dstate) -> (dx_gates, dh_gates, dstate)``: the
            gradients of both pre-activations, and of the entering state as far as it does not pass through W_hh. It
            must be linear in ``dstate``.
        reference: PyTorch function of the same contract as ``step``, differentiable, for any float dtype.
        reference_backward: PyTorch function of the same contract as ``step_backward``. Without one, a CPU takes the
            differentiable ``reference`` instead, also in compiled graphs.
        apart: whether ``dx_gates`` and ``dh_gates`` differ; if they never do, False saves a third of the writing.
        saves_output: whether ``saved`` is the new h alone, which then need not be stored twice.

    Raises:
        InvalidInput: if the name is taken, or ``reference`` does not take or return what it should.

    ``step`` and ``step_backward`` may be given as "module:function", to be imported at the first launch.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    step: Callable[..., Any] | str
    step_backward: Callable[..., Any] | str
    reference: Callable[..., Any]
    reference_backward: Callable[..., Any] | None = None
    apart: bool = True
    saves_output: bool = False
    saved: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidInput(f"cell: name must be a str, got {self.name!r}; it is what the cell is registered by")
        if not isinstance(self.states, tuple) or self.states not in (("h",), ("h", "c")):
            raise InvalidInput(f"cell {self.name!r}: states must be ('h',) or ('h', 'c'), got {self.states!r}")
        if not isinstance(self.gates, int) or isinstance(self.gates, bool) or not 1 <= self.gates <= MOST_GATES:
            raise InvalidInput(
                f"cell {self.name!r}: gates must be a positive integer, got {self.gates!r}; allowed are up to "
                f"{MOST_GATES}, of each of which a program holds a tile"
            )
        self._check_functions()
        before = _registry.get(self.name)
        if before is not None and before._origin != self._origin:
            raise InvalidInput(
                f"a cell named {self.name!r} exists already, from {before._origin}, got another from {self._origin}; "
                "choose another name"
            )
        object.__setattr__(self, "saved", self._count_saved())
        _registry[self.name] = self

    @property
    def has_c(self) -> bool:
        return len(self.states) == 2

    @property
    def extra(self) -> int:
        """How many tiles a step takes of each unit behind its gates in ``x_gates``, of no product and no gradient."""
        return 0

    @property
    def _origin(self) -> str:
        # A partial, or an object that is called, has no name of its own.
        named = self.reference if hasattr(self.reference, "__qualname__") else type(self.reference)
        return f"{named.__module__}.{named.__qualname__}"

    def _check_functions(self) -> None:
        for role in ("step", "step_backward", "reference", "reference_backward"):
            function = getattr(self, role)
            # Empty where no kernel is ever launched.
            parts = function.split(":") if role.startswith("step") and isinstance(function, str) else None
            named = parts == [""] or (parts is not None and len(parts) == 2 and all(parts))
            if not (callable(function) or named or (role == "reference_backward" and function is None)):
                allowed = 'a function, or "module:function"' if role.startswith("step") else "a function"
                raise InvalidInput(
                    f"cell {self.name!r}: {role} must be {allowed}, got {function!r}; docs/write-a-cell.md shows each"
                )
        for flag in ("apart", "saves_output"):
            if not isinstance(getattr(self, flag), bool):
                raise InvalidInput(
                    f"cell {self.name!r}: {flag} must be True or False, got {getattr(self, flag)!r}; leave it out if "
                    "in doubt"
                )

    def _count_saved(self) -> int:
        """How many tensors a step saves for backward, by making one."""
        one = torch.zeros(1, 1, device="cpu")
        try:
            inputs = (one,) * (self.gates + self.extra)
            state, saved = self.reference(inputs, (one,) * self.gates, (one,) * len(self.states))
        except Exception as error:
            raise InvalidInput(
                f"cell {self.name!r}: reference(x_gates, h_gates, state), with {self.gates} gates and "
                f"{len(self.states)} states in tuples, must return (state, saved), two tuples; it raised {error!r}"
            ) from error
        for returned in (state, saved):
            if not isinstance(returned, tuple) or not all(isinstance(part, torch.Tensor) for part in returned):
                raise InvalidInput(
                    f"cell {self.name!r}: reference must return (state, saved), two tuples of Tensors, got "
                    f"{type(returned).__name__} for one; a tuple of one is (h,)"
                )
        if len(state) != len(self.states):
            raise InvalidInput(
                f"cell {self.name!r}: reference must return {len(self.states)} states, got {len(state)}; those are "
                f"{self.states!r}"
            )
        return len(saved)

    def device_functions(self) -> tuple[Any, Any]:
        """``step`` and ``step_backward`` as Triton functions."""
        return _resolved(self.step), _resolved(self.step_backward)


class _Zoned(Cell):
    """A cell with zoneout, called by the operators alone, which pass of each state which units keep it."""

    @property
    def extra(self) -> int:
        return len(self.states)


def _resolved(function: Callable[..., Any] | str) -> Any:
    if isinstance(function, str):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)
    return function


def find(cell: "Cell | str") -> Cell:
    """A cell by its name.

    Raises:
        InvalidInput: if there is none of that name.
    """
    if isinstance(cell, Cell):
        return cell
    if not isinstance(cell, str) or cell not in _registry:
        names = ", ".join(repr(name) for name, known in _registry.items() if not known.extra)
        raise InvalidInput(f"unknown cell: got {cell!r}, allowed are {names}, or a seqcore.Cell")
    return _registry[cell]


def _built_in(name: str, gates: int, states: tuple[str, ...], kind: type[Cell] = Cell, **options: Any) -> Cell:
    return kind(
        name=name,
        gates=gates,
        states=states,
        step=f"seqcore.kernels.recurrence.cells:{name}_step",
        step_backward=f"seqcore.kernels.recurrence.cells:{name}_step_backward",
        reference=getattr(plain, name),
        reference_backward=getattr(plain, f"{name}_backward"),
        **options,
    )


RNN_TANH = _built_in("rnn_tanh", 1, ("h",), apart=False, saves_output=True)
RNN_RELU = _built_in("rnn_relu", 1, ("h",), apart=False, saves_output=True)
GRU = _built_in("gru", 3, ("h",))
LSTM = _built_in("lstm", 4, ("h", "c"), apart=False)
BUILT_IN = (RNN_TANH, RNN_RELU, GRU, LSTM)
# Each with zoneout, by its name without.
ZONEOUT = {
    cell.name: _built_in(f"{cell.name}_zoneout", cell.gates, cell.states, _Zoned, apart=cell.apart)
    for cell in BUILT_IN
}
