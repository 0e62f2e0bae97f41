"""One call of a recurrent layer, as its operators see it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cells import Cell
from ..devices import describe, product_parts, recurrence_precision
from ..errors import UnsupportedInput
from ..reference.recurrence import Weights, block_count, hidden_size
from .layout import Map


@dataclass(frozen=True)
class Layer:
    """One call: the cell, its input x [R, I] and states, each direction's weights, and the map of its rows.

    ``extra`` [D, R, extra*H] is what a step takes besides its gates, for cells that do.
    """

    cell: Cell
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: Sequence[Weights]
    map: Map
    extra: Tensor | None = None

    @property
    def directions(self) -> int:
        return len(self.weights)

    @property
    def hidden(self) -> int:
        return hidden_size(self.weights[0].w_hh, self.cell.gates)

    @property
    def blocks(self) -> int:
        return block_count(self.weights[0].w_hh)

    @property
    def units(self) -> int:
        return self.hidden // self.blocks

    @property
    def projected(self) -> bool:
        return self.weights[0].w_hr is not None

    @property
    def precision(self) -> str:
        return recurrence_precision(self.x.dtype, describe(self.x.device).arch)

    def part(self, direction: int, width: int) -> slice:
        """The columns of ``direction`` in rows that hold all directions side by side."""
        return slice(direction * width, (direction + 1) * width)

    def shape(self, backward: bool):
        from ..kernels.recurrence.plan import Shape

        cell, x = self.cell, self.x
        return Shape(
            cell.gates, self.units, self.blocks, self.map.batch, self.directions, x.element_size(), backward,
            parts=product_parts(x.dtype, describe(x.device).arch),
        )  # fmt: skip

    def plan(self, backward: bool):
        from ..kernels.recurrence import plan

        try:
            return plan.make(self.shape(backward), describe(self.x.device))
        except plan.NoPlan as error:
            raise UnsupportedInput(f"{error}; take another backend") from error

    def recurrent_weights(self) -> Tensor:
        """[D, G, N, H/N, H/N] in memory: what the travelling state is multiplied with."""
        matrices = [w.w_hh @ w.w_hr if self.projected else w.w_hh for w in self.weights]
        # One direction's weights stay where they are.
        return matrices[0].contiguous() if len(matrices) == 1 else torch.stack(matrices)

    def travelling_h0(self) -> Tensor:
        if self.projected:
            return self.h0.new_zeros(*self.h0.shape[:-1], self.hidden)
        return self.h0.contiguous()
