"""What the experiments' pictures share: lines of repeats with their range, and how they look."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from benchmarks.reporting.plot_kit import FAINT, STYLES
from benchmarks.study.experiment import spread

# Okabe and Ito's colours and a mark each, for what is no layer: the n-th of several variants.
VARIANTS = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#D55E00", "P"))
# Of two that are compared, with and without, say.
SOLID, DASHED = "-", (0, (4, 2))


def style(name: str, among: Sequence[str] = ()) -> tuple[str, str]:
    """(colour, mark): a layer's own, else by the place among the variants."""
    return STYLES[name] if name in STYLES else VARIANTS[list(among).index(name) % len(VARIANTS)]


def line(
    ax: Axes, points: Iterable[tuple[float, Sequence[float]]], color: str, mark: str = "", label: str = "", **look
) -> None:
    """The median of each x's repeats, and a band from their least to their largest."""
    found = [(x, spread(samples)) for x, samples in points if len(samples)]
    x = [x for x, _ in found]
    ax.plot(x, [each.median for _, each in found], color=color, marker=mark, markersize=4.5, label=label, **look)
    ax.fill_between(x, [each.low for _, each in found], [each.high for _, each in found], color=color, alpha=0.15, lw=0)


def repeats(ax: Axes, place: float, samples: Sequence[float], color: str, mark: str = "o") -> None:
    """Every repeat as a point of its own at one place of the x axis, and a bar at their median."""
    middle = (len(samples) - 1) / 2
    offsets = [0.05 * (i - middle) for i in range(len(samples))]
    ax.plot([place + each for each in offsets], sorted(samples), mark, color=color, markersize=4.5, alpha=0.75)
    reach = 0.06 + 0.05 * middle
    ax.plot([place - reach, place + reach], [spread(samples).median] * 2, color=color, linewidth=2)


def level(ax: Axes, height: float, name: str) -> None:
    """A dotted line across at that height, named at its left."""
    ax.axhline(height, color=FAINT, linestyle=":", linewidth=1)
    ax.annotate(name, (0, height), (3, 3), ax.get_yaxis_transform(), "offset points", fontsize=8, color=FAINT)


def ticks(ax: Axes, places: Sequence[float]) -> None:
    """Ticks of a logarithmic x axis at what was measured, as one writes numbers."""
    ax.set_xticks(list(places), [f"{place:,.0f}" for place in places])
    ax.xaxis.set_minor_locator(NullLocator())
