"""Norms of gradients over time, and what they say."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .magnitude import DECADES, change, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Flow:
    """The norm of one gradient at every time step.

    Lags count the steps that a gradient has travelled back, from the last step at which it is not zero: against time,
    and along it in the reverse direction of a bidirectional layer.

    Args:
        norms: [T] float64, indexed by t; over the whole batch.
        symbol: what the gradient is called in sentences.
        reverse: whether the states were computed from the last step to the first.
        decades: how far the two ends may be apart and still be called steady.
        floor: norms below it are of numbers so small that their dtype rounds them coarsely; some never reach zero.
    """

    norms: Tensor
    symbol: str = "∂L/∂h_t"
    reverse: bool = False
    decades: float = DECADES
    floor: float = 0.0

    @property
    def lags(self) -> Tensor:
        """[T] int64: how many steps back from where the gradient starts; negative where it has not started."""
        t = torch.arange(len(self.norms))
        return t - self._start if self.reverse else self._start - t

    @property
    def rate(self) -> float:
        """The factor per lag: exp of the least-squares slope of log norm where that is finite and above ``floor``.

        NaN if that is one step only.
        """
        lag = self._exact.nonzero()[:, 0].double()
        if len(lag) < 2:
            return math.nan
        lag, log = lag - lag.mean(), self._by_lag[self._exact].log()
        return math.exp((lag * (log - log.mean())).sum() / lag.square().sum())

    @property
    def ratio(self) -> float:
        """The norm at the far end over that at lag 0: at the first t over the last one that the loss depends on."""
        return float(self._by_lag[-1] / self._by_lag[0])

    @property
    def verdict(self) -> str:
        """ "vanishing" or "exploding" if the ends are more than ``decades`` apart, else "steady".

        A gradient that is zero at the far end, or everywhere, is vanishing; one that is not finite is exploding.
        """
        if not self._by_lag.isfinite().all():
            return "exploding"
        if not self._by_lag[0]:
            return "vanishing"
        return verdict(self._decades_at(-1), self.decades)

    @property
    def sentence(self) -> str:
        """The same in words, with numbers."""
        norms = self._by_lag
        if not norms.any():
            return f"{self.symbol} is zero at every step: the loss does not depend on it"
        broken, said = (~norms.isfinite()).nonzero()[:, 0], []
        reached = self._exact[: int(broken[0]) if len(broken) else None].nonzero()[:, 0]
        if len(reached):
            last = int(reached[-1])
            said.append(
                change(self._decades_at(last), self.rate, last, self.decades)
                if last
                else f"is {norms[0]:.2g} at the last step that the loss depends on"
            )
        if len(broken):
            kind = "infinite" if norms[broken[0]].isinf() else "NaN"
            said.append(f"{'it ' if said else ''}became {kind} at lag {int(broken[0]):,}")
        end = int(norms.nonzero()[-1]) + 1
        if end < len(norms):
            said.append(f"it is exactly zero from lag {end:,} on")
        elif not len(broken) and last + 1 < end:
            said.append(f"from lag {last + 1:,} on it is below the normal range of its dtype")
        return f"{self.symbol} {'; '.join(said)}"

    def plot(self, ax: "Axes | None" = None, label: str | None = None) -> "Axes":
        """Draw the norms over t, on a logarithmic scale, where zero has no place; needs matplotlib.

        Args:
            ax: where to draw; a new figure if None.
            label: the line's name in the legend.

        Returns:
            The axes drawn on.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        ax.semilogy(torch.where(self.norms > 0, self.norms, math.nan).tolist(), label=label)
        ax.set(xlabel="time step t", ylabel=f"norm of {self.symbol}")
        return ax

    @cached_property
    def _start(self) -> int:
        """The t of lag 0."""
        reached = self.norms.nonzero()[:, 0]
        ends = reached if len(reached) else torch.arange(len(self.norms))
        return int(ends[0] if self.reverse else ends[-1])

    @cached_property
    def _by_lag(self) -> Tensor:
        """The norms from lag 0 on."""
        return self.norms[self._start :] if self.reverse else self.norms[: self._start + 1].flip(0)

    @cached_property
    def _exact(self) -> Tensor:
        """[lags] bool: where the norm is finite and above ``floor``, or above zero if it begins below."""
        floor = self.floor if self._by_lag[0] > self.floor else 0.0
        return self._by_lag.isfinite() & (self._by_lag > floor)

    def _decades_at(self, lag: int) -> float:
        """log10 of what is left of the norm at ``lag``."""
        return float(self._by_lag[lag].log10() - self._by_lag[0].log10())


@dataclass(frozen=True, eq=False)
class GradientFlow(Mapping[str, Flow]):
    """A ``Flow`` for each state that was followed, by name; ``print`` it for all sentences.

    Attributes:
        flows: the same as a dict.
        loss: the value that was differentiated.
        skipped: what could not be followed, by name, and why.
    """

    flows: dict[str, Flow]
    loss: float
    skipped: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Flow:
        return self.flows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.flows)

    def __len__(self) -> int:
        return len(self.flows)

    def __str__(self) -> str:
        lines = {name: flow.sentence for name, flow in self.flows.items()}
        lines |= {name or "(model)": f"not followed: {why}" for name, why in self.skipped.items()}
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw all norms over t, on a logarithmic scale; needs matplotlib. Returns the axes drawn on."""
        for name, flow in self.flows.items():
            ax = flow.plot(ax, label=name)
        ax.set(ylabel="norm of the gradient")
        ax.legend()
        return ax
