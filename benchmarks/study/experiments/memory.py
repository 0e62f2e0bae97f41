"""How far back the layers remember, at equal parameters: delayed recall, the adding problem, copying."""

import math
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure

from benchmarks.models import count_parameters
from benchmarks.reporting.plot_kit import name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Spread, Verdict, order_of, select, spread, values
from benchmarks.study.models import SequenceModel, width_for
from benchmarks.study.tasks import ALPHABET, CHANCE, COPIED, OUTPUTS, SYMBOLS, TASKS, TITLES
from benchmarks.study.training import Trainer
from seqcore.nn.init import forget_gate_bias_, orthogonal_recurrent_

TITLE = "How far back layers remember"
QUESTION = (
    "Something is shown once and needed much later. Over how many steps in between do an RNN, a GRU, an LSTM and "
    "attention of equal size learn to carry it?"
)
ALONE = False
# Solved: this share right. What counts as remembered, and as long.
SOLVED, ENOUGH = 0.99, 0.9
HUNDREDS, THOUSANDS = 100, 1000
HELD_OUT, EVERY = 99, 50
LONG = "lstm_long"
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", LONG: "LSTM, ln(lag)", "attention": "attention"}
LSTMS = ("lstm", LONG)


@dataclass(frozen=True)
class Sizes:
    """``steps`` is the most updates, each of ``batch`` sequences, that a model gets to learn one task at one lag.

    Unless it is among ``own_steps``, because at its rate it needs more.
    """

    lags: dict[str, tuple[int, ...]]
    parameters: int
    steps: int
    batch: int
    held_out: int
    seeds: int
    learning_rate: float = 0.01
    # The plain RNN learns nothing at all at the others' rate, and attention less often.
    own_rates: dict[str, float] = field(default_factory=lambda: {"rnn": 0.001, "attention": 0.005})
    own_steps: dict[str, int] = field(default_factory=dict)

    def rate(self, op: str) -> float:
        return self.own_rates.get(op, self.learning_rate)

    def most(self, op: str) -> int:
        return self.own_steps.get(op, self.steps)


SIZES = {
    "tiny": Sizes({"recall": (2, 4), "adding": (4,)}, 1000, 4, 4, 16, 2),
    "cpu": Sizes(dict.fromkeys(TASKS, (10, 30, 100)), 8000, 500, 32, 256, 3),
    "gpu": Sizes(
        dict.fromkeys(TASKS, (10, 30, 100, 300, 1000)),
        parameters=100_000,
        steps=3000,
        batch=128,
        held_out=1024,
        seeds=5,
        learning_rate=0.003,
        own_rates={"rnn": 0.0003, "attention": 0.001},
        own_steps={"rnn": 5000},
    ),
}


def how(sizes: Sizes) -> str:
    return (
        f"Delayed recall: one of {SYMBOLS} symbols, blanks, and after the lag the question which it was. Adding: a "
        "number in 0 … 1 at each step, two of them marked, their sum wanted at the end, right if within 0.1. Copying: "
        f"{COPIED} symbols, to be repeated in order, each a lag later. For every task and lag a model of about "
        f"{sizes.parameters:,} parameters, as near as widths come, is trained from new: one recurrent layer, or two "
        f"Transformer layers with causal attention; Adam at {sizes.learning_rate} (the RNN at {sizes.rate('rnn')}, "
        f"attention at {sizes.rate('attention')}), gradients clipped to norm 1, at most {sizes.steps:,} updates (the "
        f"RNN {sizes.most('rnn'):,}) of {sizes.batch} new sequences each, fewer once {SOLVED:.0%} of {sizes.held_out} "
        f"held-out ones are right, looked at every {EVERY} updates. The RNN begins with orthogonal recurrent weights; "
        "the LSTM, twice here, with a forget-gate bias of 1 and, as one would choose who knows the lag, of ln(lag), at "
        f"which a state lasts about that long; the GRU with torch's own weights. {sizes.seeds} seeds. A lag counts as "
        f"learned if the median over seeds is at least {ENOUGH:.0%} right there and at every shorter lag; a task whose "
        "shortest lag a layer does not learn says nothing about its memory, and what is not learned here may be with "
        "more training."
    )


