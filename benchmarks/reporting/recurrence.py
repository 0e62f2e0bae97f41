"""What the recurrence and floors suites say, in words and tables."""

import statistics

from benchmarks.layers import TORCH, TORCHS
from benchmarks.recurrence_cases import SWEEPS
from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.fits import fit_power, geometric_mean
from benchmarks.reporting.tables import absent_lines, number, ratio_text, table
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import PASSES

# How near to its floor a step shall come.
TIMES_FLOOR = 1.5
SMALL_BATCH = 64
# Not in the means: what torch.nn does not know, so that something else takes its place, and one shape at every length.
APART = {"blocks", "ragged", "reset", "length"}


def sentences(results: Results) -> list[str]:
    """Ratios, floors, growth with length, and memory."""
    rows = results.select(suite="recurrence")
    found = [line for pass_ in PASSES for line in _ratio_sentences(_of(rows, pass_), pass_)]
    found += [line for pass_ in PASSES for line in _floor_sentences(_of(rows, pass_), pass_)]
    return [*found, *_slope_sentences(results), *_memory_sentences(rows)]


def _of(rows: list[Row], pass_: str) -> list[Row]:
    return [row for row in rows if row.info["pass"] == pass_]


def torch_ratio(row: Row) -> float | None:
    """The time of torch.nn's layer, or of what takes its place, over ours."""
    times = [row.info["peers"][name] for name in TORCHS if name in row.info["peers"]]
    return times[0] / row.info["ms_p50"] if times else None


def in_means(rows: list[Row]) -> list[Row]:
    """Those whose ratios to torch.nn are said together."""
    return [row for row in rows if row.info["sweep"] not in APART and torch_ratio(row)]


def mean_ratio(rows: list[Row]) -> float:
    return geometric_mean([torch_ratio(row) for row in rows])


def row_name(row: Row) -> str:
    """Short, and enough to find the row again."""
    info = row.info
    special = "" if info["sweep"] == "grid" else f", {SWEEPS[info['sweep']]}"
    return f"{NAMES[row.op]} {info['dtype']} H = {info['shape']['H']} B = {row.B} T = {row.T}{special}"


def _ratio_sentences(rows: list[Row], pass_: str) -> list[str]:
    paths = {
        "on cuDNN's standard path": [row for row in rows if row.info["cudnn_path"] == "standard"],
        "on cuDNN's persistent paths": [row for row in rows if row.info["cudnn_path"] == "persistent"],
        "on this CPU": [row for row in rows if row.info["cudnn_path"] is None],
    }
    found = []
    for where, group in paths.items():
        group = in_means(group)
        if not group:
            continue
        worst = min(group, key=torch_ratio)
        means = [f"{mean_ratio(group):.2f} over {len(group)} shapes"]
        for what, part in (
            (f"B ≤ {SMALL_BATCH}", [row for row in group if row.B <= SMALL_BATCH]),
            (f"B > {SMALL_BATCH}", [row for row in group if row.B > SMALL_BATCH]),
        ):
            if part and len(part) < len(group):
                means.append(f"{mean_ratio(part):.2f} over those of {what}")
        # The range from round to round is kept of the best peer only.
        known = f" (20 to 80 %: {_range(worst)})" if worst.info["best_peer"] in TORCHS else ""
        found.append(
            f"{pass_.capitalize()}, {where}: geometric mean of the ratios {', '.join(means)}; the worst is "
            f"{torch_ratio(worst):.2f}{known}, {row_name(worst)}."
        )
    if apart := [row for row in rows if row.info["sweep"] in APART - {"length"} and torch_ratio(row)]:
        worst = min(apart, key=torch_ratio)
        found.append(
            f"{pass_.capitalize()}, what {TORCH} does not know, against what takes its place: geometric mean of the "
            f"ratios {mean_ratio(apart):.2f} over {len(apart)} shapes; the worst is {torch_ratio(worst):.2f}, "
            f"{row_name(worst)}."
        )
    return found


def _range(row: Row) -> str:
    return f"{row.info['ratio_p20']:.2f} to {row.info['ratio_p80']:.2f}" if row.info["ratio_p20"] else "-"


def times_floor(rows: list[Row]) -> dict[str, float]:
    """Of the rows with a floor of steps, how many times it they take, by name."""
    return {row_name(row): row.info["ms_p50"] / row.info["floor_ms"] for row in rows if row.info["step_floors"]}


def _floor_sentences(rows: list[Row], pass_: str) -> list[str]:
    times = times_floor(rows)
    if not times:
        return []
    within = sum(value <= TIMES_FLOOR for value in times.values())
    worst = max(times, key=times.__getitem__)
    return [
        f"{pass_.capitalize()}: {within} of {len(times)} shapes take at most {TIMES_FLOOR} times their floor; the "
        f"median takes {statistics.median(times.values()):.2f} times, the worst {times[worst]:.2f} times ({worst})."
    ]


