"""Overfitting of an LSTM on little text, and what the kinds of dropout do about it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.reporting.plot_kit import FAINT, name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Spread, Verdict, all_of, beyond, order_of, select, spread
from benchmarks.study.training import Batch, Trainer
from benchmarks.text import Corpus, load_corpus
from seqcore.functional import lstm_cell
from seqcore.nn import LSTM, LockedDropout

TITLE = "Overfitting and kinds of dropout"
QUESTION = (
    "An LSTM learns a short text by heart. Which dropout helps it most on text it has not seen: a new mask at every "
    "step, one mask for all steps (locked, or variational), and of what: between layers, outside them, on the "
    "recurrent connection? Or zoneout, which keeps units' old states?"
)
ALONE = False
NAMES = {
    "none": "no dropout",
    "between": "between layers (new masks)",
    "locked": "between layers (locked)",
    "around": "inputs, between, outputs (locked)",
    "recurrent": "recurrent (new masks)",
    "recurrent locked": "recurrent (locked)",
    "zoneout": "zoneout",
}
# Of the training and the held-out text, always the same excerpts.
EVALUATED, TRAINING_SEED, HELD_OUT_SEED = 256, 10**6, 0
LAYERS = 2
# Bytes in a row, and of how many such pieces one is trained on.
PIECE, EVERY = 512, 10
# Of the best held-out loss, that by which a later one is worse for good.
MATTERS = 0.02


@dataclass(frozen=True)
class Sizes:
    # Of what is trained on.
    text_bytes: int
    width: int
    T: int
    B: int
    steps: int
    evaluations: int
    seeds: int
    dropout: float = 0.4
    # Of h and of c, as Krueger et al. have them for characters, c's a little lower.
    zoneout: tuple[float, float] = (0.05, 0.3)
    learning_rate: float = 5e-3


SIZES = {
    "tiny": Sizes(2_048, 8, 6, 4, 4, 2, 2),
    "cpu": Sizes(10_240, 96, 30, 32, 400, 16, 3),
    "gpu": Sizes(1_000_000, 512, 100, 64, 6000, 40, 5, learning_rate=2e-3),
}


def how(sizes: Sizes) -> str:
    h, c = sizes.zoneout
    return (
        f"A character model on {sizes.text_bytes:,} bytes of the Python library's sources: of {EVERY} pieces of "
        f"{PIECE} bytes always one, the others are held out, so that both are from all over the text. {LAYERS} "
        f"LSTM layers of {sizes.width} units, {sizes.steps:,} updates of {sizes.B} excerpts of {sizes.T} characters, "
        f"Adam at {sizes.learning_rate:g}, gradients clipped to norm 1; {sizes.evaluations} times on the way the loss "
        f"on {EVALUATED} excerpts trained on and on {EVALUATED} held out, without dropout. Dropout of "
        f"{sizes.dropout:g}: between the layers, a new mask at every step, as `LSTM(dropout=)` and torch have it; the "
        "same with one mask for all steps of a sequence (`LSTM(dropout=, locked=True)`); locked masks also on what "
        "enters the first and leaves the last layer (`LockedDropout`); and, on the recurrent connection alone, on the "
        "h that each layer gives to its next step, either a new mask at every step or one for all steps (Gal and "
        f"Ghahramani, 2016), by a loop over `lstm_cell`. Zoneout: `LSTM(zoneout=({h:g}, {c:g}))`, the share of units "
        f"of h and of c that keep their old value at a step. {sizes.seeds} seeds."
    )


def cases(sizes: Sizes) -> list[Case]:
    # Zoneout and loops first: they take longest.
    return [{"kind": kind, "seed": seed} for kind in reversed(NAMES) for seed in range(sizes.seeds)]


class Model(nn.Module):
    """Embedding, LSTM layers, and a projection to the alphabet."""

    def __init__(self, kind: str, alphabet: int, sizes: Sizes):
        super().__init__()
        options = {
            "between": {"dropout": sizes.dropout},
            "locked": {"dropout": sizes.dropout, "locked": True},
            "around": {"dropout": sizes.dropout, "locked": True},
            "zoneout": {"zoneout": sizes.zoneout},
        }
        self.embedding = nn.Embedding(alphabet, sizes.width)
        self.outside = LockedDropout(sizes.dropout if kind == "around" else 0.0)
        self.body = LSTM(sizes.width, sizes.width, num_layers=LAYERS, **options.get(kind, {}))
        self.head = nn.Linear(sizes.width, alphabet)
        self.kind, self.dropout = kind, sizes.dropout

    def forward(self, characters: Tensor) -> Tensor:
        x = self.outside(self.embedding(characters))
        if self.kind.startswith("recurrent") and self.training:
            y = recurrent_dropout(self.body, x, self.dropout, locked=self.kind.endswith("locked"))
        else:
            y, _ = self.body(x)
        return self.head(self.outside(y))


def recurrent_dropout(body: LSTM, x: Tensor, p: float, locked: bool) -> Tensor:
    """The layers' output [T, B, H], each step from the h before it under a mask; ``locked``: the same at all steps."""
    for layer in range(body.num_layers):
        weights = [getattr(body, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h = c = x.new_zeros(x.shape[1], body.hidden_size)
        masks = F.dropout(x.new_ones(1 if locked else len(x), *h.shape), p).expand(len(x), -1, -1)
        steps = []
        for x_t, mask in zip(x, masks, strict=True):
            h, c = lstm_cell(x_t, (h * mask, c), *weights)
            steps.append(h)
        x = torch.stack(steps)
    return x


@functools.lru_cache(maxsize=1)
def corpus(text_bytes: int) -> Corpus:
    return load_corpus(None, EVERY * text_bytes).scattered(PIECE, EVERY)


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    text, seed = corpus(sizes.text_bytes), case["seed"]
    torch.manual_seed(seed)
    model = Model(case["kind"], len(text.alphabet), sizes).to(device)

    def draw_batch(seed: int, B: int = EVALUATED, held_out: bool = False) -> Batch:
        characters, following = text.batch(sizes.T, B, seed, held_out)
        return Batch(characters.to(device), following.to(device))

    first = seed * sizes.steps + 1
    trainer = Trainer(model, lambda step: draw_batch(first + step, sizes.B), sizes.learning_rate)
    asked = {"train": draw_batch(TRAINING_SEED), "held_out": draw_batch(HELD_OUT_SEED, held_out=True)}
    every, found = max(1, sizes.steps // sizes.evaluations), {"updates": [], "train": [], "held_out": []}
    for updates in range(every, sizes.steps + 1, every):
        trainer.run(every)
        found["updates"].append(updates)
        for name, batch in asked.items():
            found[name].append(trainer.evaluate(batch)["loss"])
    return found


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [
        _overfits(select(rows, kind="none")),
        _helps(rows, "between", "none", "Dropout between layers helps on text not seen."),
        _helps(rows, "locked", "between", "Between layers one mask for all steps is better than a new one each step."),
        _helps(rows, "around", "none", "Locked dropout on all that enters and leaves helps on text not seen."),
        _awkward(rows),
        _helps(rows, "zoneout", "none", "Zoneout helps on text not seen."),
    ]


def _final(rows: list[Row]) -> Spread:
    return spread(row["held_out"][-1] for row in rows)


def _best(rows: list[Row]) -> Spread:
    return spread(min(row["held_out"]) for row in rows)


def _nats(found: Spread) -> str:
    return found.text("{:.2f}".format)


def _overfits(rows: list[Row]) -> Verdict:
    best, final, train = _best(rows), _final(rows), spread(row["train"][-1] for row in rows)
    rise = spread(row["held_out"][-1] / min(row["held_out"]) - 1 for row in rows)
    return Verdict(
        "An LSTM overfits.",
        all_of([beyond(rise, MATTERS), order_of(final, train)]),
        f"Without dropout the held-out loss is {_nats(best)} nats a character at its best and {_nats(final)} at the "
        f"end, where that on the training text is {_nats(train)}.",
    )


def _better(rows: list[Row], kind: str, than: str) -> tuple[bool | None, bool | None]:
    """Whether it is at the end of training, and whether at the best moment of each."""
    own, other = select(rows, kind=kind), select(rows, kind=than)
    return order_of(_final(other), _final(own)), order_of(_best(other), _best(own))


def _agreed(answers: tuple[bool | None, bool | None]) -> bool | None:
    end, best = answers
    return end if end is best else None


def _losses(rows: list[Row], kinds: Sequence[str]) -> str:
    told = [
        "; ".join(f"{NAMES[kind]} {_nats(of(select(rows, kind=kind)))}" for kind in kinds) for of in (_final, _best)
    ]
    return f"Held-out loss at the end: {told[0]}. At its best: {told[1]}."


def _helps(rows: list[Row], kind: str, than: str, claim: str) -> Verdict:
    """Judged at the end of training and at the best moment, which must agree."""
    end, best = answers = _better(rows, kind, than)
    apart = "" if end is best else f" The end {_SAYS[end]} and the best moment {_SAYS[best]}, so this cannot tell."
    return Verdict(claim, _agreed(answers), _losses(rows, (kind, than)) + apart)


_SAYS = {True: "says yes", False: "says no", None: "is undecided"}


def _awkward(rows: list[Row]) -> Verdict:
    new, locked = (_agreed(_better(rows, kind, "none")) for kind in ("recurrent", "recurrent locked"))
    each_other = _agreed(_better(rows, "recurrent locked", "recurrent"))
    word = {True: "helps", False: "hurts", None: "neither helps nor hurts for sure"}
    than = {True: "better", False: "worse", None: "neither better nor worse for sure"}[each_other]
    return Verdict(
        "Dropout on the recurrent connection is awkward: a new mask at every step hurts, the same mask does not.",
        all_of([None if new is None else not new, locked, each_other]),
        f"{_losses(rows, ('recurrent', 'recurrent locked', 'none'))} Judged by both, and against none, a new mask at "
        f"every step {word[new]}, the same mask {word[locked]}; the same mask is {than} than a new one.",
    )


LOOKS = {"none": (FAINT, "x"), **dict(zip(list(NAMES)[1:], drawing.VARIANTS, strict=True))}


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, (axes,) = panels(1, 2, 3.8)
    for ax, key, title in zip(axes, ("train", "held_out"), ("Text trained on", "Held-out text"), strict=True):
        ends = []
        for kind, (color, mark) in LOOKS.items():
            found = select(rows, kind=kind)
            points = list(zip(found[0]["updates"], zip(*(row[key] for row in found), strict=True), strict=True))
            drawing.line(ax, points, color, mark, markevery=4)
            ends.append((spread(points[-1][1]).median, NAMES[kind], color))
        ax.set(xlabel="updates", title=title, ylabel="loss (nats a character)")
    # The first quarter is alike for all, and would flatten what follows.
    held_out = [loss for row in rows for loss in row["held_out"][len(row["held_out"]) // 4 :]]
    axes[1].set_ylim(min(held_out) - 0.02, max(held_out) + 0.02)
    name_ends(axes[1], ends)
    return figure, (
        "Loss over updates on text that is trained on and, from a quarter of training on, on text that is not, both "
        "without dropout; colours and marks are the same in both. Medians over seeds, bands from the least to the "
        "largest."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for kind, name in NAMES.items():
        found = select(rows, kind=kind)
        train = spread(row["train"][-1] for row in found)
        lines.append([name, _nats(train), _nats(_final(found)), _nats(_best(found))])
    return markdown(["dropout", "trained on, at the end", "held out, at the end", "held out, at its best"], lines)