def cases(sizes: Sizes) -> list[Case]:
    found = [
        {"task": task, "op": op, "lag": lag, "seed": seed}
        for task, lags in sizes.lags.items()
        for lag in lags
        for op in NAMES
        for seed in range(sizes.seeds)
    ]
    # The longest first, so that no process is left with one of them at the end.
    return sorted(found, key=lambda case: -case["lag"])


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    task, op, lag, seed = case["task"], case["op"], case["lag"], case["seed"]
    alphabet = 0 if task == "adding" else ALPHABET
    torch.manual_seed(seed)
    body = "lstm" if op in LSTMS else op
    width = width_for(body, 2, OUTPUTS[task], sizes.parameters, alphabet)
    model = SequenceModel(body, 2, OUTPUTS[task], width, alphabet)
    if op in LSTMS:
        forget_gate_bias_(model.body, math.log(lag) if op == LONG else 1.0)
    elif op == "rnn":
        orthogonal_recurrent_(model.body)
    model.to(device)
    draw = TASKS[task]
    held_out = draw(lag, sizes.held_out, device, HELD_OUT, seed)
    trainer = Trainer(model, lambda step: draw(lag, sizes.batch, device, seed, step), sizes.rate(op))
    trainer.run(sizes.most(op), lambda: trainer.evaluate(held_out)["accuracy"] >= SOLVED, EVERY)
    return {
        **trainer.evaluate(held_out),
        "updates": len(trainer.losses),
        "parameters": count_parameters(model),
        "width": width,
        "chance": CHANCE[task],
        "most": sizes.most(op),
        "batch": sizes.batch,
        "rate": sizes.rate(op),
    }


def reach(rows: list[Row], task: str, op: str) -> int:
    """The longest lag learned, every shorter one being learned as well; 0 if not even the shortest is."""
    longest = 0
    for lag in sorted(values(select(rows, task=task, op=op), "lag")):
        if _accuracy(rows, task, op, lag).median < ENOUGH:
            break
        longest = lag
    return longest


def _accuracy(rows: list[Row], task: str, op: str, lag: int) -> Spread:
    return spread(row["accuracy"] for row in select(rows, task=task, op=op, lag=lag))


Reached = dict[str, dict[str, int]]


def verdicts(rows: list[Row]) -> list[Verdict]:
    tasks = values(rows, "task")
    longest = {task: max(values(select(rows, task=task), "lag")) for task in tasks}
    reached = {op: {task: reach(rows, task, op) for task in tasks} for op in NAMES}
    return [
        _hundreds(rows, reached, longest),
        _thousands(rows, reached, longest),
        _plain(rows, reached, longest),
        _weaker(rows, reached),
        _bias(rows, reached, longest),
        _attention(rows, reached, longest),
    ]


def _said(rows: list[Row], ops: tuple[str, ...], reached: Reached, longest: dict[str, int]) -> str:
    """The lags learned, and with how much training."""
    each = [
        f"{NAMES[op]}: {', '.join(f'{TITLES[task]} {_lag(reached[op][task], longest[task])}' for task in longest)}"
        for op in ops
    ]
    return f"Longest lags learned {_within(rows, *ops)}: {'. '.join(each)}."


def _within(rows: list[Row], op: str, *_: str) -> str:
    row = select(rows, op=op)[0]
    return f"within {row['most']:,} updates of {row['batch']} sequences"


def _given(rows: list[Row], op: str) -> str:
    """What every claim on what is learned hangs on."""
    return f", given {select(rows, op=op)[0]['most']:,} updates"


def _lag(reached: int, longest: int) -> str:
    if not reached:
        return "not learned"
    return f"{reached:,} (the longest tried)" if reached == longest else f"{reached:,}"


