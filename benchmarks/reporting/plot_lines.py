"""Plots of lines: time and rate over length and batch, attention's rate, and loss over time."""

from collections.abc import Callable

from matplotlib.axes import Axes

from benchmarks.attention_peers import SDPA
from benchmarks.layers import TORCH
from benchmarks.reporting.answers import NAMES, sweep_name
from benchmarks.reporting.fits import fit_power
from benchmarks.reporting.plot_kit import FAINT, STYLES, Drawing, log_log, name_ends, panels, plain_y
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import OPS, PASSES

Value = Callable[[Row], float]


def time_over_length(results: Results) -> Drawing | None:
    """Milliseconds over T: a column for each pass, a row for each sweep."""
    return _over(
        results,
        [sweep for sweep in ("batch_fixed", "tokens_fixed") if results.select(suite="bottleneck", sweep=sweep)],
        (lambda row: row.T, "sequence length T (time steps)"),
        (lambda row: row.ms, "time of one pass (ms)"),
        "Time of one layer over sequence length",
        "Milliseconds of one pass over T, both logarithmic; each layer by whoever is fastest at it. Beside its name "
        "the fitted exponent of T, over the larger half of the lengths. Dotted: growth with T and with T².",
        slopes=True,
    )


def time_of_a_step(results: Results) -> Drawing | None:
    """Microseconds for each time step."""
    return _over(
        results,
        ["batch_fixed"],
        (lambda row: row.T, "sequence length T (time steps)"),
        (lambda row: row.ms * 1e3 / row.T, "time of one pass / T (µs a step)"),
        "Time for each step of the sequence",
        "Microseconds of one pass divided by T, over T, both logarithmic: level where each step takes equally long.",
    )


def rate_over_batch(results: Results) -> Drawing | None:
    """Tokens per second over batch."""
    return _over(
        results,
        ["batch_sweep"],
        (lambda row: row.B, "batch B (sequences)"),
        (lambda row: row.tokens / row.ms * 1e3, "tokens/s"),
        "How much batch fills the machine",
        "Tokens a second over batch, both logarithmic. Where a line is level, more batch brings no more.",
    )


def _over(
    results: Results,
    sweeps: list[str],
    x: tuple[Value, str],
    y: tuple[Value, str],
    title: str,
    caption: str,
    slopes: bool = False,
) -> Drawing | None:
    """A panel for each sweep and pass of the bottleneck suite, a line for each layer; axes as (value, label)."""
    rows = [row for sweep in sweeps for row in results.select(suite="bottleneck", sweep=sweep)]
    if not rows:
        return None
    figure, axes = panels(len(sweeps), len(PASSES), 3.9, sharex="row", sharey=True)
    drawn = []
    for line, sweep in zip(axes, sweeps, strict=True):
        # Panels side by side share their ticks, and the last to set them wins.
        places = sorted({x[0](row) for row in results.select(suite="bottleneck", sweep=sweep)})
        for ax, pass_ in zip(line, PASSES, strict=True):
            found = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
            if found:
                drawn.append((ax, _layers(ax, found, x[0], y[0], slopes)))
                log_log(ax, places)
                held = f"T = {found[0].T:,}" if sweep == "batch_sweep" else sweep_name(found)
                ax.set_title(f"{pass_.capitalize()}, {held}, H = {found[0].info['shape']['H']:,}")
            ax.set_xlabel(x[1])
            ax.set_ylabel(y[1])
            ax.yaxis.set_tick_params(labelleft=True)
    # Only now: the panels share one vertical axis, and every panel may have stretched it.
    for ax, ends in drawn:
        plain_y(ax)
        if slopes:
            _guides(ax)
        name_ends(ax, ends)
    return Drawing(figure, rows, title, caption)


def _layers(ax: Axes, rows: list[Row], x: Value, y: Value, slopes: bool) -> list[tuple[float, str, str]]:
    """One line for each layer with every measured x marked; where each ends, its name and its colour."""
    ends = []
    for op in OPS:
        line = [row for row in rows if row.op == op]
        if line:
            color, marker = STYLES[op]
            places, values = [x(row) for row in line], [y(row) for row in line]
            ax.plot(places, values, color=color, marker=marker, markersize=4.5)
            fit = fit_power(places, values) if slopes else None
            ends.append((values[-1], NAMES[op] + (f" T^{fit.slope:.2f}" if fit else ""), color))
    return ends


