"""The study's report, from its JSON files alone: report.md with PNG plots beside it, and report.html by itself."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import BUSY_CORES
from benchmarks.reporting import page
from benchmarks.reporting.page import Plot
from benchmarks.reporting.plot_kit import LOOK, plt
from benchmarks.reporting.tables import table
from benchmarks.study.experiment import Row, Verdict
from benchmarks.study.experiments import NAMES, load

TITLE = "What is taught about recurrence and attention, measured"
MARKS = {True: "✓", False: "✗", None: "?"}
MACHINE = ("gpu", "cpu", "cores", "driver", "cuda", "cudnn", "torch", "triton", "python", "commit")
READING = """\
Each section takes a claim as it is commonly made, says how it was put to the test, shows what came out, and gives a \
verdict that a program derived from the numbers: another run, another machine, other sizes may give another one. ✓ is \
*holds*, ✗ *does not hold*, ? *not decided here*: the repeats overlap, or the sizes do not reach what is claimed. \
Numbers are medians over repeats, in brackets the least and the largest."""
SMALL = """\
**Measured on a CPU, at sizes that end within ten minutes.** What is learned, forgotten or exploding is the same \
mathematics everywhere, at larger sizes maybe with another outcome; times and rates are this machine's, say nothing \
about a GPU, and are those of torch's own operators and plain PyTorch: none of seqcore's kernels runs here. Torch's \
LSTM is one operator of oneDNN there, its RNN and GRU are loops over the steps, so that times between these compare \
implementations as much as cells."""


@dataclass(frozen=True)
class Study:
    """One experiment as its JSON file holds it."""

    name: str
    data: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    @property
    def file(self) -> str:
        return f"{self.name}.json"

    def verdicts(self) -> list[Verdict]:
        return load(self.name).verdicts(self.rows)

    def how(self) -> str:
        experiment = load(self.name)
        return experiment.how(experiment.SIZES[self.data["sizes"]])


def read(out: Path) -> list[Study]:
    """Every experiment that has a file in ``out``, in the report's order."""
    found = []
    for name in NAMES:
        path = out / f"{name}.json"
        if path.exists():
            found.append(Study(name, json.loads(path.read_text(encoding="utf-8"))))
    return found


def write(out: Path) -> list[Path]:
    """Write the report of what is in ``out`` beside it; return the files.

    Raises:
        ValueError: if no experiment is there.
    """
    studies = read(out)
    if not studies:
        raise ValueError(f"no experiment's JSON in {out}; make them with `python -m benchmarks.study`")
    plots = {study.name: _draw(study, out) for study in studies}
    text = report(studies, plots)
    written = {out / "report.html": page.render(text, list(plots.values())), out / "report.md": text}
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    return [*written, *(plot.path for plot in plots.values())]


def _draw(study: Study, out: Path) -> Plot:
    with plt.rc_context({**LOOK, "svg.hashsalt": study.name, "savefig.bbox": "tight"}):
        figure, caption = load(study.name).draw(study.rows)
        path, svg = out / f"{study.name}.png", io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(path)
        plt.close(figure)
    where = f"Drawn from [{study.file}]({study.file}): {_conditions(study)}."
    return Plot(path, load(study.name).TITLE, f"{caption} {where}", svg.getvalue())


def _conditions(study: Study) -> str:
    machine, count = study.data["machine"], len(study.rows)
    what = machine.get("gpu") or machine.get("cpu")
    commit, _, changed = (machine.get("commit") or "unknown").partition("-")
    return (
        f"{count} measurements at the sizes '{study.data['sizes']}', {what}, torch {machine.get('torch')}, commit "
        f"{commit[:12]}{', changed' if changed else ''}, {study.data['date'][:10]}"
    )


def report(studies: list[Study], plots: dict[str, Plot]) -> str:
    """All of report.md."""
    parts = [f"# {TITLE}", READING]
    if any(not study.data["machine"].get("gpu") for study in studies):
        parts.append(SMALL)
    parts += _busy(studies)
    verdicts = {study.name: study.verdicts() for study in studies}
    lines = [
        [verdict.claim, f"{MARKS[verdict.holds]} {verdict.word}", f"{number}"]
        for number, study in enumerate(studies, 1)
        for verdict in verdicts[study.name]
    ]
    parts += ["## In short", table(["claim", "verdict", "section"], lines, words=True)]
    missing = [name for name in NAMES if name not in verdicts]
    if missing:
        parts.append(f"Not measured in this run: {', '.join(missing)}.")
    for number, study in enumerate(studies, 1):
        parts += _section(number, study, verdicts[study.name], plots[study.name])
    parts += ["## Measured on", "\n".join(_machine(studies)), *_again(studies)]
    return "\n\n".join(parts) + "\n"


def _section(number: int, study: Study, verdicts: list[Verdict], plot: Plot) -> list[str]:
    experiment = load(study.name)
    return [
        f"## {number}. {experiment.TITLE}",
        f"**Question.** {experiment.QUESTION}",
        f"**How it was measured.** {study.how()}",
        f"![{plot.title}]({plot.path.name})\n*{plot.caption}*",
        *(
            f"**{MARKS[verdict.holds]} “{verdict.claim}” {verdict.word.capitalize()}.** {verdict.sentence}"
            for verdict in verdicts
        ),
        experiment.table(study.rows),
    ]


def _busy(studies: list[Study]) -> list[str]:
    cores_of = lambda study: study.data["machine"].get("busy_cores_at_start") or 0.0
    busy = [study for study in studies if load(study.name).ALONE and cores_of(study) > BUSY_CORES]
    if not busy:
        return []
    cores = max(map(cores_of, busy))
    return [
        f"**The machine was busy** as the run began: other programs took {cores:.1f} of its cores, so the times in "
        f"{', '.join(load(study.name).TITLE for study in busy)} are too long, and uncertain."
    ]


def _machine(studies: list[Study]) -> list[str]:
    machine = studies[0].data["machine"]
    lines = [f"- {name}: {machine[name]}" for name in MACHINE if machine.get(name) is not None]
    seconds = sum(study.data["seconds"] for study in studies)
    return [*lines, f"- date: {studies[0].data['date']}", f"- work: {seconds:,.0f} s of one process's time"]


def _again(studies: list[Study]) -> list[str]:
    return [
        "Every figure, table and verdict above is made from the JSON file that its caption names; `python -m "
        "benchmarks.study --report` makes them again without measuring, `python -m benchmarks.study NAME` measures one "
        f"experiment again: {', '.join(f'`{study.name}`' for study in studies)}."
    ]
