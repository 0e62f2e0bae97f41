"""Recurrences: whole sequences, forward or backward, at one width and batch."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from .. import functional
from ..cells import Cell
from ..kernels.recurrence import plan as plans
from ..kernels.tables import PLAN
from ..kernels.tuning import INTERPRETER, Device, power_of_two
from ..ops import recurrence as ops
from ..testing.aot_catalogue import sequence_entry
from ..testing.aot_entry import Entry
from ..testing.cases import Case, dtype_name, recurrence_case
from .problem import Fields, Problem

# Steps and inputs of the problem on which results are judged; its programs and tiles are those of the one timed.
JUDGED_STEPS, JUDGED_INPUTS = 9, 64


@dataclass(frozen=True)
class Recurrence(Problem):
    """One layer of ``steps`` steps. float32 is multiplied in TF32, as torch's switch for recurrences has it."""

    cell: Cell
    backward: bool
    dtype: torch.dtype
    hidden: int
    batch: int
    directions: int = 1
    steps: int = 256

    family = section = "recurrence"
    precision = "tf32"

    @property
    def operation(self) -> str:
        return self.cell.name

    @property
    def name(self) -> str:
        directions = ", two directions" if self.directions == 2 else ""
        return f"{self.cell.name} {self._pass} {dtype_name(self.dtype)} H={self.hidden} B={self.batch}{directions}"

    @property
    def _pass(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def shape(self) -> plans.Shape:
        itemsize = self.dtype.itemsize
        return plans.Shape(self.cell.gates, self.hidden, 1, self.batch, self.directions, itemsize, self.backward)

    def candidates(self, device: Device) -> list[Fields]:
        try:
            present = plans.make(self.shape, device)
        except plans.NoPlan:
            return []
        found = [_fields(present)]
        for change in _changes(present):
            with contextlib.suppress(plans.NoPlan), self.using(_fields(replace(present, **change))):
                made = plans.make(self.shape, device)
                if _fields(made) not in found and self._may_run(made, device):
                    found.append(_fields(made))
        return found

    def _may_run(self, plan: plans.Plan, device: Device) -> bool:
        """Whether a plan lies within what the kernels are made for and this device holds, with no row for nobody."""
        # Interpreted programs run one after another and cannot wait for each other.
        alone = device.arch != INTERPRETER or plan.slices == 1
        rows = 16 <= plan.rows <= min(plans.MOST_ROWS, power_of_two(self.batch))
        return alone and rows and plan.units >= 8 and plan.tile >= 16 and plan.shared_memory <= device.shared_memory

    def using(self, fields: Fields) -> AbstractContextManager:
        return plans.overriding(self.backward, **fields)

    def entries(self, fields: Fields, device: Device) -> list[Entry]:
        name = dtype_name(self.dtype)
        with self.using(fields):
            return [sequence_entry(self.cell, name, device, self.shape, mapped) for mapped in (False, True)]

    def cases(self, device: torch.device) -> list[Case]:
        steps = min(JUDGED_STEPS, self.steps)
        return [
            recurrence_case(
                self.cell, steps, self.batch, JUDGED_INPUTS, self.hidden, 1, layout, device, self.directions
            )
            for layout in ("padded", "ragged and reset")
        ]

    def call(self, device: torch.device) -> Callable[[], object]:
        module = self._module(device)
        x = torch.randn(self.steps, self.batch, self.hidden, dtype=self.dtype, device=device)
        states = [x.new_zeros(self.directions, self.batch, self.hidden) for _ in self.cell.states]
        weights = [w.detach() for w in module._flat_weights]
        layer = (self.cell.name, x, states[0], states[1] if self.cell.has_c else None, weights, self.directions, True)
        unmapped = (None, None, None)

        def forward():
            return ops.forward(*layer, *unmapped, True, True)

        if not self.backward:
            return forward
        y, _, _, *kept = forward()
        dy = torch.randn_like(y)
        return lambda: ops.backward(*layer, *unmapped, y, *kept, dy, None, None, None, None, True)

    def small(self) -> "Recurrence":
        return replace(self, steps=2)

    @property
    def contest(self) -> str:
        """With all of training in the place of backward, which alone nobody calls."""
        return self.name.replace(" backward ", " training ")

    def contestant(self, device: torch.device, backend: str) -> Callable[[], object]:
        module = self._module(device)
        x = torch.randn(self.steps, self.batch, self.hidden, dtype=self.dtype, device=device, requires_grad=True)
        dy = x.new_ones(self.steps, self.batch, self.directions * self.hidden)
        run = {"lstm": functional.lstm, "gru": functional.gru}.get(self.cell.name, functional.rnn)

        def forward():
            weights, both = module._flat_weights, self.directions == 2
            return run(x, None, weights, bidirectional=both, training=True, backend=backend)[0]

        return (lambda: torch.autograd.grad(forward(), [x, *module.parameters()], dy)) if self.backward else forward

    def row(self, fields: Fields, device: Device) -> dict[str, Any]:
        return {"shape": asdict(self.shape), "plan": fields}

    def _module(self, device: torch.device) -> torch.nn.RNNBase:
        """torch's own, whose weights lie as cuDNN wants them."""
        kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(self.cell.name, torch.nn.RNN)
        return kind(self.hidden, self.hidden, bidirectional=self.directions == 2, dtype=self.dtype, device=device)


def _fields(plan: plans.Plan) -> Fields:
    return {name: getattr(plan, name) for name in PLAN}


def _changes(present: plans.Plan) -> Iterator[Fields]:
    """Around a plan: every combination of what decides most, and everything else one at a time."""
    sizes = present.units, present.rows, present.fold
    units, rows, folds = ((max(1, size // 2), size, size * 2) for size in sizes)
    for values in product(units, rows, folds, (4, 8)):
        yield dict(zip(("units", "rows", "fold", "num_warps"), values, strict=True))
    singles = {
        "tile": (present.tile // 2, present.tile * 2), "stage": (1, 2, 4, 8, 16), "chains": (1, 2, 3, 4),
        "num_warps": (2, 16), "swap": (not present.swap,), "hold": (not present.hold,),
        "padded": (not present.padded,),
    }  # fmt: skip
    for name, values in singles.items():
        yield from ({name: value} for value in values)
