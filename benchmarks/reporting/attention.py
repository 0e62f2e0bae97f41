"""What the attention suite says, in words and tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.attention_cases import HALF, SWEEPS
from benchmarks.attention_peers import MATH, SDPA
from benchmarks.reporting.fits import Fit, fit_power, geometric_mean
from benchmarks.reporting.tables import absent_lines, bytes_text, number, ratio_text, table
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import PASSES

# How near to a whole power of N memory must grow to be called by its name.
NEAR = 0.1
POWERS = {0: "not at all", 1: "linearly", 2: "quadratically"}
BETWEEN = {0: "less than linearly", 1: "more than linearly, less than quadratically"}

# By the name of a row, what it reached.
Figures = dict[str, float]


def row_name(row: Row) -> str:
    """Short, and enough to find the row's problem again; its pass is left out."""
    shape, sweep = row.info["shape"], row.info["sweep"]
    heads = f"{shape['H']}" + (f"/{shape['H_kv']}" if shape["H_kv"] != shape["H"] else "")
    seen = "" if sweep == "decode" else " causal" if row.info["causal"] else " full"
    special = "" if sweep == "plain" else f", {SWEEPS[sweep]}"
    return f"D = {shape['D']}{seen} B = {row.B} H = {heads} N = {row.T:,}{special}"


def times(rows: list[Row], pass_: str) -> dict[str, dict[str, float]]:
    """Milliseconds of ours and of torch's backends, by row; those of backward are training's less forward's."""
    if pass_ == "backward":
        forward, training = (times(rows, name) for name in PASSES)
        return {
            name: {who: ms - forward[name][who] for who, ms in found.items() if who in forward[name]}
            for name, found in training.items()
            if name in forward
        }
    known = {OURS, *SDPA}
    return {
        row_name(row): {who: ms for who, ms in row.times.items() if who in known}
        for row in rows
        if row.info["pass"] == pass_
    }


def ratios(rows: list[Row], passes: tuple[str, ...]) -> Figures:
    """The time of torch's best backend over ours."""
    found = {}
    for pass_ in passes:
        for name, contestants in times(rows, pass_).items():
            # Noise can leave nothing of a difference.
            others = [ms for who, ms in contestants.items() if who != OURS and ms > 0]
            if others and contestants[OURS] > 0:
                found[f"{pass_}, {name}"] = min(others) / contestants[OURS]
    return found


def percent_of_copy(row: Row) -> float:
    """Bytes a second as part of those of a large copy."""
    return 100 * row.info["bytes"] / (row.info["ms_p50"] * 1e6) / row.info["copy_gb_per_s"]


def bandwidths(rows: list[Row]) -> Figures:
    return {row_name(row): percent_of_copy(row) for row in rows}


@dataclass(frozen=True)
class Target:
    """What is to be reached by every row of some sweeps, in bfloat16 on an H200."""

    what: str
    least: float
    sweeps: tuple[str, ...]
    figures: Callable[[list[Row]], Figures]
    unit: str = " times the best SDPA backend"
    # Only rows of this head dim, 0 for all, and from this length on.
    D: int = 0
    from_N: int = 0

    def reached(self, results: Results) -> Figures:
        rows = results.select(suite="attention", dtype=HALF) if results.machine.get("gpu") else []
        rows = [row for row in rows if row.info["sweep"] in self.sweeps and row.T >= self.from_N]
        return self.figures([row for row in rows if self.D in (0, row.info["shape"]["D"])])

    def met(self, results: Results) -> bool:
        return all(value >= self.least for value in self.reached(results).values())

    def sentence(self, results: Results) -> str:
        found = self.reached(results)
        goal = f"{self.what}, target at least {self.least:g}{self.unit}"
        if not found:
            return f"{goal}: not measured."
        worst = min(found, key=found.__getitem__)
        good = sum(value >= self.least for value in found.values())
        verdict = "met" if self.met(results) else "not met"
        return f"{goal}: {verdict}, by {good} of {len(found)}; the least is {found[worst]:.3g} ({worst})."


