"""How much an LSTM's success hangs on its initial weights: seeds, orthogonal matrices, the forget gate's bias."""

import math
import statistics
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from benchmarks.reporting.plot_kit import panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import CHANCE, Case, Row, Spread, Verdict, order_of, select, spread
from benchmarks.study.models import SequenceModel
from benchmarks.study.tasks import ALPHABET, SYMBOLS, recall
from benchmarks.study.training import Trainer
from seqcore.nn import LSTM
from seqcore.nn.init import forget_gate_bias_, orthogonal_recurrent_

TITLE = "The LSTM and its initial weights"
QUESTION = "How much does what an LSTM learns, and how soon, depend on the weights it begins with?"
ALONE = False
NAMES = {
    "default": "torch's default",
    "orthogonal": "orthogonal",
    "bias": "forget bias 1",
    "both": "orthogonal, bias 1",
    "lag": "forget bias ln(lag)",
}
# Torch's default, too, with the weights of the first seed for every stream of batches.
BATCHES = "batches"
ALL = NAMES | {BATCHES: "default, other batches"}
SOLVED, EVERY, HELD_OUT = 0.95, 10, 99


@dataclass(frozen=True)
class Sizes:
    lag: int
    H: int
    steps: int
    batch: int
    held_out: int
    seeds: int
    learning_rate: float = 0.01


SIZES = {
    "tiny": Sizes(4, 6, 10, 4, 16, 2),
    "cpu": Sizes(12, 32, 500, 32, 256, 8),
    "gpu": Sizes(200, 128, 3000, 64, 1024, 16, 0.003),
}


def how(sizes: Sizes) -> str:
    return (
        f"Delayed recall of one of {SYMBOLS} symbols over {sizes.lag} steps, an LSTM of {sizes.H} units, Adam at "
        f"{sizes.learning_rate}, gradients clipped to norm 1, batches of {sizes.batch}; how many updates until "
        f"{SOLVED:.0%} of {sizes.held_out} held-out answers are right, looked at every {EVERY} updates, of "
        f"{sizes.steps} at most, which stand for never. Begun with torch's default weights (uniform, biases too); with "
        "every gate's recurrent matrix orthogonal (`seqcore.nn.init.orthogonal_recurrent_`); with the forget gate's "
        "bias 1 (`seqcore.nn.init.forget_gate_bias_`); with both; and with a bias of ln(lag), for which one must know "
        f"the lag. {sizes.seeds} seeds of the weights, all trained on the same batches; and, to compare, the default "
        f"weights of one seed on {sizes.seeds} other streams of batches. The held-out answers are always the same."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"kind": kind, "seed": seed} for kind in ALL for seed in range(sizes.seeds)]


def initialise(lstm: LSTM, kind: str, lag: int) -> None:
    if kind in ("orthogonal", "both"):
        orthogonal_recurrent_(lstm)
    if kind in ("bias", "both"):
        forget_gate_bias_(lstm, 1.0)
    if kind == "lag":
        forget_gate_bias_(lstm, math.log(lag))


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    weights, batches = (0, 1 + case["seed"]) if case["kind"] == BATCHES else (case["seed"], 0)
    torch.manual_seed(weights)
    model = SequenceModel("lstm", 0, ALPHABET, sizes.H, ALPHABET)
    initialise(model.body, case["kind"], sizes.lag)
    model.to(device)
    held_out = recall(sizes.lag, sizes.held_out, device, HELD_OUT)
    trainer = Trainer(model, lambda step: recall(sizes.lag, sizes.batch, device, batches, step), sizes.learning_rate)
    trainer.run(sizes.steps, lambda: trainer.evaluate(held_out)["accuracy"] >= SOLVED, EVERY)
    found = trainer.evaluate(held_out)
    return {**found, "updates": len(trainer.losses), "most": sizes.steps, "solved": found["accuracy"] >= SOLVED}


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [
        _seeds(rows),
        _faster(rows, "bias", "A forget-gate bias of 1 makes an LSTM learn sooner."),
        _faster(rows, "orthogonal", "Orthogonal recurrent weights make an LSTM learn sooner."),
        _faster(rows, "lag", "A forget-gate bias that suits the lag makes it learn sooner still.", "bias"),
    ]


