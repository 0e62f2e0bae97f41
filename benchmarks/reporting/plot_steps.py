"""Plots of a recurrence's step: beside its floor, and as a profiler divides it."""

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.page import INK
from benchmarks.reporting.plot_kit import Drawing, panels
from benchmarks.reporting.profiles import Profile
from benchmarks.reporting.tables import number
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import OPS, PASSES

PART_COLORS = {
    "exchange": "#E69F00",
    "weights": "#0072B2",
    "products": "#009E73",
    "launches": "#999933",
    "beside the steps": "#CC79A7",
    "copy": "#56B4E9",
    "matrix": "#009E73",
    "launch": "#999933",
    "barrier": "#D55E00",
    "product": "#009E73",
    "pointwise": "#56B4E9",
    "rest": "#bbbbbb",
}


def step_over_floor(results: Results) -> Drawing | None:
    """µs a step of the grid's recurrences: the floor's parts stacked, and what was measured as a mark."""
    rows = [row for row in results.select(suite="recurrence", sweep="grid") if row.info["floor_ms"]]
    if not rows:
        return None
    ops = [op for op in OPS if any(row.op == op for row in rows)]
    most = max(sum((row.op, row.info["pass"]) == (op, pass_) for row in rows) for op in ops for pass_ in PASSES)
    figure, axes = panels(len(ops), len(PASSES), 1.1 + 0.23 * most)
    parts: dict[str, None] = {}
    for line, op in zip(axes, ops, strict=True):
        for ax, pass_ in zip(line, PASSES, strict=True):
            found = [row for row in rows if (row.op, row.info["pass"]) == (op, pass_)]
            if not found:
                # Of a run of one pass, or one that was cut short.
                ax.set_axis_off()
                continue
            found.sort(key=lambda row: (row.info["shape"]["H"], row.B), reverse=True)
            stacks = [(_shape(row, rows), _floor_us(row), row.info["us_per_step"]) for row in found]
            parts |= dict.fromkeys(name for _, stack, _ in stacks for name in stack)
            _bars(ax, stacks)
            ax.set_title(f"{NAMES[op]}, {pass_}, T = {rows[0].T:,}")
            ax.set_xlabel("µs a step")
    handles = [Patch(color=PART_COLORS[name], label=f"floor: {name}") for name in parts]
    handles.append(Line2D([], [], linestyle="", marker="D", color=INK, markersize=4.5, label="measured"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return Drawing(
        figure,
        rows,
        "A recurrence's step against its floor",
        "Microseconds a time step: stacked, the least each part can take on this machine (on a CPU only the larger of "
        f"products and bytes); the mark is {OURS}'s measured time, and beside it how many times the floor that is.",
    )


def _shape(row: Row, rows: list[Row]) -> str:
    dtype = f" {row.info['dtype']}" if len({other.info["dtype"] for other in rows}) > 1 else ""
    return f"H = {row.info['shape']['H']:,}, B = {row.B}{dtype}"


def _floor_us(row: Row) -> dict[str, float]:
    parts = row.info.get("floor_parts") or {row.info["floor_kind"]: row.info["floor_ms"]}
    return {name: 1e3 * ms / row.T for name, ms in parts.items()}


# Of each (name, parts, measured), all in µs a step; None where the parts are what was measured.
Stack = tuple[str, dict[str, float], float | None]


def _bars(ax: Axes, stacks: list[Stack]) -> None:
    """Horizontal bars; a mark at what was measured, and how many times the bar that is, or else the parts' sum."""
    begins, ends = [0.0], []
    for y, (_, parts, measured) in enumerate(stacks):
        # What is negative stands on the other side of 0.
        reached = {True: 0.0, False: 0.0}
        for name, width in parts.items():
            ax.barh(y, width, left=reached[width < 0], height=0.62, color=PART_COLORS[name])
            reached[width < 0] += width
        if measured is not None:
            ax.plot(measured, y, "D", color=INK, markersize=4.5)
        whole = sum(parts.values())
        label = f"{number(whole)} µs" if measured is None else f"{number(measured / whole)}\N{MULTIPLICATION SIGN}"
        begins.append(1.05 * reached[True])
        ends.append(max(reached[False], measured or 0))
        ax.annotate(label, (ends[-1], y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    # With room for the number beside the longest.
    ax.set_xlim(min(begins), 1.2 * max(ends))
    ax.set_yticks(range(len(stacks)), [name for name, _, _ in stacks])
    ax.set_ylim(-0.6, len(stacks) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


SPLIT = (
    "Microseconds a time step, as profiled: what each part adds. Parts overlap in time; what is counted twice stands "
    "left of 0, and the number is what all of it took."
)


def split_of_a_step(results: Results, profiles: list[Profile]) -> Drawing | None:
    """µs a step as profiled: barrier, exchange, product, pointwise and the rest, stacked."""
    found = [profile for profile in profiles if profile.split]
    if not found:
        return None
    figure, axes = panels(1, 1, 0.9 + 0.3 * len(found))
    _bars(axes[0][0], [(profile.name, profile.split, None) for profile in reversed(found)])
    axes[0][0].set_xlabel("µs a step")
    handles = [Patch(color=PART_COLORS[name], label=name) for name in found[0].split]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    rows = [row for row in results.rows if row.info["dtype"] in {profile.dtype for profile in found}]
    return Drawing(figure, rows, "Where the time of a step goes", SPLIT)
