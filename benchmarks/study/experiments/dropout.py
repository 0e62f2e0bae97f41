"""Overfitting of an LSTM on little text, and what the kinds of dropout do about it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.reporting.plot_kit import name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Verdict, order_of, select, spread
from benchmarks.text import Corpus, load_corpus
from seqcore.nn import LSTM, LockedDropout

TITLE = "Overfitting and kinds of dropout"
QUESTION = (
    "An LSTM learns a short text by heart. Which dropout helps it most on text it has not seen: a new mask at every "
    "step, one mask for all steps (locked, or variational), or zoneout, which keeps units' old states?"
)
ALONE = False
NAMES = {
    "none": "no dropout",
    "between": "between layers",
    "locked": "between, locked",
    "variational": "locked everywhere",
    "zoneout": "zoneout",
}
# Of the training and the held-out text, always the same excerpts.
EVALUATED, TRAINING_SEED, HELD_OUT_SEED = 128, 10**6, 0
LAYERS = 2


@dataclass(frozen=True)
class Sizes:
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
    "tiny": Sizes(20_000, 8, 6, 4, 4, 2, 2),
    "cpu": Sizes(20_000, 96, 30, 32, 500, 20, 3),
    "gpu": Sizes(1_000_000, 512, 100, 64, 6000, 40, 5, learning_rate=2e-3),
}


def how(sizes: Sizes) -> str:
    h, c = sizes.zoneout
    return (
        f"A character model on {sizes.text_bytes:,} bytes of the Python library's sources, a tenth held out: {LAYERS} "
        f"LSTM layers of {sizes.width} units, {sizes.steps} updates of {sizes.B} excerpts of {sizes.T} characters, "
        f"Adam at {sizes.learning_rate}, gradients clipped to norm 1; {sizes.evaluations} times on the way the loss on "
        f"text trained on and on held-out text, without dropout. Dropout of {sizes.dropout}: between the layers, a new "
        "mask at every step, as `LSTM(dropout=)` and torch have it; the same with one mask for all steps of a "
        "sequence (`LSTM(dropout=, locked=True)`); locked masks also on what enters the first and leaves the last "
        f"layer (`LockedDropout`). Zoneout: `LSTM(zoneout=({h:g}, {c:g}))`, the share of units of h and of c that keep "
        f"their old value at a step. {sizes.seeds} seeds."
    )


def cases(sizes: Sizes) -> list[Case]:
    # Zoneout first: on a CPU plain PyTorch computes it, which takes longest.
    return [{"kind": kind, "seed": seed} for kind in reversed(NAMES) for seed in range(sizes.seeds)]


class Model(nn.Module):
    """Embedding, LSTM layers, and a projection to the alphabet."""

    def __init__(self, kind: str, alphabet: int, sizes: Sizes):
        super().__init__()
        options = {
            "between": {"dropout": sizes.dropout},
            "locked": {"dropout": sizes.dropout, "locked": True},
            "variational": {"dropout": sizes.dropout, "locked": True},
            "zoneout": {"zoneout": sizes.zoneout},
        }
        self.embedding = nn.Embedding(alphabet, sizes.width)
        self.outside = LockedDropout(sizes.dropout if kind == "variational" else 0.0)
        self.body = LSTM(sizes.width, sizes.width, num_layers=LAYERS, **options.get(kind, {}))
        self.head = nn.Linear(sizes.width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        y, _ = self.body(self.outside(self.embedding(characters)))
        return self.head(self.outside(y))


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    corpus, seed = load_corpus(None, sizes.text_bytes), case["seed"]
    torch.manual_seed(seed)
    model = Model(case["kind"], len(corpus.alphabet), sizes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=sizes.learning_rate)
    every, found = max(1, sizes.steps // sizes.evaluations), {"updates": [], "train": [], "held_out": []}
    for step in range(1, sizes.steps + 1):
        loss = _loss(model, corpus, sizes, sizes.B, seed * sizes.steps + step, device)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            found["updates"].append(step)
            model.eval()
            with torch.no_grad():
                found["train"].append(_loss(model, corpus, sizes, EVALUATED, TRAINING_SEED, device).item())
                found["held_out"].append(_loss(model, corpus, sizes, EVALUATED, HELD_OUT_SEED, device, True).item())
            model.train()
    return found


def _loss(
    model: Model, corpus: Corpus, sizes: Sizes, B: int, seed: int, device: str, held_out: bool = False
) -> Tensor:
    characters, following = (part.to(device) for part in corpus.batch(sizes.T, B, seed, held_out))
    return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [
        _overfits(select(rows, kind="none")),
        _helps(rows, "between", "none", "Dropout between layers helps on text not seen."),
        _helps(rows, "locked", "between", "Between layers one mask for all steps is better than a new one each step."),
        _helps(rows, "variational", "none", "Locked dropout on all that enters and leaves helps on text not seen."),
        _helps(rows, "zoneout", "none", "Zoneout helps on text not seen."),
    ]


def _final(rows: list[Row]):
    return spread(row["held_out"][-1] for row in rows)


def _best(rows: list[Row]):
    return spread(min(row["held_out"]) for row in rows)


def _nats(found) -> str:
    return found.text("{:.2f}".format)


def _overfits(rows: list[Row]) -> Verdict:
    best, final, train = _best(rows), _final(rows), spread(row["train"][-1] for row in rows)
    worse = order_of(final, best)
    return Verdict(
        "An LSTM overfits.",
        None if worse is None else worse and final.clearly_above(train),
        f"Without dropout the held-out loss is {_nats(best)} nats a character at its best and {_nats(final)} at the "
        f"end, where that on the training text is {_nats(train)}.",
    )


def _helps(rows: list[Row], kind: str, than: str, claim: str) -> Verdict:
    """Judged at the end of training, and told for the best moment as well."""
    own, other = select(rows, kind=kind), select(rows, kind=than)
    return Verdict(
        claim,
        order_of(_final(other), _final(own)),
        f"Held-out loss at the end: {NAMES[kind]} {_nats(_final(own))}, {NAMES[than]} {_nats(_final(other))}; at its "
        f"best {_nats(_best(own))} and {_nats(_best(other))}.",
    )


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, (axes,) = panels(1, 2, 3.8, sharey=True)
    for ax, key, title in zip(axes, ("train", "held_out"), ("Text trained on", "Held-out text"), strict=True):
        ends = []
        for kind, name in NAMES.items():
            found, (color, mark) = select(rows, kind=kind), drawing.style(kind, list(NAMES))
            points = list(zip(found[0]["updates"], zip(*(row[key] for row in found), strict=True), strict=True))
            drawing.line(ax, points, color, mark, markevery=4)
            ends.append((spread(points[-1][1]).median, name, color))
        ax.set(xlabel="updates", title=title)
        name_ends(ax, ends)
    axes[0].set_ylabel("loss (nats a character)")
    return figure, (
        "Loss over updates on text that is trained on and on text that is not, both without dropout. Medians over "
        "seeds, bands from the least to the largest."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for kind, name in NAMES.items():
        found = select(rows, kind=kind)
        train = spread(row["train"][-1] for row in found)
        lines.append([name, _nats(train), _nats(_final(found)), _nats(_best(found))])
    return markdown(["dropout", "trained on, at the end", "held out, at the end", "held out, at its best"], lines)
