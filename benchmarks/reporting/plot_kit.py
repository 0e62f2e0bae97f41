"""What all plots share: their look, their conditions in words, and names written where lines end."""

from dataclasses import dataclass

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.reporting.page import GRID, INK
from benchmarks.rows import Results, Row

# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = {
    "rnn": ("#E69F00", "o"),
    "gru": ("#009E73", "s"),
    "lstm": ("#0072B2", "^"),
    "attention": ("#D55E00", "D"),
    "transformer": ("#D55E00", "D"),
}
# On a colour that no page changes.
BLACK = "#000000"
FAINT = "#8a8a8a"
LOOK = {
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.color": "#bbbbbb",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "savefig.dpi": 160,
}
LINE_POINTS = 13
# Numbers as one writes them, where matplotlib would write powers of ten.
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


@dataclass(frozen=True)
class Drawing:
    """A figure, the rows it shows, and what a reader must know: what is drawn, in which units."""

    figure: Figure
    rows: list[Row]
    title: str
    caption: str


def panels(rows: int, columns: int, height: float, **options) -> tuple[Figure, list[list[Axes]]]:
    """A grid of axes on a page's width, ``height`` inches each."""
    size = (5.5 * max(columns, 2), 0.2 + height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    return figure, axes.tolist()


def machine_name(results: Results) -> str:
    machine = results.machine
    threads = machine.get("threads")
    return machine.get("gpu") or f"{machine.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"


def conditions(results: Results, rows: list[Row]) -> str:
    """On what, in which precision, and with which versions these rows were measured."""
    machine = results.machine
    dtypes = sorted({row.info["dtype"] for row in rows})
    versions = {"torch": "torch", "triton": "Triton", "driver": "driver", "cudnn": "cuDNN"}
    found = [f"{name} {machine[key]}" for key, name in versions.items() if machine.get(key)]
    commit, _, dirty = (machine.get("commit") or "").partition("-")
    found += [f"commit {commit[:12]}{dirty and ', changed'}"] if commit else []
    return " · ".join([machine_name(results), ", ".join(dtypes), *found])


def head(drawing: Drawing, results: Results) -> None:
    """Write title and conditions over the figure, which may be shown without its page."""
    dtypes = ", ".join(sorted({row.info["dtype"] for row in drawing.rows}))
    note = "" if results.machine.get("gpu") else " · a CPU: says nothing about a GPU"
    under = f"{machine_name(results)} · {dtypes} · torch {results.machine.get('torch')}{note}"
    width, height = drawing.figure.get_size_inches()
    # Room for it, so that the axes stay as large as they were when names were placed.
    drawing.figure.set_size_inches(width, height + 0.5)
    drawing.figure.suptitle(f"{drawing.title}\n{under}", x=0.01, ha="left", fontsize=11)


def log_log(ax: Axes, places: list[float]) -> None:
    """Both axes logarithmic, with a tick at each of x's ``places``, and numbers as one writes them."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(places, [f"{place:,.0f}" for place in places], rotation=45 if len(places) > 7 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    plain_y(ax)


def plain_y(ax: Axes) -> None:
    """Ticks at 1, 2, 5 of each decade if there are few decades; call it when nothing stretches y any more."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0), numticks=12))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())


def name_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Beside the axes write each (height, name, colour), moved up or down where names would overlap."""
    if not ends:
        return
    ax.figure.canvas.draw()
    points_of_pixel = 72 / ax.figure.dpi
    heights = [ax.transData.transform((ax.get_xlim()[1], y))[1] * points_of_pixel for y, _, _ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for i, place in zip(order, spread(sorted(heights)), strict=True):
        y, name, color = ends[i]
        label = ax.annotate(name, (1.0, y), (6, place - heights[i]), ax.get_yaxis_transform(), "offset points")
        label.set(color=color, fontweight="bold", va="center", annotation_clip=False)


def spread(heights: list[float]) -> list[float]:
    """Ascending heights, in points, moved as little as it takes to be a line of text apart."""
    clusters: list[list[float]] = []
    for height in heights:
        clusters.append([height])
        # Names that touch stand around the middle of where they would be; a cluster that grows may touch the next.
        while len(clusters) > 1 and _bottom(clusters[-1]) < _bottom(clusters[-2]) + len(clusters[-2]) * LINE_POINTS:
            last = clusters.pop()
            clusters[-1] += last
    return [_bottom(cluster) + i * LINE_POINTS for cluster in clusters for i in range(len(cluster))]


def _bottom(cluster: list[float]) -> float:
    return sum(cluster) / len(cluster) - (len(cluster) - 1) * LINE_POINTS / 2
