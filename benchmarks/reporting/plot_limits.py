"""Plots against others and against limits: torch.nn's time over ours as a heat map, and the roofline."""

import math

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from benchmarks.layers import TORCH
from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.page import INK
from benchmarks.reporting.plot_kit import BLACK, FAINT, PLAIN, STYLES, Drawing, panels
from benchmarks.reporting.profiles import Kernel, Profile
from benchmarks.reporting.recurrence import torch_ratio
from benchmarks.reporting.tables import number
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import OPS, PASSES

# From slower through equal to faster.
DIVERGING = LinearSegmentedColormap.from_list("slower to faster", ("#D55E00", "#f7f7f7", "#0072B2"))
# Factors beyond which colours do not change any more.
MOST_FACTOR = 8
SUITES = {"recurrence": "Recurrences", "attention": "Attention", "bottleneck": "Layer against layer"}


def ratio_over_shape(results: Results) -> Drawing | None:
    """torch.nn's time over ours, at each H and B: a row for each dtype and layer, a column for each pass."""
    rows = [row for row in results.select(suite="recurrence", sweep="grid") if torch_ratio(row)]
    if not rows:
        return None
    widths, batches = sorted({row.info["shape"]["H"] for row in rows}), sorted({row.B for row in rows})
    kinds = sorted({(row.info["dtype"], row.op) for row in rows}, key=lambda kind: (kind[0], OPS.index(kind[1])))
    most = max(1.0, *(min(math.log2(MOST_FACTOR), abs(math.log2(torch_ratio(row)))) for row in rows))
    norm = Normalize(-most, most)
    figure, axes = panels(len(kinds), len(PASSES), 0.9 + 0.42 * len(batches))
    for line, (dtype, op) in zip(axes, kinds, strict=True):
        for ax, pass_ in zip(line, PASSES, strict=True):
            found = [row for row in rows if (row.info["dtype"], row.op, row.info["pass"]) == (dtype, op, pass_)]
            cells = {(row.B, row.info["shape"]["H"]): torch_ratio(row) for row in found}
            _heat_map(ax, cells, batches, widths, norm)
            ax.set_title(f"{NAMES[op]}, {pass_}, {dtype}, T = {rows[0].T:,}")
    everywhere = [ax for line in axes for ax in line]
    colors = figure.colorbar(ScalarMappable(norm, DIVERGING), ax=everywhere, aspect=30, pad=0.02)
    powers = range(-int(most), int(most) + 1)
    colors.set_ticks(list(powers), labels=[f"{2.0**power:g}" for power in powers])
    colors.outline.set_visible(False)
    colors.set_label("faster →", loc="top")
    return Drawing(
        figure,
        rows,
        f"Recurrences: {TORCH}'s time over {OURS}'s",
        f"{TORCH}'s median time divided by {OURS}'s, for hidden size H and batch B (sequences): above 1, {OURS} is "
        "faster. Colours are logarithmic around 1; hatched was not measured.",
    )


