"""Zoneout: which units keep their state in a step, drawn or in expectation."""

import torch
from torch import Tensor

from ..cells import ZONEOUT, Cell
from ..errors import InvalidInput
from ..reference.recurrence import wide

Zoneout = float | tuple[float, float]


def probabilities(name: str, cell: Cell, zoneout: Zoneout, projected: bool) -> tuple[float, ...]:
    """Of each state of ``cell`` the probability to be kept; nothing if none is ever kept.

    Raises:
        InvalidInput: for what is not such probabilities, with a projection, or with a cell that has no form with it.
    """
    if cell.extra:
        plain = cell.name.removesuffix("_zoneout")
        function = "rnn" if plain.startswith("rnn") else plain
        raise InvalidInput(
            f"{name}: is how the operators call {plain!r} with zoneout; pass zoneout= to {function}, or to recurrence "
            f"with cell={plain!r}"
        )
    of_each = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout,) * len(cell.states)
    if len(of_each) != len(cell.states) or not all(map(_is_probability, of_each)):
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


def _is_probability(p: float) -> bool:
    return isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p <= 1


def kept(of_each: tuple[float, ...], x: Tensor, hidden: int, directions: int, training: bool) -> Tensor:
    """[D, T, B, states * H] (packed: [D, R, …]): of each unit at each step whether it keeps h, and c; or how likely.

    The latter as the cells read it, p > 1/2 as p - 1.
    """
    shape = (directions, *x.shape[:-1])
    if training:
        # One byte each: they wait for backward.
        drawn = [x.new_empty((*shape, hidden), dtype=torch.bool).bernoulli_(p) for p in of_each]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn, -1)
    # What 16 bits would make 0 may not be told by its sign any more.
    limits = torch.finfo(x.dtype)
    least = limits.smallest_normal * limits.eps
    written = (p if p <= 0.5 else p - 1 if 1 - p >= least else 1.0 for p in of_each)
    expected = torch.cat([x.new_full((hidden,), p, dtype=wide(x.dtype)) for p in written])
    return expected.expand(*shape, -1)