def _guides(ax: Axes) -> None:
    """Faint lines that grow with T and T² from the lower left corner of what is drawn, named where they leave."""
    places = [value for line in ax.lines for value in line.get_xdata()]
    first, last, (low, high) = min(places), max(places), ax.get_ylim()
    # T's name below its line and that of T² to the left, where the other is not.
    for power, name, offset in ((1, "T", (0, -5)), (2, "T²", (-9, 0))):
        end = min(last, first * (high / low) ** (1 / power))
        top = low * (end / first) ** power
        ax.plot([first, end], [low, top], ":", color=FAINT, linewidth=0.9, zorder=1)
        ax.annotate(name, (end, top), offset, textcoords="offset points", color=FAINT, ha="right", va="top", fontsize=9)
    ax.set_ylim(low, high)


def attention_rate(results: Results) -> Drawing | None:
    """TFLOP/s of attention over N: a row for each head dim, a column for each pass; ours against torch's best."""
    rows = results.select(suite="attention", sweep="plain")
    if not rows:
        return None
    dims = sorted({row.info["shape"]["D"] for row in rows})
    figure, axes = panels(len(dims), len(PASSES), 3.2, sharex=True, sharey="col")
    for line, D in zip(axes, dims, strict=True):
        for ax, pass_ in zip(line, PASSES, strict=True):
            found = [row for row in rows if row.info["pass"] == pass_ and row.info["shape"]["D"] == D]
            for causal, style in ((True, "-"), (False, "--")):
                _race(ax, [row for row in found if row.info["causal"] == causal], style)
            ax.set_title(f"{pass_.capitalize()}, D = {D}")
            ax.set_xscale("log", base=2)
            places = sorted({row.T for row in rows})
            ax.set_xticks(places, [f"{place:,}" for place in places])
            ax.tick_params(labelbottom=True)
            ax.set(xlabel="sequence length N (queries and keys)", ylabel="TFLOP/s of visible pairs")
    for ax in axes[0]:
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    handles = {handle.get_label(): handle for line in axes for ax in line for handle in ax.lines}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=4, handlelength=3)
    held = f"H·D = {rows[0].info['shape']['H'] * rows[0].info['shape']['D']:,}, N·B = {rows[0].tokens:,}"
    return Drawing(
        figure,
        rows,
        "Attention over sequence length",
        f"TFLOP/s (operations of visible pairs only) over N; {held}. {OURS} against the fastest of torch's "
        "scaled_dot_product_attention backends at each length; training is forward and backward.",
    )


def _race(ax: Axes, rows: list[Row], style: str) -> None:
    kind = "causal" if style == "-" else "full"
    best = {row.T: min((ms for name, ms in row.times.items() if name in SDPA), default=None) for row in rows}
    for who, color, marker, ms in (
        (OURS, STYLES["attention"][0], "D", {row.T: row.info["ms_p50"] for row in rows}),
        ("best SDPA", STYLES["lstm"][0], "o", {N: value for N, value in best.items() if value}),
    ):
        line = [(row.T, row.info["flops"] / ms[row.T] / 1e9) for row in rows if row.T in ms]
        if line:
            marks = {"marker": marker, "markersize": 4.5, "markerfacecolor": color if style == "-" else "none"}
            ax.plot(*zip(*line, strict=True), style, color=color, label=f"{who}, {kind}", **marks)


def loss_over_time(results: Results) -> Drawing | None:
    """Held-out loss over the seconds of training; ours solid with marks, torch.nn dashed."""
    rows = results.select(suite="models")
    if not rows:
        return None
    figure, axes = panels(1, 1, 4.2)
    ax, ends = axes[0][0], []
    for row in rows:
        color, marker = STYLES[row.op]
        for name, style in (
            (TORCH, {"linestyle": "--", "linewidth": 1.2}),
            (OURS, {"marker": marker, "markersize": 4}),
        ):
            points = row.info["curves"][name]["held_out"]
            seconds, losses = [point["wall_s"] for point in points], [point["loss"] for point in points]
            ax.plot(seconds, losses, color=color, **style)
        ends.append((losses[-1], NAMES[row.op], color))
    ax.set_xlabel("seconds of training (evaluation not counted)")
    ax.set_ylabel("held-out loss (nats a character)")
    ax.set_title(f"{OURS} solid with marks, {TORCH} dashed")
    name_ends(ax, ends)
    return Drawing(
        figure,
        rows,
        "Loss over time",
        f"Held-out loss, in nats a character, over seconds of training, of models of about equal size on "
        f"{rows[0].info['text']}. {OURS} solid with marks, {TORCH} dashed, from the same weights on the same batches.",
    )