def _hundreds(rows: list[Row], reached: Reached, longest: dict[str, int]) -> Verdict:
    claim = f"LSTM and GRU learn to remember over hundreds of steps{_given(rows, 'gru')}."
    said = _said(rows, ("gru", *LSTMS), reached, longest)
    if max(longest.values()) < HUNDREDS:
        return Verdict(claim, None, f"No lag of {HUNDREDS} or more was tried. {said}")
    best = {"LSTM": max(max(reached[op].values()) for op in LSTMS), "GRU": max(reached["gru"].values())}
    able = [name for name, lag in best.items() if lag >= HUNDREDS]
    who = {0: "Neither gets", 1: f"Only the {able[0] if able else ''} gets", 2: "Both get"}[len(able)]
    holds = len(able) == 2 if all(best.values()) else None
    return Verdict(claim, holds, f"{who} to a lag of {HUNDREDS} on at least one task. {said}")


def _thousands(rows: list[Row], reached: Reached, longest: dict[str, int]) -> Verdict:
    claim = f"LSTM and GRU do not learn to remember over thousands of steps{_given(rows, 'gru')}."
    if max(longest.values()) < THOUSANDS:
        return Verdict(claim, None, f"The longest lag tried is {max(longest.values()):,}.")
    found = {
        (op, task, lag): _accuracy(rows, task, op, lag)
        for op in ("gru", *LSTMS)
        for task in longest
        for lag in values(select(rows, task=task, op=op), "lag")
        if lag >= THOUSANDS and reached[op][task]
    }
    if not found:
        return Verdict(claim, None, f"Not even the shortest lag of any task was learned {_within(rows, 'gru')}.")
    (op, task, lag), best = max(found.items(), key=lambda item: item[1].median)
    said = f"{NAMES[op]} on {TITLES[task]} at {lag:,}, {best.percent} right {_within(rows, 'gru')}"
    return Verdict(claim, best.median < ENOUGH, f"The best at lags of {THOUSANDS:,} and more: {said}.")


def _plain(rows: list[Row], reached: Reached, longest: dict[str, int]) -> Verdict:
    claim = f"A plain RNN learns to remember over tens of steps at most{_given(rows, 'rnn')}."
    said = _said(rows, ("rnn",), reached, longest)
    if max(longest.values()) < HUNDREDS:
        return Verdict(claim, None, f"No lag of {HUNDREDS} or more was tried. {said}")
    furthest = max(reached["rnn"].values())
    own, other = (select(rows, op=op)[0] for op in ("rnn", "lstm"))
    slower = (
        f"It learns at a rate of {own['rate']:g}, in up to {own['most']:,} updates, the LSTM at {other['rate']:g}, in "
        f"up to {other['most']:,}."
    )
    return Verdict(claim, furthest < HUNDREDS if furthest else None, f"{said} {slower}")


def _weaker(rows: list[Row], reached: Reached) -> Verdict:
    better = {
        (row["task"], row["lag"]): max(LSTMS, key=lambda op: _accuracy(rows, row["task"], op, row["lag"]).median)
        for row in rows
        if row["lag"] > min(values(select(rows, task=row["task"]), "lag"))
    }
    lstm, gru = _apart(rows, reached, {place: (op, "gru") for place, op in better.items()})
    return Verdict(
        "The GRU is weaker than the LSTM on long lags.",
        None if bool(lstm) == bool(gru) else bool(lstm),
        f"Beyond the shortest lag, {_within(rows, 'gru')}, the LSTM with the better of its two biases is right more "
        f"often at {_listed(lstm)}, the GRU, with one start that nothing was chosen for, at {_listed(gru)}. Elsewhere "
        "seeds do not tell them apart, or neither learned the task at all.",
    )


def _bias(rows: list[Row], reached: Reached, longest: dict[str, int]) -> Verdict:
    places = {(row["task"], row["lag"]): (LONG, "lstm") for row in rows}
    more, fewer = _apart(rows, reached, places)
    learned = any(lag for op in LSTMS for lag in reached[op].values())
    # Where only the median gets further, and not beyond its seeds, nothing is said.
    same = learned and reached[LONG] == reached["lstm"]
    return Verdict(
        "What an LSTM learns to remember hangs on the bias of its forget gate.",
        True if more or fewer else False if same else None,
        f"With a bias of ln(lag) it is right more often than with 1 at {_listed(more)}, less often at "
        f"{_listed(fewer)}. {_said(rows, LSTMS, reached, longest)}",
    )