def _head_dim(D: int, pass_: str, least: float) -> Target:
    """At 2k to 16k; those of the published table's shapes included."""
    figures = partial(ratios, passes=(pass_,))
    return Target(f"Head dim {D}, {pass_}", least, ("plain", "grouped"), figures, D=D, from_N=2048)


def _sweep(what: str, least: float, sweep: str, from_N: int = 0) -> Target:
    return Target(what, least, (sweep,), partial(ratios, passes=PASSES), from_N=from_N)


TARGETS = (
    _head_dim(64, "forward", 1.0),
    _head_dim(64, "backward", 0.9),
    _head_dim(128, "forward", 0.75),
    _head_dim(128, "backward", 0.7),
    _head_dim(128, "forward", 1.0),
    _head_dim(128, "backward", 0.95),
    _head_dim(256, "forward", 1.3),
    _head_dim(256, "backward", 1.3),
    _sweep("Key lengths at half fill", 1.8, "padded"),
    _sweep("Window of 512 at 16k", 8.0, "window", from_N=16384),
    _sweep("Bias with gradient", 2.0, "bias"),
    _sweep("ALiBi without a bias written down", 2.0, "alibi"),
    Target("Decode, one query and 64k keys", 80.0, ("decode",), bandwidths, " % of the copy bandwidth", from_N=65536),
)


def sentences(results: Results) -> list[str]:
    """Targets, ratios, and how memory grows."""
    rows = results.select(suite="attention")
    if not rows:
        return []
    found = [target.sentence(results) for target in TARGETS]
    if not any(target.reached(results) for target in TARGETS):
        found = ["No target is measured: all are of bfloat16 on a GPU."]
    return found + _ratio_sentences(rows) + _memory_sentences(rows)


def in_means(rows: list[Row]) -> list[Row]:
    """Those whose ratios are said together; a memory row is one head, and no machine is full of it."""
    return [row for row in rows if row.info["ratio"] and row.info["sweep"] != "memory"]


def _ratio_sentences(rows: list[Row]) -> list[str]:
    found = []
    for pass_ in PASSES:
        group = [row for row in in_means(rows) if row.info["pass"] == pass_]
        if group:
            worst = min(group, key=lambda row: row.info["ratio"])
            mean = geometric_mean([row.info["ratio"] for row in group])
            found.append(
                f"{pass_.capitalize()}, against the best of all peers: geometric mean of the ratios {mean:.2f} over "
                f"{len(group)} shapes; the worst is {worst.info['ratio']:.2f} against {worst.info['best_peer']}, "
                f"{row_name(worst)}."
            )
    return found


def memory_fits(rows: list[Row]) -> dict[str, Fit]:
    """How bytes grow with N, of ours and of torch's mathematics where there are enough lengths of it."""
    measured = {OURS: [(row.T, row.info["memory_bytes"]) for row in rows]}
    measured[MATH] = [(row.T, row.info["peer_memory_bytes"].get(MATH)) for row in rows]
    fits = {who: fit_power(*zip(*pairs, strict=True)) for who, found in measured.items() if (pairs := _known(found))}
    return {who: fit for who, fit in fits.items() if fit}


def _known(found: list[tuple[int, int | None]]) -> list[tuple[int, int]]:
    return [(N, count) for N, count in found if count]


def growth(fit: Fit) -> str:
    """A slope in words."""
    whole = [power for power in (0, 1, 2) if abs(fit.slope - power) <= NEAR]
    word = POWERS[whole[0]] if whole else BETWEEN.get(math.floor(fit.slope), "more than quadratically")
    return f"as N^{fit.slope:.2f}, {word} ({fit.points} lengths from {fit.first:,} to {fit.last:,})"


def _memory_sentences(rows: list[Row]) -> list[str]:
    found = []
    for pass_ in PASSES:
        of_pass = [row for row in rows if row.info["sweep"] == "memory" and row.info["pass"] == pass_]
        if fits := memory_fits(of_pass) if of_pass else {}:
            grown = "; ".join(f"{who} {growth(fit)}" for who, fit in fits.items())
            found.append(f"{pass_.capitalize()}, one head: memory, {of_pass[0].info['memory_kind']}, grows: {grown}.")
    return found


