"""The study's report, from its JSON files alone: report.md with PNG plots beside it, and report.html by itself."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import BUSY_CORES
from benchmarks.reporting import page
from benchmarks.reporting.page import Plot
from benchmarks.reporting.plot_kit import LOOK, plt
from benchmarks.reporting.tables import table
from benchmarks.study.experiment import CHANCE, Row, Verdict
from benchmarks.study.experiments import NAMES, load
from seqcore.files import read_json, write_whole

TITLE = "What is taught about recurrence and attention, measured"
MARKS = {True: "✓", False: "✗", None: "?"}
MACHINE = ("gpu", "cpu", "cores", "driver", "cuda", "cudnn", "torch", "triton", "python", "commit")
READING = f"""\
Each section takes claims as they are commonly made, says how they were put to the test, shows what came out, and \
gives verdicts that a program derived from the numbers: another run, another machine, other sizes may give other ones. \
✓ is *holds*, ✗ *does not hold*, ? *not decided here*: the sizes do not reach what is claimed, or repeats do not part \
clearly enough. Where repeats of two things are compared, it is by the exact rank-sum test: if there were no \
difference, chance would decide one time in {1 / CHANCE:.0f}, half of the times either way. Numbers are medians over \
repeats, in brackets the least and the largest."""
SMALL = """\
**Measured on a CPU, at sizes that end within ten minutes.** What is learned, forgotten or exploding is the same \
mathematics everywhere, at larger sizes and with more training maybe with another outcome; times and rates are this \
machine's, say nothing about a GPU, and are those of torch's own operators and plain PyTorch: none of seqcore's \
kernels runs here. Torch's LSTM is one operator of oneDNN there, its RNN and GRU are loops over the steps."""
TINY = "**At the sizes 'tiny', which are for tests and teach nothing: {}.**"


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

    @property
    def conditions(self) -> str:
        """At which sizes, on what, and with which versions it was measured."""
        machine = self.data["machine"]
        commit, _, changed = (machine.get("commit") or "unknown").partition("-")
        return (
            f"{len(self.rows)} measurements at the sizes '{self.data['sizes']}', "
            f"{machine.get('gpu') or machine.get('cpu')}, torch {machine.get('torch')}, commit {commit[:12]}"
            f"{', changed' if changed else ''}, {self.data['date'][:10]}"
        )


@dataclass
class Section:
    """What the report says of one experiment; only why not, if its rows cannot be judged or drawn."""

    study: Study
    verdicts: list[Verdict] = field(default_factory=list)
    plot: Plot | None = None
    table: str = ""
    error: str = ""

    @property
    def title(self) -> str:
        return load(self.study.name).TITLE

    def text(self, number: int) -> list[str]:
        return [
            f"## {number}. {self.title}",
            f"**Question.** {load(self.study.name).QUESTION}",
            f"**How it was measured.** {self.study.data['how']}",
            f"![{self.plot.title}]({self.plot.path.name})\n*{self.plot.caption}*",
            *(
                f"**{MARKS[verdict.holds]} “{verdict.claim}” {verdict.word.capitalize()}.** {verdict.sentence}"
                for verdict in self.verdicts
            ),
            self.table,
        ]


def read(out: Path) -> list[Study]:
    """Every experiment that has a file in ``out``, in the report's order.

    Raises:
        ValueError: for a file that is not an experiment's.
    """
    found = []
    for path in (out / f"{name}.json" for name in NAMES):
        if path.exists():
            try:
                data = read_json(path)
            except ValueError as error:
                raise ValueError(f"{error}; measure it again") from None
            own = data.keys() if isinstance(data, dict) else set()
            missing = {"rows", "sizes", "how", "machine", "date", "seconds"} - own
            if missing:
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; measure it again")
            found.append(Study(path.stem, data))
    return found


def write(out: Path) -> tuple[list[Section], list[Path]]:
    """Write the report of what is in ``out`` beside it; return what it says and the files.

    Raises:
        ValueError: if no experiment is there, or a file is not an experiment's.
    """
    studies = read(out)
    if not studies:
        raise ValueError(f"no experiment's JSON in {out}; make them with `python -m benchmarks.study`")
    sections = [_section(study, out) for study in studies]
    plots = [section.plot for section in sections if section.plot]
    text = report(sections)
    written = {out / "report.html": page.render(text, plots), out / "report.md": text}
    for path, content in written.items():
        write_whole(path, content)
    return sections, [*written, *(plot.path for plot in plots)]


def _section(study: Study, out: Path) -> Section:
    # Whatever is wrong with one experiment's rows, the others are reported.
    try:
        experiment = load(study.name)
        return Section(study, experiment.verdicts(study.rows), _draw(study, out), experiment.table(study.rows))
    except Exception as error:
        return Section(study, error=f"{type(error).__name__}: {error}")


def _draw(study: Study, out: Path) -> Plot:
    with plt.rc_context({**LOOK, "svg.hashsalt": study.name, "savefig.bbox": "tight"}):
        figure, caption = load(study.name).draw(study.rows)
        path, svg = out / f"{study.name}.png", io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(path)
        plt.close(figure)
    where = f"Drawn from [{study.file}]({study.file}): {study.conditions}."
    return Plot(path, load(study.name).TITLE, f"{caption} {where}", svg.getvalue())


def report(sections: list[Section]) -> str:
    """All of report.md."""
    whole = [section for section in sections if not section.error]
    studies = [section.study for section in sections]
    parts = [f"# {TITLE}", READING, *_warnings(studies)]
    lines = [
        [verdict.claim, f"{MARKS[verdict.holds]} {verdict.word}", f"{number}"]
        for number, section in enumerate(whole, 1)
        for verdict in section.verdicts
    ]
    if lines:
        parts += ["## In short", table(["claim", "verdict", "section"], lines, words=True)]
    missing = [name for name in NAMES if name not in {study.name for study in studies}]
    if missing:
        parts.append(f"Not measured in this run: {', '.join(missing)}.")
    parts += [f"**{s.study.file} cannot be reported:** {s.error}." for s in sections if s.error]
    for number, section in enumerate(whole, 1):
        parts += section.text(number)
    parts += ["## Measured on", "\n".join(_machines(studies)), _again(studies)]
    return "\n\n".join(parts) + "\n"


def _warnings(studies: list[Study]) -> Iterable[str]:
    if any(not study.data["machine"].get("gpu") for study in studies):
        yield SMALL
    if tiny := [study.file for study in studies if study.data["sizes"] == "tiny"]:
        yield TINY.format(", ".join(tiny))
    busy = {study.file: max((row.get("busy_cores") or 0 for row in study.rows), default=0) for study in studies}
    if busy := {file: cores for file, cores in busy.items() if cores > BUSY_CORES}:
        yield (
            f"**The machine was busy:** other programs took up to {max(busy.values()):.1f} of its cores while times "
            f"were taken, so those in {', '.join(busy)} are too long, and uncertain."
        )


def _machines(studies: list[Study]) -> list[str]:
    """A line for each machine and commit that something was measured on."""
    found: dict[str, list[Study]] = {}
    for study in studies:
        machine = study.data["machine"]
        said = ", ".join(f"{name} {machine[name]}" for name in MACHINE if machine.get(name) is not None)
        found.setdefault(said, []).append(study)
    return [
        f"- {', '.join(study.name for study in of)}: {said}; {of[0].data['date'][:10]}; "
        f"{sum(study.data['seconds'] for study in of):,.0f} s of one process's time"
        for said, of in found.items()
    ]


def _again(studies: list[Study]) -> str:
    return (
        "Every figure, table and verdict above is made from the JSON file that its caption names; `python -m "
        "benchmarks.study --report` makes them again without measuring, `python -m benchmarks.study NAME` measures one "
        f"experiment again: {', '.join(f'`{study.name}`' for study in studies)}."
    )