def _apart(rows: list[Row], reached: Reached, places: dict[tuple[str, int], tuple[str, str]]) -> tuple[list, list]:
    """Where, by (task, lag), the first of two layers is right more often beyond its seeds, and where the second is.

    A task counts if either learned its shortest lag.
    """
    ahead: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for (task, lag), ops in sorted(places.items()):
        if any(reached[op][task] for op in ops):
            first, second = (_accuracy(rows, task, op, lag) for op in ops)
            right = " to ".join(f"{each.median:.0%}" for each in sorted((first, second), key=lambda s: -s.median))
            ahead[order_of(first, second)].append(f"{TITLES[task]} over {lag:,} ({right})")
    return ahead[True], ahead[False]


def _listed(places: list[str]) -> str:
    return "; ".join(places) or "no lag"


def _attention(rows: list[Row], reached: Reached, longest: dict[str, int]) -> Verdict:
    learned = {task: lag for task, lag in reached["attention"].items() if lag}
    return Verdict(
        f"Attention learns to remember regardless of the lag{_given(rows, 'attention')}.",
        all(lag == longest[task] for task, lag in learned.items()) if learned else None,
        _said(rows, ("attention",), reached, longest),
    )


def draw(rows: list[Row]) -> tuple[Figure, str]:
    tasks = values(sorted(rows, key=lambda row: list(TASKS).index(row["task"])), "task")
    figure, axes = panels(1, len(tasks), 3.6, sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        found = select(rows, task=task)
        lags, ends = sorted(values(found, "lag")), []
        for op in NAMES:
            color, mark = drawing.style("lstm" if op == LONG else op)
            look = {"linestyle": drawing.DASHED} if op == LONG else {}
            points = [(lag, [row["accuracy"] for row in select(found, op=op, lag=lag)]) for lag in lags]
            drawing.line(ax, points, color, mark, **look)
            ends.append((spread(points[-1][1]).median, NAMES[op], color))
        drawing.level(ax, found[0]["chance"], "guessing")
        ax.set(xscale="log", ylim=(-0.03, 1.05), xlabel="lag (time steps)", title=TITLES[task].capitalize())
        drawing.ticks(ax, lags)
        name_ends(ax, ends)
    axes[0][0].set_ylabel("share right, held out")
    apart = max(
        1 - min(counts) / max(counts) for task in tasks for counts in [values(select(rows, task=task), "parameters")]
    )
    return figure, (
        "Share of held-out answers that are right over the lag, each point a model trained from new: the median over "
        f"seeds, the band from the least to the largest. Parameters of a task's models are within {apart:.0%} of the "
        "largest one's."
    )


def table(rows: list[Row]) -> str:
    tasks = values(sorted(rows, key=lambda row: list(TASKS).index(row["task"])), "task")
    lags = [(task, lag) for task in tasks for lag in sorted(values(select(rows, task=task), "lag"))]
    right, updates = (
        [
            [f"{TITLES[task]}, {lag:,}"]
            + [spread(row[key] for row in select(rows, task=task, lag=lag, op=op)).text(form.format) for op in NAMES]
            for task, lag in lags
        ]
        for key, form in (("accuracy", "{:.0%}"), ("updates", "{:,.0f}"))
    )
    sizes = [[TITLES[task]] + [_size(select(rows, task=task, op=op)[0]) for op in NAMES] for task in tasks]
    parts = {"right: task, lag": right, "updates": updates, "parameters (width)": sizes}
    return "\n\n".join(markdown([title, *NAMES.values()], lines) for title, lines in parts.items())


def _size(row: Row) -> str:
    return f"{row['parameters']:,} ({row['width']})"
