"""README's performance section, made from the results and from nothing else: ``python -m benchmarks.readme``."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.ledger import RESULTS, Run, kernels, ledger, runs
from benchmarks.marked import Marked
from benchmarks.reporting.fits import geometric_mean
from benchmarks.reporting.recurrence import torch_ratio
from benchmarks.reporting.tables import table
from benchmarks.rows import Results, Row
from benchmarks.shapes import PASSES

README = ROOT / "README.md"
TITLE = "performance: made by `python -m benchmarks.readme` from benchmarks/results/, not by hand"
NOTHING = "**Not measured on a GPU yet.** No GPU figure stands here until one is measured: `make gpu` does."


def section(results: Path = RESULTS) -> str:
    """What stands between the marks."""
    found = runs(results)
    latest = {run.gpu: run for run in found if "benchmarks" in run.found}
    parts = [part for run in latest.values() for part in _of_gpu(run)] or [NOTHING]
    entries = ledger(results)
    verified = sum(entry.verified is not None for entry in entries)
    parts.append(
        f"Of {len(entries)} kernels, {verified} are verified on a GPU as they stand today, "
        f"{sum(entry.timed is not None for entry in entries)} timed (`python -m benchmarks.ledger`)."
    )
    return "\n\n".join(parts)


def _of_gpu(run: Run) -> Iterator[str]:
    results, machine = Results.load(run.path), run.machine
    changed = sorted({file for file in kernels().values() if not run.has_todays(file)})
    yield (
        f"**{run.gpu}**, {run.date}, commit {str(machine.get('commit'))[:10]}, driver {machine.get('driver')}, torch "
        f"{machine.get('torch')}, triton {machine.get('triton')}, cuDNN {machine.get('cudnn')}"
        + (f"; since then {', '.join(changed)} changed" if changed else "")
        + f" ([all rows]({run.path.relative_to(ROOT).as_posix() if run.path.is_relative_to(ROOT) else run.path.name}))."
    )
    lines = [*_lines(results, "recurrence", "torch.nn (cuDNN)", torch_ratio)]
    lines += _lines(results, "attention", "the best peer", lambda row: row.info["ratio"])
    if lines:
        header = ["what", "dtype", "pass", "against", "shapes", "geometric mean", "least", "most"]
        yield "How many times as fast (above 1, seqcore is faster):"
        yield table(header, lines)


def _lines(
    results: Results, suite: str, against: str, ratio: Callable[[Row], float | None]
) -> Iterator[list[str]]:
    """A line for each operation, dtype and pass; ``ratio`` is the time of who it is ``against`` over ours."""
    rows = results.select(suite=suite)
    groups = sorted({(row.op, row.info["dtype"], PASSES.index(row.info["pass"])) for row in rows})
    for op, dtype, pass_index in groups:
        pass_ = PASSES[pass_index]
        group = [row for row in rows if (row.op, row.info["dtype"], row.info["pass"]) == (op, dtype, pass_)]
        ratios = [value for row in group if (value := ratio(row)) is not None]
        if ratios:
            spread = (f"{value:.2f}" for value in (geometric_mean(ratios), min(ratios), max(ratios)))
            yield [op, dtype, pass_, against, f"{len(ratios)}", *spread]


def is_current(readme: Path = README, results: Path = RESULTS) -> bool:
    return Marked(TITLE, readme).inside().strip() == section(results)


def write(readme: Path = README, results: Path = RESULTS) -> None:
    Marked(TITLE, readme).write(section(results))


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__).parse_args(arguments)
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