def attention_table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row.info["peers"]))
    header = ["kind", "D", "H", "H_kv", "B", "M", "N", f"{OURS} ms", *(f"{name} ms" for name in peers), "ratio"]
    header += ["20 to 80 %", "of SDPA", "TFLOP/s", "% of peak", "% of copy", "times floor", "memory"]
    lines = []
    for row in rows:
        info, shape = row.info, row.info["shape"]
        line = ["causal" if info["causal"] else "full", *(f"{shape[name]:,}" for name in ("D", "H", "H_kv"))]
        line += [*(f"{shape[name]:,}" for name in ("B", "M", "N")), number(info["ms_p50"])]
        line += [number(info["peers"][name]) if name in info["peers"] else "-" for name in peers]
        spread = f"{info['ratio_p20']:.2f} to {info['ratio_p80']:.2f}" if info["ratio_p20"] else "-"
        of_sdpa = next(iter(ratios([row], (info["pass"],)).values()), None)
        line += [ratio_text(info["ratio"]), spread, ratio_text(of_sdpa)]
        line += [number(info["tflops"]), number(info["percent_of_peak"])]
        line += [number(percent_of_copy(row)), number(info["ms_p50"] / info["floor_ms"])]
        lines.append([*line, bytes_text(info["memory_bytes"])])
    return table(header, lines)


def memory_table(rows: list[Row]) -> str:
    """Bytes of every contestant."""
    peers = list(dict.fromkeys(name for row in rows for name in row.info["peer_memory_bytes"]))
    lines = [
        [f"{row.T:,}", bytes_text(row.info["memory_bytes"])]
        + [bytes_text(row.info["peer_memory_bytes"].get(name)) for name in peers]
        for row in rows
    ]
    return table(["N", OURS, *peers], lines)


READING = f"""\
*ratio* is the best peer's time over {OURS}'s, beside its range from round to round, and *of SDPA* the same against \
the best of torch's own backends, to which the targets refer; there backward is what training takes beyond forward. \
Work counts visible pairs only. *% of copy* is the bytes that must be moved, as part of what a large copy moves in \
that time."""


def tables(results: Results) -> list[str]:
    """The parts of report.md."""
    rows = results.select(suite="attention")
    if not rows:
        return []
    parts = [f"### Attention against torch's kernels\n\n{READING}"]
    for sweep in results.values("sweep", SWEEPS):
        for pass_ in PASSES:
            if found := _sorted(results, sweep, pass_):
                parts += [f"#### {pass_.capitalize()}, {SWEEPS[sweep]}", attention_table(found)]
                if sweep == "memory":
                    parts += [f"Memory, {found[0].info['memory_kind']}:", memory_table(found)]
    if absent := absent_lines(rows):
        parts += ["#### Peers of attention that did not take part", "\n".join(absent)]
    return parts


def _sorted(results: Results, sweep: str, pass_: str) -> list[Row]:
    rows = results.select(suite="attention", sweep=sweep, pass_=pass_)
    return sorted(rows, key=lambda row: (row.info["shape"]["D"], not row.info["causal"], row.T, row.B))


def summary(results: Results) -> list[str]:
    """What a terminal shows."""
    parts = []
    for pass_ in PASSES:
        if rows := [row for sweep in SWEEPS for row in _sorted(results, sweep, pass_)]:
            lines = [
                [row_name(row), number(row.info["ms_p50"]), row.info["best_peer"] or "-"]
                + [ratio_text(row.info["ratio"]), number(row.info["tflops"])]
                for row in rows
            ]
            shown = table(["problem", f"{OURS} ms", "best peer", "ratio", "TFLOP/s"], lines)
            parts.append(f"{pass_.capitalize()}, attention against torch's kernels\n{shown}")
    if said := sentences(results):
        parts.append("\n".join(f"- {sentence}" for sentence in said))
    return parts
