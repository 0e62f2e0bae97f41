"""Plots of a run, each as PNG and SVG. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.answers import NAMES, sweep_name
from benchmarks.layers import TORCH
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import OPS, PASSES

STYLES = {
    "rnn": ("#E69F00", "o"),
    "gru": ("#009E73", "s"),
    "lstm": ("#0072B2", "^"),
    "attention": ("#D55E00", "D"),
    "transformer": ("#D55E00", "D"),
}
LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "savefig.dpi": 160,
}
LINE_POINTS = 13
Value = Callable[[Row], float]
# Where a line ends, its name and its colour.
End = tuple[float, float, str, str]


def draw_all(results: Results, out: Path) -> list[Path]:
    """Every plot the rows allow; PNG and SVG of each."""
    written = []
    with plt.rc_context(LOOK):
        for name, draw in (
            ("time_over_length", time_over_length),
            ("time_of_a_step", time_of_a_step),
            ("rate_over_batch", rate_over_batch),
            ("ratio_over_width", ratio_over_width),
            ("loss_over_time", loss_over_time),
        ):
            figure = draw(results)
            if figure is None:
                continue
            for kind in ("png", "svg"):
                path = out / f"{name}.{kind}"
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
            plt.close(figure)
    return written


def machine_name(results: Results, suite: str) -> str:
    machine, first = results.machine, results.select(suite=suite)[0].info
    threads = machine.get("threads")
    name = machine.get("gpu") or f"{machine.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"
    return f"{name} · {first['dtype']} · torch {machine.get('torch')}"


def time_over_length(results: Results) -> Figure | None:
    """Milliseconds over T: a column for each pass, a row for each sweep."""
    return _panels(
        results,
        [sweep for sweep in ("batch_fixed", "tokens_fixed") if results.select(suite="bottleneck", sweep=sweep)],
        lambda row: row.T,
        lambda row: row.ms,
        "sequence length T (time steps)",
        "time of one pass (ms)",
        "Time of one layer over sequence length",
    )


def time_of_a_step(results: Results) -> Figure | None:
    """Microseconds for each time step."""
    return _panels(
        results,
        ["batch_fixed"],
        lambda row: row.T,
        lambda row: row.ms * 1e3 / row.T,
        "sequence length T (time steps)",
        "time of one pass / T (µs a step)",
        "Time for each step of the sequence",
    )


def rate_over_batch(results: Results) -> Figure | None:
    """Tokens per second over batch."""
    return _panels(
        results,
        ["batch_sweep"],
        lambda row: row.B,
        lambda row: row.tokens / row.ms * 1e3,
        "batch B (sequences)",
        "tokens/s",
        "How much batch fills the machine",
    )


def _panels(
    results: Results, sweeps: list[str], x: Value, y: Value, x_label: str, y_label: str, title: str
) -> Figure | None:
    cells = {
        (sweep, pass_): results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
        for sweep in sweeps
        for pass_ in PASSES
    }
    if not any(cells.values()):
        return None
    figure, axes = plt.subplots(
        len(sweeps),
        2,
        figsize=(11, 0.6 + 3.9 * len(sweeps)),
        squeeze=False,
        layout="constrained",
        sharex="row",
        sharey=True,
    )
    ends = []
    for i, sweep in enumerate(sweeps):
        for j, pass_ in enumerate(PASSES):
            ax, rows = axes[i, j], cells[sweep, pass_]
            if rows:
                ends.append((ax, _curves(ax, rows, x, y)))
                held = f"T = {rows[0].T:,}" if sweep == "batch_sweep" else sweep_name(rows)
                ax.set_title(f"{pass_.capitalize()}, {held}, H = {rows[0].info['shape']['H']:,}")
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            ax.yaxis.set_tick_params(labelleft=True)
    # Only now: the panels share one vertical axis, and every panel may have stretched it.
    for ax, names in ends:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0), numticks=12))
        _name_ends(ax, names)
    _caption(figure, results, title, "bottleneck")
    return figure


def _curves(ax: Axes, rows: list[Row], x: Value, y: Value) -> list[End]:
    """One line for each layer, log-log, with every measured x marked; where each ends, and its name."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ends = []
    for op in OPS:
        line = [row for row in rows if row.op == op]
        if line:
            color, marker = STYLES[op]
            ax.plot([x(row) for row in line], [y(row) for row in line], color=color, marker=marker, markersize=4.5)
            ends.append((x(line[-1]), y(line[-1]), NAMES[op], color))
    places = sorted({x(row) for row in rows})
    ax.set_xticks(places, [f"{place:,.0f}" for place in places], rotation=45 if len(places) > 8 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    return ends


def _name_ends(ax: Axes, ends: list[End]) -> None:
    """Write each line's name at its end, moved up or down where names would overlap."""
    ax.figure.canvas.draw()
    points_of_pixel = 72 / ax.figure.dpi
    heights = [ax.transData.transform(end[:2])[1] * points_of_pixel for end in ends]
    for group in _groups(ends):
        placed = _spread(sorted(heights[i] for i in group))
        for i, height in zip(sorted(group, key=heights.__getitem__), placed, strict=True):
            x, y, name, color = ends[i]
            label = ax.annotate(name, (x, y), (8, height - heights[i]), textcoords="offset points", va="center")
            label.set(color=color, fontweight="bold", annotation_clip=False)


def _groups(ends: list[End]) -> list[list[int]]:
    """Indices of the lines that end near the same x, where their names may overlap."""
    groups: dict[float, list[int]] = {}
    last = max(end[0] for end in ends)
    for i, end in enumerate(ends):
        groups.setdefault(last if end[0] > 0.7 * last else end[0], []).append(i)
    return list(groups.values())


def _spread(heights: list[float]) -> list[float]:
    """The same heights, in points, moved as little as it takes to be a line of text apart."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + LINE_POINTS) if placed else height)
    # All were pushed up; half of the largest push is taken back from those that touch.
    push = max((after - before for before, after in zip(heights, placed, strict=True)), default=0.0)
    return [height - push / 2 if push else height for height in placed]


def ratio_over_width(results: Results) -> Figure | None:
    """How many times as fast as torch.nn over H: a column for each pass, a colour for each layer, a dash for each B."""
    rows = [row for row in results.select(suite="recurrence", sweep="grid") if row.info["ratio_p20"]]
    widths = sorted({row.info["shape"]["H"] for row in rows})
    if len(widths) < 2:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    dashes = dict(zip(sorted({row.B for row in rows}), ("-", "--", "-.", ":"), strict=False))
    for ax, pass_ in zip(axes, PASSES, strict=True):
        for op, (B, dash) in product(OPS, dashes.items()):
            line = [row for row in rows if (row.op, row.B, row.info["pass"]) == (op, B, pass_)]
            line.sort(key=lambda row: row.info["shape"]["H"])
            if line:
                places, (color, marker) = [row.info["shape"]["H"] for row in line], STYLES[op]
                ax.plot(places, [row.info["ratio"] for row in line], dash, color=color, marker=marker, markersize=4.5,
                        label=f"{NAMES[op]}, B = {B}")  # fmt: skip
                low, high = ([row.info[end] for row in line] for end in ("ratio_p20", "ratio_p80"))
                ax.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
        ax.axhline(1.0, color="#444444", linewidth=0.8)
        ax.set_xticks(widths, [f"{width:,}" for width in widths])
        ax.set_xlabel("hidden size H")
        ax.set_title(f"{pass_.capitalize()}, T = {rows[0].T:,}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    axes[0].set_ylabel(f"{TORCH}'s time / {OURS}'s (above 1 is faster)")
    _caption(figure, results, f"Recurrences against {TORCH}", "recurrence")
    return figure


def loss_over_time(results: Results) -> Figure | None:
    """Held-out loss over the seconds of training; ours solid with marks, torch.nn dashed."""
    rows = results.select(suite="models")
    if not rows:
        return None
    figure, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    ends = []
    for row in rows:
        color, marker = STYLES[row.op]
        for name, style in (
            (TORCH, {"linestyle": "--", "linewidth": 1.2}),
            (OURS, {"marker": marker, "markersize": 4}),
        ):
            points = row.info["curves"][name]["held_out"]
            seconds, losses = [point["wall_s"] for point in points], [point["loss"] for point in points]
            ax.plot(seconds, losses, color=color, **style)
        ends.append((seconds[-1], losses[-1], NAMES[row.op], color))
    ax.set_xlabel("seconds of training (evaluation not counted)")
    ax.set_ylabel("held-out loss (nats a character)")
    ax.set_title(f"{OURS} solid with marks, {TORCH} dashed")
    _name_ends(ax, ends)
    _caption(figure, results, f"Loss over time, models of about equal size, on {rows[0].info['text']}", "models")
    return figure


def _caption(figure: Figure, results: Results, title: str, suite: str) -> None:
    note = "" if results.machine.get("gpu") else " · a CPU: says nothing about a GPU"
    figure.suptitle(f"{title}\n{machine_name(results, suite)}{note}", x=0.01, ha="left", fontsize=11)