def _slope_sentences(results: Results) -> list[str]:
    found = []
    for pass_ in PASSES:
        rows = results.select(suite="recurrence", sweep="length", pass_=pass_)
        names = [name for name in (rows[0].times if rows else ()) if all(name in row.times for row in rows)]
        fits = {name: fit_power([row.T for row in rows], [row.times[name] for row in rows]) for name in names}
        if rows and all(fits.values()):
            first, H = fits[OURS], rows[0].info["shape"]["H"]
            found.append(
                f"{pass_.capitalize()}, {NAMES[rows[0].op]} H = {H} B = {rows[0].B}, fitted over "
                f"{first.points} lengths from {first.first:,} to {first.last:,}: time grows as "
                f"{', '.join(f'{name} T^{fit.slope:.3f}' for name, fit in fits.items())}."
            )
    return found


def _memory_sentences(rows: list[Row]) -> list[str]:
    """At the largest H of each layer: what grows with the batch is then a matter of the layer, not of rounding."""
    found = []
    for op in NAMES:
        plain = [row for row in rows if row.op == op and row.info["sweep"] == "grid"]
        if kept := [row for row in plain if row.info["kept_bytes_per_token"]]:
            row = max(kept, key=lambda row: (row.tokens, row.info["shape"]["H"]))
            parts = (f"{name} {count:,.0f}" for name, count in row.info["kept_bytes_per_token"].items())
            found.append(f"Kept for backward, {row_name(row)}: {'; '.join(parts)} bytes a token.")
    return found


def recurrence_table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row.info["peers"]))
    header = ["layer", "dtype", "H", "B", "T", f"{OURS} ms", *(f"{name} ms" for name in peers), "best peer", "ratio"]
    header += ["20 to 80 %", f"of {TORCH}", "µs/step", "floor µs/step", "times floor", "floor is mostly", "plan"]
    lines = []
    for row in rows:
        info = row.info
        plans = dict.fromkeys(step["regime"] for step in info["step_floors"] or [])
        line = [NAMES[row.op], info["dtype"], f"{info['shape']['H']:,}", f"{row.B}", f"{row.T:,}"]
        line += [number(info["ms_p50"]), *("-" if ms is None else number(ms) for ms in map(info["peers"].get, peers))]
        line += [info["best_peer"] or "-", ratio_text(info["ratio"]), _range(row), ratio_text(torch_ratio(row))]
        line += [number(info["us_per_step"]), number(1e3 * info["floor_ms"] / row.T)]
        line += [number(info["ms_p50"] / info["floor_ms"]), info["floor_kind"], ", ".join(plans) or "-"]
        lines.append(line)
    return table(header, lines)


def floors_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        info = row.info
        shape = ", ".join(f"{count:,} {name}" for name, count in info["shape"].items())
        spread = f"{1e3 * info['ms_p20']:.3g} to {1e3 * info['ms_p80']:.3g}" if info["unit"] == "µs" else "-"
        lines.append([row.op, shape or "-", number(info["value"]), info["unit"], spread])
    return table(["floor", "of", "measured", "unit", "20 to 80 %"], lines)


READING_FLOORS = f"""\
*ratio* is the best peer's median time over {OURS}'s, beside its range from round to round, and *of {TORCH}* the same \
of torch's layer, to which the answers refer. The floor of a recurrence is \
that of its steps and of all products beside them; a step's is the barrier and exchange, measured for the plan's \
programs and rows, and the longer of reading its weights and multiplying (`benchmarks/floors.py`). On a CPU it is only \
the larger of products and bytes."""


def tables(results: Results) -> list[str]:
    """The parts of report.md."""
    parts = []
    if floors := results.select(suite="floors"):
        parts += ["### Floors", floors_table(floors)]
    if results.select(suite="recurrence"):
        parts += [f"### Recurrences against torch.nn\n\n{READING_FLOORS}"]
    for sweep in results.values("sweep", SWEEPS):
        for pass_ in PASSES:
            if rows := _sorted(results, sweep, pass_):
                parts += [f"#### {pass_.capitalize()}, {SWEEPS[sweep]}", recurrence_table(rows)]
    if absent := absent_lines(results.select(suite="recurrence")):
        parts += ["#### Peers of recurrences that did not take part", "\n".join(absent)]
    return parts


def _sorted(results: Results, sweep: str, pass_: str) -> list[Row]:
    rows = results.select(suite="recurrence", sweep=sweep, pass_=pass_)
    return sorted(rows, key=lambda row: (row.info["dtype"], row.op, row.info["shape"]["H"], row.B, row.T))


def summary(results: Results) -> list[str]:
    """What a terminal shows."""
    parts = []
    if floors := results.select(suite="floors"):
        parts.append(floors_table(floors))
    for pass_ in PASSES:
        if rows := [row for sweep in SWEEPS for row in _sorted(results, sweep, pass_)]:
            parts.append(f"{pass_.capitalize()}, recurrences against torch.nn\n{recurrence_table(rows)}")
    if said := sentences(results):
        parts.append("\n".join(f"- {sentence}" for sentence in said))
    return parts