def _said(rows: list[Row]) -> str:
    updates = spread(row["updates"] for row in rows).text("{:,.0f}".format)
    return f"{sum(row['solved'] for row in rows)} of {len(rows)} seeds solve it, after {updates} updates"


def _seeds(rows: list[Row]) -> Verdict:
    claim = "The same LSTM does well or badly by the luck of its initial weights."
    weights, batches = (select(rows, kind=kind) for kind in ("default", BATCHES))
    of = [spread(row["updates"] for row in each) for each in (weights, batches)]
    by = [statistics.pstdev(each.values) for each in of]
    ratio = f", {by[0] / by[1]:.2g} times as much" if by[1] else ""
    solved = any(row["solved"] for row in (*weights, *batches))
    return Verdict(
        claim,
        order_of(_apart(of[0]), _apart(of[1])) if solved else None,
        f"Other weights, the same batches: {_said(weights)}, a standard deviation of {by[0]:.0f}{ratio}. The same "
        f"weights, other batches: {_said(batches)}, a standard deviation of {by[1]:.0f}. Compared are the distances "
        f"from the median, by ranks; who does not solve it counts with all {rows[0]['most']:,} updates.",
    )


def _apart(found: Spread) -> Spread:
    """How far each repeat is from the middle: ranks of these compare scatter (after Brown & Forsythe, 1974)."""
    return spread(abs(value - found.median) for value in found.values)


def _faster(rows: list[Row], kind: str, claim: str, than: str = "default") -> Verdict:
    own, other = (select(rows, kind=each) for each in (kind, than))
    sooner, later = _wins(own, other), _wins(other, own)
    # A sign test at both sides: of eight pairs seven or more agree by chance once in 14 times.
    pairs = sooner + later
    enough = 2 * _chance(max(sooner, later), pairs) <= CHANCE if pairs else False
    return Verdict(
        claim,
        sooner > later if enough else None,
        f"{NAMES[kind].capitalize()}: {_said(own)}; {NAMES[than]}: {_said(other)}. Seed by seed it is sooner {sooner} "
        f"times, later {later} times.",
    )


def _wins(own: list[Row], other: list[Row]) -> int:
    """How many seeds solve it with fewer updates."""
    return sum(_order(mine) < _order(theirs) for mine in own for theirs in other if mine["seed"] == theirs["seed"])


def _order(row: Row) -> float:
    return row["updates"] if row["solved"] else math.inf


def _chance(successes: int, pairs: int) -> float:
    """Of at least as many successes if both were equally likely."""
    return sum(math.comb(pairs, k) for k in range(successes, pairs + 1)) / 2**pairs


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, ((ax,),) = panels(1, 1, 3.6)
    for place, kind in enumerate(ALL):
        found, (color, mark) = select(rows, kind=kind), drawing.style(kind, list(ALL))
        drawing.repeats(ax, place, [row["updates"] for row in found], color, mark)
    drawing.level(ax, rows[0]["most"], "not solved")
    ax.set_xticks(range(len(ALL)), [name.replace(", ", ",\n") for name in ALL.values()])
    ax.set(ylabel="updates until solved", ylim=(0, None))
    return figure, (
        f"Updates until {SOLVED:.0%} of held-out answers are right, a point for each seed of the weights (at the "
        "far right of the batches), a bar at the median; at the dotted line it was never reached."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for kind, name in ALL.items():
        found = select(rows, kind=kind)
        lines.append(
            [name, f"{sum(row['solved'] for row in found)} of {len(found)}"]
            + [spread(row["updates"] for row in found).text("{:,.0f}".format)]
            + [spread(row["accuracy"] for row in found).percent]
        )
    return markdown(["initial weights", "seeds that solve it", "updates", "right at the end"], lines)
