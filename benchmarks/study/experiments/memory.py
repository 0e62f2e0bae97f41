"""How far back the layers remember, at equal parameters: delayed recall, the adding problem, copying."""

import math
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure

from benchmarks.models import count_parameters
from benchmarks.reporting.plot_kit import name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Verdict, select, spread, values
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
HELD_OUT = 99
LONG = "lstm_long"
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", LONG: "LSTM, ln(lag)", "attention": "attention"}
LSTMS = ("lstm", LONG)


@dataclass(frozen=True)
class Sizes:
    """``steps`` is the most updates, each of ``batch`` sequences, that a model gets to learn one task at one lag."""

    lags: dict[str, tuple[int, ...]]
    parameters: int
    steps: int
    batch: int
    held_out: int
    seeds: int
    learning_rate: float = 0.01
    # The plain RNN learns nothing at all at the others' rate, and attention less often.
    own_rates: dict[str, float] = field(default_factory=lambda: {"rnn": 0.001, "attention": 0.005})

    def rate(self, op: str) -> float:
        return self.own_rates.get(op, self.learning_rate)


SIZES = {
    "tiny": Sizes({"recall": (2, 4), "adding": (4,)}, 1000, 4, 4, 16, 2),
    "cpu": Sizes(dict.fromkeys(TASKS, (10, 30, 100)), 8000, 600, 32, 256, 3),
    "gpu": Sizes(
        dict.fromkeys(TASKS, (10, 30, 100, 300, 1000, 3000)),
        parameters=100_000,
        steps=3000,
        batch=128,
        held_out=1024,
        seeds=5,
        learning_rate=0.003,
        own_rates={"rnn": 0.0003, "attention": 0.001},
    ),
}


