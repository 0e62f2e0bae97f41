"""The report: report.html, the same as report.md with PNG plots beside it, from pytest-benchmark's JSON alone.

``python -m benchmarks.report FILE.json... [--profile FILE.json] [--out DIR] [--no-plots]``
"""

import argparse
import sys
from pathlib import Path

from benchmarks.layers import TORCH
from benchmarks.reporting import answers, attention, page, profiles, recurrence
from benchmarks.reporting.answers import NAMES, PASS_NAMES, SWEEPS
from benchmarks.reporting.page import Plot
from benchmarks.reporting.short import in_short
from benchmarks.reporting.tables import bytes_text, number, table
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import OPS, PASSES
from seqcore.files import write_whole


def times_table(results: Results, sweep: str, pass_: str) -> str:
    """The short one for a terminal: milliseconds of each layer at each T, and how ours compares with torch.nn."""
    rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
    found = {(row.op, row.T, row.B): row for row in rows}
    ops = [op for op in OPS if any(row.op == op for row in rows)]
    lines = []
    for T, B in sorted({(row.T, row.B) for row in rows}):
        line = [f"{T:,}", f"{B:,}"]
        for op in ops:
            row = found.get((op, T, B))
            line += [number(row.ms), f"{row.times[TORCH] / row.times[OURS]:.2f}"] if row else ["-", "-"]
        lines.append(line)
    return table(["T", "B", *(cell for op in ops for cell in (f"{NAMES[op]} ms", "ratio"))], lines)


def detail_table(rows: list[Row]) -> str:
    peers = list(dict.fromkeys(name for row in rows for name in row.info["peers"]))
    header = ["layer", "T", "B", f"{OURS} ms", "p20 to p80", *(f"{name} ms" for name in peers), "ratio", "tokens/s"]
    header += ["µs/step", "TFLOP/s", "% of peak", "times floor", "memory", "dependent steps"]
    lines = []
    for row in rows:
        info = row.info
        line = [NAMES[row.op], f"{row.T:,}", f"{row.B:,}", number(info["ms_p50"])]
        line.append(f"{number(info['ms_p20'])} to {number(info['ms_p80'])}")
        line += [number(info["peers"][name]) if name in info["peers"] else "-" for name in peers]
        line += [f"{info['ratio']:.2f}", number(info["tokens_per_s"]), number(info["us_per_step"])]
        line += [number(info["tflops"]), number(info["percent_of_peak"]), number(info["ms_p50"] / info["floor_ms"])]
        line += [bytes_text(info["memory_bytes"]), f"{info['dependent_steps']:,}"]
        lines.append(line)
    return table(header, lines)


def slope_table(results: Results, sweep: str) -> str:
    lines = [
        [NAMES[line["op"]], line["pass"], f"{fit.slope:.2f}", f"{fit.r_squared:.3f}", f"{fit.points}"]
        + [f"{fit.first:,} to {fit.last:,}"]
        for line in answers.slopes(results, sweep)
        for fit in [line["fit"]]
    ]
    return table(["layer", "pass", "slope", "R²", "points", "T"], lines)


def models_table(results: Results) -> str:
    lines = []
    for row in results.select(suite="models"):
        info = row.info
        held_out = info["curves"][OURS]["held_out"]
        lines.append(
            [NAMES[row.op], f"{info['parameters']:,}", f"{info['shape']['H']}", f"{info['steps']}"]
            + [number(info["ms_p50"]), number(info["tokens_per_s"])]
            + [number(row.tokens / info["peers"][TORCH] * 1e3), f"{info['ratio']:.2f}"]
            + [number(info["ms_p50"] / info["floor_ms"])]
            + [f"{held_out[0]['loss']:.2f} → {held_out[-1]['loss']:.2f}", f"{info['max_loss_difference']:.1e}"]
        )
    header = ["model", "parameters", "width", "steps", "ms a step", f"tokens/s {OURS}", f"tokens/s {TORCH}", "ratio"]
    return table([*header, "times floor", "held-out loss", "largest difference of loss"], lines)


def machine_lines(results: Results) -> list[str]:
    machine = results.machine
    named = ["gpu", "cpu", "cores", "threads", "driver", "cuda", "cudnn", "torch", "triton", "python", "commit"]
    lines = [f"- {name}: {machine[name]}" for name in named if machine.get(name) is not None]
    if machine.get("clocks"):
        clocks = ", ".join(f"{value:,.0f} {name.replace('_', ' ')}" for name, value in machine["clocks"].items())
        lines.append(f"- clocks at the end: {clocks}")
    limits = next((row.info for row in results.rows if "peak_tflops" in row.info), None)
    if limits:
        lines.append(f"- measured limits: {number(limits['peak_tflops'])} TFLOP/s ({limits['peak_dtype']} product), ")
        lines[-1] += f"{number(limits['copy_gb_per_s'])} GB/s (copy, reading and writing both counted)"
        if limits.get("launch_us"):
            lines[-1] += f", {number(limits['launch_us'])} µs a launch in a CUDA graph"
    if machine.get("peers"):
        lines.append(f"- peers: {'; '.join(f'{name} {version}' for name, version in machine['peers'].items())}")
    return [*lines, f"- date: {results.date}"]


def missing_lines(results: Results) -> list[str]:
    """What was not measured and why, those of one reason together."""
    found: dict[str, list[str]] = {}
    for case in results.not_measured:
        found.setdefault(f"{case['outcome']}, {case['reason']}", []).append(case["name"])
    others = lambda names: f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"- {names[0]}{others(names)}: {reason}" for reason, names in found.items()]