def _heat_map(ax: Axes, cells: dict, batches: list[int], widths: list[int], norm: Normalize) -> None:
    for y, B in enumerate(batches):
        for x, H in enumerate(widths):
            ratio, place = cells.get((B, H)), (x - 0.5, y - 0.5)
            if ratio is None:
                ax.add_patch(Rectangle(place, 1, 1, facecolor="none", hatch="////", edgecolor="#bbbbbb", linewidth=0))
                continue
            level = norm(math.log2(ratio))
            ax.add_patch(Rectangle(place, 1, 1, facecolor=DIVERGING(level), edgecolor="white", linewidth=1))
            dark = not 0.15 < level < 0.85
            ax.text(x, y, f"{ratio:.2f}", ha="center", va="center", color="white" if dark else BLACK, fontsize=9)
    ax.set(xlim=(-0.5, len(widths) - 0.5), ylim=(-0.5, len(batches) - 0.5))
    ax.set_xticks(range(len(widths)), [f"{H:,}" for H in widths])
    ax.set_yticks(range(len(batches)), [f"{B:,}" for B in batches])
    ax.set(xlabel="hidden size H", ylabel="batch B")
    ax.grid(False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def roofline(results: Results, profiles: list[Profile]) -> Drawing | None:
    """Achieved TFLOP/s over operations a byte, under both measured roofs: a panel for each suite, and for kernels."""
    by_suite = {title: _working(results.select(suite=suite)) for suite, title in SUITES.items()}
    by_suite = {title: found for title, found in by_suite.items() if found}
    rows = [row for found in by_suite.values() for row in found]
    if not rows:
        return None
    kernels = [(profile, kernel) for profile in profiles for kernel in profile.kernels if kernel.flops and kernel.bytes]
    count = len(by_suite) + bool(kernels)
    figure, axes = panels(-(-count // 2), min(count, 2), 3.6, sharex=True, sharey=True)
    free = [ax for line in axes for ax in line]
    places = [_intensity(row) for row in rows] + [kernel.intensity for _, kernel in kernels]
    for ax in free[:count]:
        _roofs(ax, rows[0].info, min(places), max(places))
    for ax, (title, found) in zip(free, by_suite.items(), strict=False):
        ax.set_title(title)
        _row_points(ax, found)
    if kernels:
        free[count - 1].set_title("Kernels, profiled")
        _kernel_points(free[count - 1], kernels)
    for ax in free[count:]:
        ax.set_axis_off()
    # Room for the names of what is at the top; all panels share this axis.
    free[0].set_ylim(top=2.5 * free[0].get_ylim()[1])
    handles = _roofline_handles(rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return Drawing(
        figure,
        rows,
        "Roofline",
        f"Achieved TFLOP/s over operations for each byte that must be moved, both logarithmic, of every row of {OURS}; "
        f"the fastest of each panel is named{', and every kernel where it is fastest' if kernels else ''}. Lines are "
        "this machine's measured limits: a large copy, reading and writing both counted, and a large "
        f"{rows[0].info['peak_dtype']} product.",
    )


def _working(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.info["flops"] and row.info["bytes"]]


def _row_points(ax: Axes, rows: list[Row]) -> None:
    for row in rows:
        _mark(ax, row.op, row.info["pass"], _intensity(row), row.info["tflops"])
    best = max(rows, key=lambda row: row.info["tflops"])
    _name_point(ax, _intensity(best), best.info["tflops"], _short(best))


def _kernel_points(ax: Axes, kernels: list[tuple[Profile, Kernel]]) -> None:
    """Each by what was profiled; a kernel that occurs several times is named where it is fastest."""
    best: dict[str, Kernel] = {}
    for profile, kernel in kernels:
        _mark(ax, profile.op, profile.pass_, kernel.intensity, kernel.tflops)
        best[kernel.name] = max(kernel, best.get(kernel.name, kernel), key=lambda kernel: kernel.tflops)
    for kernel in best.values():
        _name_point(ax, kernel.intensity, kernel.tflops, kernel.name)


def _mark(ax: Axes, op: str, pass_: str, intensity: float, tflops: float) -> None:
    color, marker = STYLES[op]
    fill = color if pass_ == "forward" else "none"
    ax.plot(intensity, tflops, marker, color=color, markerfacecolor=fill, markersize=4.5, alpha=0.8)


def _roofline_handles(rows: list[Row]) -> list[Line2D]:
    ops = [op for op in OPS if any(row.op == op for row in rows)]
    mark = lambda **look: Line2D([], [], linestyle="", markersize=5.5, **look)
    return [mark(color=STYLES[op][0], marker=STYLES[op][1], label=NAMES[op]) for op in ops] + [
        mark(color=FAINT, marker="o", markerfacecolor=fill, label=pass_)
        for pass_, fill in zip(PASSES, (FAINT, "none"), strict=True)
    ]


def _intensity(row: Row) -> float:
    return row.info["flops"] / row.info["bytes"]


def _short(row: Row) -> str:
    shape = row.info["shape"]
    size = f"D = {shape['D']}" if "D" in shape else f"H = {shape['H']}"
    return f"{NAMES[row.op]} {row.info['pass']}, {size}, B = {row.B}, T = {row.T:,}"


def _roofs(ax: Axes, info: dict, least: float, most: float) -> None:
    """Both limits over this range of intensities, each named."""
    peak, copy = info["peak_tflops"], info["copy_gb_per_s"] / 1e3
    ridge = peak / copy
    first, last = min(least, ridge / 4) / 2, max(most, ridge) * 4
    ax.plot([first, ridge, last], [first * copy, peak, peak], color=INK, linewidth=1.1)
    ax.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="TFLOP/s")
    ax.tick_params(labelbottom=True, labelleft=True)
    ax.xaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_major_formatter(PLAIN)
    named = {"textcoords": "offset points", "fontsize": 8, "color": FAINT}
    ax.annotate(f"{number(peak)} TFLOP/s", (last, peak), (-2, 4), ha="right", **named)
    middle = math.sqrt(first * ridge)
    ax.annotate(f"{number(copy * 1e3)} GB/s", (middle, middle * copy), (8, -8), ha="left", **named)


def _name_point(ax: Axes, intensity: float, tflops: float, name: str) -> None:
    """On the side where there is more room."""
    left, right = (math.log(x) for x in ax.get_xlim())
    beyond = math.log(intensity) > (left + right) / 2
    ax.annotate(name, (intensity, tflops), (-6 if beyond else 6, 6), textcoords="offset points", fontsize=8,
                ha="right" if beyond else "left")  # fmt: skip