def how(sizes: Sizes) -> str:
    return (
        f"Delayed recall: one of {SYMBOLS} symbols, blanks, and after the lag the question which it was. Adding: a "
        "number in 0 … 1 at each step, two of them marked, their sum wanted at the end, right if within 0.1. Copying: "
        f"{COPIED} symbols, to be repeated in order, each a lag later. For every task and lag a model of about "
        f"{sizes.parameters:,} parameters is trained from new: one recurrent layer, or two Transformer layers with "
        f"causal attention; Adam at {sizes.learning_rate} (the RNN at {sizes.rate('rnn')}, attention at "
        f"{sizes.rate('attention')}), gradients clipped to norm 1, at most {sizes.steps:,} updates of {sizes.batch} "
        f"new sequences each, fewer once {SOLVED:.0%} of {sizes.held_out} held-out ones are right. The RNN begins with "
        "orthogonal recurrent weights; the LSTM, twice here, with a forget-gate bias of 1 and, as one would choose "
        f"who knows the lag, of ln(lag), at which a state lasts about that long. {sizes.seeds} seeds. A lag counts as "
        f"remembered if the median over seeds is at least {ENOUGH:.0%} right there and at every shorter lag. What "
        "fails here may succeed with more training."
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
    trainer.run(sizes.steps, lambda: trainer.evaluate(held_out)["accuracy"] >= SOLVED)
    return {
        **trainer.evaluate(held_out),
        "updates": len(trainer.losses),
        "parameters": count_parameters(model),
        "width": width,
        "chance": CHANCE[task],
    }


def reach(rows: list[Row], task: str, op: str) -> int:
    """The longest lag remembered, every shorter one being remembered as well; 0 if not even the shortest is."""
    longest = 0
    for lag in sorted(values(select(rows, task=task, op=op), "lag")):
        if _accuracy(rows, task, op, lag).median < ENOUGH:
            break
        longest = lag
    return longest


def _accuracy(rows: list[Row], task: str, op: str, lag: int):
    return spread(row["accuracy"] for row in select(rows, task=task, op=op, lag=lag))


def verdicts(rows: list[Row]) -> list[Verdict]:
    tasks = values(rows, "task")
    longest = {task: max(values(select(rows, task=task), "lag")) for task in tasks}
    reached = {op: {task: reach(rows, task, op) for task in tasks} for op in NAMES}
    return [
        _hundreds(reached, longest),
        _thousands(rows, longest),
        _plain(reached, longest),
        _weaker(reached, longest),
        _bias(reached, longest),
        _attention(reached, longest),
    ]


def _said(op: str, reached: dict, longest: dict) -> str:
    each = (f"{TITLES[task]} {_lag(reached[op][task], longest[task])}" for task in longest)
    return f"{NAMES[op]}: {', '.join(each)}"


def _lag(reached: int, longest: int) -> str:
    if not reached:
        return "none"
    return f"{reached:,} (the longest tried)" if reached == longest else f"{reached:,}"


def _hundreds(reached: dict, longest: dict) -> Verdict:
    claim = "LSTM and GRU remember over hundreds of steps."
    said = f"Lags remembered: {'. '.join(_said(op, reached, longest) for op in ('gru', *LSTMS))}."
    if max(longest.values()) < HUNDREDS:
        return Verdict(claim, None, f"No lag of {HUNDREDS} or more was tried. {said}")
    best = {"LSTM": max(max(reached[op].values()) for op in LSTMS), "GRU": max(reached["gru"].values())}
    able = [name for name, lag in best.items() if lag >= HUNDREDS]
    who = {0: "Neither gets", 1: f"Only the {able[0] if able else ''} gets", 2: "Both get"}[len(able)]
    return Verdict(claim, len(able) == 2, f"{who} to a lag of {HUNDREDS} on at least one task. {said}")


def _thousands(rows: list[Row], longest: dict) -> Verdict:
    claim = "LSTM and GRU do not remember over thousands of steps."
    if max(longest.values()) < THOUSANDS:
        return Verdict(claim, None, f"The longest lag tried is {max(longest.values()):,}.")
    found = {
        (op, task, lag): _accuracy(rows, task, op, lag)
        for op in ("gru", *LSTMS)
        for task in longest
        for lag in values(select(rows, task=task, op=op), "lag")
        if lag >= THOUSANDS
    }
    (op, task, lag), best = max(found.items(), key=lambda item: item[1].median)
    said = f"{NAMES[op]} on {TITLES[task]} at {lag:,}, {best.text('{:.0%}'.format)} right"
    return Verdict(claim, best.median < ENOUGH, f"The best at lags of {THOUSANDS:,} and more: {said}.")


def _plain(reached: dict, longest: dict) -> Verdict:
    claim = "A plain RNN forgets within tens of steps."
    said = f"Lags remembered: {_said('rnn', reached, longest)}."
    if max(longest.values()) < HUNDREDS:
        return Verdict(claim, None, f"No lag of {HUNDREDS} or more was tried. {said}")
    return Verdict(claim, max(reached["rnn"].values()) < HUNDREDS, said)


def _weaker(reached: dict, longest: dict) -> Verdict:
    claim = "The GRU is weaker than the LSTM on long lags."
    lstm = {task: max(reached[op][task] for op in LSTMS) for task in longest}
    gru = reached["gru"]
    shorter, longer = ([t for t in longest if sign * gru[t] < sign * lstm[t]] for sign in (1, -1))
    each = "; ".join(
        f"{TITLES[task]}: GRU {_lag(gru[task], most)}, LSTM {_lag(lstm[task], most)}" for task, most in longest.items()
    )
    if bool(shorter) == bool(longer):
        why = "Each gets further on some task" if shorter else "Both get equally far"
        return Verdict(claim, None, f"{why}, the LSTM with the better of its two biases. {each}.")
    ahead = "The LSTM, with the better of its two biases," if shorter else "The GRU"
    return Verdict(claim, bool(shorter), f"{ahead} gets further where they differ. {each}.")


def _bias(reached: dict, longest: dict) -> Verdict:
    claim = "What an LSTM remembers hangs on the bias of its forget gate."
    better = [task for task in longest if reached[LONG][task] > reached["lstm"][task]]
    worse = [task for task in longest if reached[LONG][task] < reached["lstm"][task]]
    said = ". ".join(_said(op, reached, longest) for op in LSTMS)
    holds = None if not better and not worse else bool(better) and not worse
    return Verdict(claim, holds, f"With a bias of 1 and of ln(lag): {said}.")


def _attention(reached: dict, longest: dict) -> Verdict:
    claim = "Attention remembers regardless of the lag."
    holds = all(reached["attention"][task] == longest[task] for task in longest)
    return Verdict(claim, holds, f"Lags remembered: {_said('attention', reached, longest)}.")


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
    return figure, (
        "Share of held-out answers that are right over the lag, each point a model trained from new: the median over "
        "seeds, the band from the least to the largest."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for task in values(sorted(rows, key=lambda row: list(TASKS).index(row["task"])), "task"):
        for lag in sorted(values(select(rows, task=task), "lag")):
            found = [select(rows, task=task, lag=lag, op=op) for op in NAMES]
            lines.append(
                [TITLES[task], f"{lag:,}"]
                + [spread(row["accuracy"] for row in each).text("{:.0%}".format) for each in found]
                + [f"{spread(row['updates'] for row in each).median:,.0f}" for each in found]
            )
    names = list(NAMES.values())
    return markdown(["task", "lag", *(f"{n} right" for n in names), *(f"{n} updates" for n in names)], lines)
