"""The verdicts of a report in a few sentences, the most asked first."""

import statistics

from benchmarks.layers import TORCH
from benchmarks.reporting import answers, attention, recurrence
from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.fits import geometric_mean
from benchmarks.rows import OURS, Results, Row
from benchmarks.shapes import PASSES

# After ratios, for whoever reads no further than the first lines.
BETTER = f"above 1, {OURS} is faster"


def in_short(results: Results) -> list[str]:
    """At most eight sentences; what was not measured is not spoken of, but counted at the end."""
    found = [
        *answers.slope_sentences(results, "batch_fixed")[-1:],
        *answers.crossover_sentences(results, "batch_fixed")[-1:],
        _recurrences(results.select(suite="recurrence")),
        _floors(results.select(suite="recurrence")),
        _attention(results.select(suite="attention")),
        _targets(results),
        _models(results.select(suite="models")),
        _missing(results),
    ]
    return [sentence for sentence in found if sentence]


def _by_pass(rows: list[Row], say) -> str:
    """What ``say`` says of the rows of each pass."""
    groups = {pass_: [row for row in rows if row.info["pass"] == pass_] for pass_ in PASSES}
    return ", ".join(f"{pass_} {say(group)}" for pass_, group in groups.items() if group)


def _recurrences(rows: list[Row]) -> str | None:
    rows = recurrence.in_means(rows)
    mean = lambda group: f"**{recurrence.mean_ratio(group):.2f}** over {len(group)} shapes"
    return rows and f"Recurrences, {TORCH}'s time over {OURS}'s, geometric means: {_by_pass(rows, mean)}; {BETTER}."


def _floors(rows: list[Row]) -> str | None:
    rows = [row for row in rows if row.info["step_floors"]]
    times = lambda group: f"**{statistics.median(recurrence.times_floor(group).values()):.2f}**"
    return rows and f"A recurrence's time over the least its steps can take here, medians: {_by_pass(rows, times)}."


def _attention(rows: list[Row]) -> str | None:
    rows = attention.in_means(rows)
    mean = lambda group: f"**{geometric_mean([row.info['ratio'] for row in group]):.2f}** over {len(group)} shapes"
    return rows and f"Attention, the best peer's time over {OURS}'s, geometric means: {_by_pass(rows, mean)}; {BETTER}."


def _targets(results: Results) -> str | None:
    reached = [target.met(results) for target in attention.TARGETS if target.reached(results)]
    count = len(attention.TARGETS)
    return reached and f"Of {count} targets of attention {len(reached)} are measured, {sum(reached)} met."


def _models(rows: list[Row]) -> str | None:
    said = "; ".join(f"{NAMES[row.op]} **{row.info['ratio']:.2f}**" for row in rows)
    return rows and f"Training a model of characters, {TORCH}'s time over {OURS}'s: {said}; {BETTER}."


def _missing(results: Results) -> str | None:
    count = len(results.not_measured)
    return f"Not measured: {count}; which, and why, stands at the end." if count else None