def report(results: Results, plots: list[Plot]) -> str:
    """All of report.md."""
    sweeps = results.values("sweep", SWEEPS)
    parts = ["# What stepping through time costs", *filter(None, [answers.caveat(results), answers.busy(results)])]
    if said := in_short(results):
        parts += ["## In short", "\n".join(f"- {sentence}" for sentence in said)]
    parts += ["## Measured on", "\n".join(machine_lines(results)), "## Answers"]
    for title, sentences in (
        ("How time grows with length", [s for sweep in sweeps for s in answers.slope_sentences(results, sweep)]),
        ("Where attention stops being cheaper", [s for w in sweeps for s in answers.crossover_sentences(results, w)]),
        ("What a step costs beside attention", answers.step_sentences(results)),
        ("How much batch fills the machine", answers.filling_sentences(results)),
        (f"Recurrences against {TORCH}", recurrence.sentences(results)),
        ("Attention against torch's kernels", attention.sentences(results)),
        ("Trained on real text", answers.model_sentences(results)),
    ):
        if sentences:
            parts += [f"### {title}", "\n".join(f"- {sentence}" for sentence in sentences)]
    if plots:
        parts += ["## Plots", *(f"![{plot.title}]({plot.path.name})\n*{plot.caption}*" for plot in plots)]
    if results.rows:
        parts += ["## Tables", READING]
    parts += recurrence.tables(results) + attention.tables(results)
    for sweep in sweeps:
        parts += [f"### Slope of log time over log T, {SWEEPS[sweep]}", slope_table(results, sweep)]
    for sweep, name in {**SWEEPS, "batch_sweep": "batch varied"}.items():
        for pass_ in PASSES:
            rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
            if rows:
                rows.sort(key=lambda row: OPS.index(row.op))
                parts += [f"### {PASS_NAMES[pass_].capitalize()}, {name}", detail_table(rows)]
    if results.select(suite="models"):
        parts += ["### Models", models_table(results)]
    if results.not_measured:
        parts += ["## Not measured", "\n".join(missing_lines(results))]
    return "\n\n".join(parts) + "\n"


READING = f"""\
Times are medians of interleaved rounds. Slopes, crossovers and plots take, for each layer and size, whoever is \
fastest on this machine; the tables show {OURS} and its peers apart. *ratio* is the best peer's time over {OURS}'s: \
above 1, {OURS} is faster. *times floor* is the time over the least this machine could take for the same products, \
bytes and launches; a CPU keeps small problems in its caches and may beat the bytes. *memory* is what one pass needs \
beyond weights, input and output's gradient: on a GPU the peak allocated, on a CPU what autograd saves for backward. \
*dependent steps* is the longest chain of operations of which each needs the one before. Before its time counted, \
every layer was compared with float64, over at least its first steps, and lay within the error budget."""


def write_report(
    sources: list[Path], out: Path, with_plots: bool = True, profile: Path | None = None
) -> tuple[Results, list[Path]]:
    """Write report.html, report.md and the plots into ``out``; say what was read, and which files were written."""
    results = Results.load(*sources)
    profiled = profiles.load(profile, results.machine) if profile else []
    if not results.rows:
        raise ValueError(f"no rows of these benchmarks in {sources[0]}; make it with `python -m benchmarks`")
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, out, profiled) if with_plots else []
    text = report(results, drawn)
    written = {out / "report.html": page.render(text, drawn), out / "report.md": text}
    for path, content in written.items():
        write_whole(path, content)
    return results, [*written, *(plot.path for plot in drawn)]


def draw(results: Results, out: Path, profiled: list[profiles.Profile]) -> list[Plot]:
    """Every plot; without matplotlib none, and a line that says so: words and tables need no more than Python."""
    try:
        from benchmarks.reporting import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("No plots: matplotlib is not installed.", file=sys.stderr)
        return []
    return plots.draw_all(results, out, profiled)


def print_summary(results: Results, written: list[Path]) -> None:
    """What a terminal shows at the end."""
    for sweep in results.values("sweep", SWEEPS):
        for pass_ in PASSES:
            rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
            if rows:
                width = rows[0].info["shape"]["H"]
                print(f"\n{PASS_NAMES[pass_].capitalize()}, {answers.sweep_name(rows)}, H = {width}")
                print(times_table(results, sweep, pass_))
        for sentence in answers.slope_sentences(results, sweep) + answers.crossover_sentences(results, sweep):
            print(f"- {sentence}")
    for part in recurrence.summary(results) + attention.summary(results):
        print(f"\n{part}")
    if results.select(suite="models"):
        print(f"\n{models_table(results)}")
        print("\n".join(f"- {sentence}" for sentence in answers.model_sentences(results)))
    if results.not_measured:
        print(f"\n{len(results.not_measured)} not measured; the report says which and why.")
    for warning in filter(None, [answers.caveat(results), answers.busy(results)]):
        print(f"\n{warning.replace('**', '')}")
    print("\nWritten:\n" + "\n".join(f"  {path}" for path in written))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Draw the report again.")
    parser.add_argument("json", type=Path, nargs="+", help="pytest-benchmark's JSON, of one or more runs")
    parser.add_argument("--profile", type=Path, help="kernels as profiled, for the roofline and the split of a step")
    parser.add_argument("--out", type=Path, help="folder to write to (default: beside the first)")
    parser.add_argument("--no-plots", action="store_true", help="tables and words only")
    options = parser.parse_args(arguments)
    out = options.out or options.json[0].parent
    try:
        results, written = write_report(options.json, out, not options.no_plots, options.profile)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print_summary(results, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
