"""Zoneout: which units keep their state in a step, drawn or in expectation."""

import torch
from torch import Tensor

from ..cells import ZONEOUT, Cell
from ..errors import InvalidInput

Zoneout = float | tuple[float, float]


def probabilities(name: str, cell: Cell, zoneout: Zoneout, projected: bool) -> tuple[float, ...]:
    """Of each state of ``cell`` the probability to be kept; nothing if none is ever kept.

    Raises:
        InvalidInput: for what is not such probabilities, with a projection, or with a cell that has no form with it.
    """
    if cell.extra:
        raise InvalidInput(f"{name}: takes what only the operators pass (extra=); for zoneout, pass zoneout= to lstm")
    of_each = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout,) * len(cell.states)
    if len(of_each) != len(cell.states) or not all(isinstance(p, (int, float)) and 0 <= p <= 1 for p in of_each):
        pair = ", or a pair of these for h and c" if cell.has_c else ""
        raise InvalidInput(f"{name}: zoneout must be a probability between 0 and 1{pair}, got {zoneout!r}")
    if not any(of_each):
        return ()
    if cell.name not in ZONEOUT:
        allowed = ", ".join(map(repr, ZONEOUT))
        raise InvalidInput(f"{name}: zoneout is for {allowed}; in a cell of your own, leave it out")
    if projected:
        raise InvalidInput(
            f"{name}: zoneout keeps units of h, which proj_size mixes after each step; got both, leave one out"
        )
    return of_each


def kept(of_each: tuple[float, ...], x: Tensor, hidden: int, directions: int, training: bool) -> Tensor:
    """[D, T, B, states * H] (packed: [D, R, …]): of each unit at each step whether it keeps h, and c; or how likely."""
    shape = (directions, *x.shape[:-1])
    if training:
        # One byte each: they wait for backward.
        drawn = [x.new_empty((*shape, hidden), dtype=torch.bool).bernoulli_(p) for p in of_each]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn, -1)
    expected = torch.cat([x.new_full((hidden,), p) for p in of_each])
    return expected.expand(*shape, -1)
