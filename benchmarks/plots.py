"""Plots of a run, each as PNG and SVG. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.answers import NAMES, PASS_NAMES, sweep_name
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
Value = Callable[[Row], float]


def draw_all(results: Results, out: Path) -> list[Path]:
    """Every plot the rows allow; PNG and SVG of each."""
    written = []
    with plt.rc_context(LOOK):
        for name, draw in (
            ("time_over_length", time_over_length),
            ("time_of_a_step", time_of_a_step),
            ("rate_over_batch", rate_over_batch),
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


def machine_name(results: Results) -> str:
    machine, first = results.machine, results.rows[0].info
    name = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} threads"
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
        len(sweeps), 2, figsize=(11, 0.6 + 3.9 * len(sweeps)), squeeze=False, layout="constrained", sharey=True
    )
    for i, sweep in enumerate(sweeps):
        for j, pass_ in enumerate(PASSES):
            ax, rows = axes[i, j], cells[sweep, pass_]
            if rows:
                _curves(ax, rows, x, y)
                held = f"T = {rows[0].T:,}" if sweep == "batch_sweep" else sweep_name(rows)
                ax.set_title(f"{PASS_NAMES[pass_].capitalize()}, {held}, H = {rows[0].info['shape']['H']:,}")
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            ax.yaxis.set_tick_params(labelleft=True)
    _caption(figure, results, title)
    return figure


def _curves(ax: Axes, rows: list[Row], x: Value, y: Value) -> None:
    """One line for each layer, named at its end; log-log, with every measured x marked."""
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
    ax.yaxis.set_major_locator(LogLocator(numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    _name_ends(ax, ends, max(places))


def _name_ends(ax: Axes, ends: Iterable[tuple[float, float, str, str]], x: float) -> None:
    """Write each line's name to the right of its end, moved apart where they would overlap."""
    figure_height = ax.figure.get_size_inches()[1] * ax.get_subplotspec().get_position(ax.figure).height
    low, high = (math.log(value) for value in ax.get_ylim())
    gap = (high - low) * 0.19 / figure_height
    heights = []
    ends = sorted(ends, key=lambda end: end[1])
    for _, y, _, _ in ends:
        heights.append(max(math.log(y), heights[-1] + gap) if heights else math.log(y))
    # Labels are pushed up one by one; half of the push is given back to all, so that they stay around their lines.
    shift = sum(height - math.log(end[1]) for height, end in zip(heights, ends, strict=True)) / max(len(ends), 1)
    for height, (_, _, name, color) in zip(heights, ends, strict=True):
        ax.annotate(
            name,
            (x, math.exp(height - shift)),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def loss_over_time(results: Results) -> Figure | None:
    """Loss over the seconds of training: held out as lines, in training as points; torch.nn dashed."""
    rows = results.select(suite="models")
    if not rows:
        return None
    figure, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    ends = []
    for row in rows:
        color, marker = STYLES[row.op]
        curves = row.info["curves"]
        for name, dashes in ((OURS, "-"), (TORCH, (0, (3, 2)))):
            seconds, losses = zip(*((point["wall_s"], point["loss"]) for point in curves[name]["held_out"]), strict=True)
            ours = name == OURS
            ax.plot(
                seconds,
                losses,
                color=color,
                linestyle=dashes,
                linewidth=2 if ours else 1.2,
                marker=marker if ours else None,
                markersize=4,
            )
            if ours:
                ends.append((seconds[-1], losses[-1], NAMES[row.op], color))
    ax.set_xlabel("seconds of training (evaluation not counted)")
    ax.set_ylabel("held-out loss (nats a character)")
    ax.set_title(f"{OURS} solid with marks, {TORCH} dashed · {rows[0].info['text']}")
    for x, y, name, color in ends:
        ax.annotate(name, (x, y), xytext=(8, 0), textcoords="offset points", color=color, va="center", fontweight="bold")
    _caption(figure, results, "Loss over time, models of about equal size")
    return figure


def _caption(figure: Figure, results: Results, title: str) -> None:
    note = "" if results.machine.get("gpu") else " · a CPU: says nothing about a GPU"
    figure.suptitle(f"{title}\n{machine_name(results)}{note}", x=0.01, ha="left", fontsize=11)
