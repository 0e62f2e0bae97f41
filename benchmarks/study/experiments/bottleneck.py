"""Whether a sentence goes through one vector: an encoder and a decoder, with attention between them and without."""

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from benchmarks.models import count_parameters
from benchmarks.reporting.plot_kit import FAINT, name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study.drawing import VARIANTS, line
from benchmarks.study.experiment import Case, Row, Spread, Verdict, beyond, order_of, select, spread
from benchmarks.study.tasks import generator
from benchmarks.study.training import Batch, Trainer
from seqcore.functional import attention
from seqcore.nn import LSTM

TITLE = "One vector for a whole sentence"
QUESTION = (
    "Does what an encoder hands to its decoder in one vector suffice for short sentences only, and does attention over "
    "all of the encoder's states change that?"
)
ALONE = False

WITHOUT, WIDE, WITH = "without attention", "without attention, wide", "with attention"
CONTEXTS = (WITHOUT, WIDE, WITH)
# What counts as translated, and a fall in accuracy that matters.
GOOD, MATTERS = 0.9, 0.1
# Seeds of what is asked after training, which no training batch has.
ASKED = -2


@dataclass(frozen=True)
class Sizes:
    """Sentences of 1 to the last of ``lengths`` symbols are trained on, and each of ``lengths`` is asked for."""

    symbols: int
    lengths: tuple[int, ...]
    width: int
    # Of the wide model, whose vector holds more.
    wide: int
    B: int
    steps: int
    repeats: int
    learning_rate: float
    asked: int


SIZES = {
    "tiny": Sizes(4, (2, 3, 4), 16, 24, 8, 8, 2, 1e-2, 16),
    "cpu": Sizes(16, (4, 8, 12, 16, 20), 64, 112, 48, 800, 3, 5e-3, 128),
    "gpu": Sizes(64, (8, 16, 32, 48, 64, 96, 128), 256, 512, 128, 6000, 5, 1e-3, 512),
}


@dataclass(frozen=True)
class Sentences:
    """Source [S, B], padded, with lengths [B], and what the decoder is given step by step, [S, B]."""

    source: Tensor
    lengths: Tensor
    given: Tensor


class Translator(nn.Module):
    """LSTM encoder and decoder; each output comes from the decoder's state and a context of the encoder's.

    The context is the encoder's last state, the same at every step (Cho et al., 2014), or, with attention, an average
    of all its states weighed by their products with the decoder's (Luong et al., 2015, "dot"): no parameter more.
    """

    def __init__(self, symbols: int, width: int, attends: bool):
        super().__init__()
        # One more stands for the beginning.
        self.embedding = nn.Embedding(symbols + 1, width)
        self.encoder, self.decoder = LSTM(width, width), LSTM(width, width)
        self.combine, self.head = nn.Linear(2 * width, width), nn.Linear(width, symbols)
        self.begin, self.attends = symbols, attends

    def forward(self, sentences: Sentences) -> Tensor:
        """Scores [S, B, symbols] where the decoder is given the right symbols."""
        memory, state = self.encoder(self.embedding(sentences.source), lengths=sentences.lengths)
        return self._decode(sentences.given, state, memory, state[0], sentences.lengths)[0]

    @torch.no_grad()
    def translate(self, sentences: Sentences) -> Tensor:
        """[S, B] symbols, each the likeliest after those that were chosen before it."""
        memory, state = self.encoder(self.embedding(sentences.source), lengths=sentences.lengths)
        summary, chosen = state[0], [torch.full_like(sentences.source[:1], self.begin)]
        for _ in sentences.source:
            scores, state = self._decode(chosen[-1], state, memory, summary, sentences.lengths)
            chosen.append(scores.argmax(-1))
        return torch.cat(chosen[1:])

    def _decode(
        self, given: Tensor, state: tuple[Tensor, Tensor], memory: Tensor, summary: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.decoder(self.embedding(given), state)
        context = self._attend(y, memory, lengths) if self.attends else summary.expand_as(y)
        return self.head(torch.tanh(self.combine(torch.cat([y, context], -1)))), state

    def _attend(self, y: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        query, key = (each.transpose(0, 1)[:, None] for each in (y, memory))  # [B, one head, rows, width]
        return attention(query, key, key, key_lengths=lengths, scale=1.0)[:, 0].transpose(0, 1)


def draw_batch(symbols: int, lengths: Tensor, *seeds: int) -> Batch:
    """Random sentences; each is to come out reversed, its symbols replaced by others, always the same."""
    random, device = generator(str(lengths.device), *seeds), lengths.device
    S, B = int(lengths.max()), len(lengths)
    source = torch.randint(symbols, (S, B), generator=random, device=device)
    steps = torch.arange(S, device=device)[:, None]
    words = torch.randperm(symbols, generator=torch.Generator().manual_seed(0)).to(device)
    target = words[source.gather(0, (lengths - 1 - steps).clamp(min=0))]
    begin = torch.full_like(target[:1], symbols)
    return Batch(Sentences(source, lengths, torch.cat([begin, target[:-1]])), target, steps < lengths)


def how(sizes: Sizes) -> str:
    return (
        f"Sentences of random symbols, {sizes.symbols} of them, are to be translated: reversed, and each symbol "
        "replaced by another, always the same. One LSTM encodes, one decodes and begins with the encoder's last state; "
        f"both are {sizes.width} wide. At every step the decoder's output comes from its own state and a context: "
        "without attention the encoder's last state, with attention an average of all its states, weighed by their "
        "products with the decoder's state. So both have the very same parameters. A third, without attention, is "
        f"{sizes.wide} wide, and its vector with it. They train for "
        f"{sizes.steps:,} steps of {sizes.B} sentences of 1 to {max(sizes.lengths)} symbols in one padded batch (the "
        "longer of two lengths drawn at random, so that long ones are no rarity), the decoder being given the right "
        f"symbols; Adam at {sizes.learning_rate:g}, a tenth of that in the last quarter. Then they "
        f"translate {sizes.asked} new sentences of each length, the decoder being given what it chose itself. "
        f"{sizes.repeats} repeats with other weights and sentences."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"context": context, "seed": seed} for seed in range(sizes.repeats) for context in CONTEXTS]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    torch.manual_seed(case["seed"])
    width = sizes.wide if case["context"] == WIDE else sizes.width
    model = Translator(sizes.symbols, width, attends=case["context"] == WITH).to(device)
    longest = max(sizes.lengths)

    def draw(step: int) -> Batch:
        random = generator(device, case["seed"], step)
        lengths = torch.randint(longest, (2, sizes.B), generator=random, device=device).amax(0) + 1
        return draw_batch(sizes.symbols, lengths, case["seed"], step, 1)

    trainer = Trainer(model, draw, sizes.learning_rate)
    last = sizes.steps // 4
    trainer.run(sizes.steps - last)
    for group in trainer.optimizer.param_groups:
        group["lr"] /= 10
    trainer.run(last)
    right = []
    for length in sizes.lengths:
        lengths = torch.full((sizes.asked,), length, device=device)
        batch = draw_batch(sizes.symbols, lengths, ASKED, case["seed"], length)
        right.append(model.translate(batch.x) == batch.target)
    return {
        "width": width,
        "parameters": count_parameters(model),
        "chance": 1 / sizes.symbols,
        "lengths": list(sizes.lengths),
        "accuracy": [each.double().mean().item() for each in right],
        "whole": [each.all(0).double().mean().item() for each in right],
    }


def over_repeats(rows: list[Row], context: str, key: str = "accuracy") -> list[tuple[int, list[float]]]:
    """Each length, with what every repeat reached there."""
    found = select(rows, context=context)
    return [(length, [row[key][i] for row in found]) for i, length in enumerate(found[0]["lengths"])]


def falls(rows: list[Row], context: str) -> Spread:
    """By how much accuracy is lower at the longest sentences than at the shortest, repeat by repeat."""
    return spread(row["accuracy"][0] - row["accuracy"][-1] for row in select(rows, context=context))


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [_squeezed(rows), _widened(rows), _relieved(rows)]


def _learned(rows: list[Row], context: str) -> bool:
    """The shortest sentences, in every repeat."""
    return spread(over_repeats(rows, context)[0][1]).low >= GOOD


UNLEARNED = " Not every repeat learned even the shortest, so this cannot tell."


def _squeezed(rows: list[Row]) -> Verdict:
    learned = _learned(rows, WITHOUT)
    return Verdict(
        "A seq2seq encoder squeezes a whole sentence into one vector: the longer the sentence, the more is lost.",
        beyond(falls(rows, WITHOUT), MATTERS) if learned else None,
        f"{_described(rows, WITHOUT)} Whether the vector is too small or training too short, a wider one tells "
        f"in part.{'' if learned else UNLEARNED}",
    )


def _widened(rows: list[Row]) -> Verdict:
    narrow, wide = (falls(rows, context) for context in (WITHOUT, WIDE))
    # One that fell by nothing much has nothing to gain.
    able = _learned(rows, WITHOUT) and _learned(rows, WIDE) and narrow.low > MATTERS
    widths = [select(rows, context=context)[0]["width"] for context in (WITHOUT, WIDE)]
    return Verdict(
        "What is lost is lost for want of room: a wider vector loses less.",
        order_of(narrow, wide) if able else None,
        f"From the shortest sentences to the longest accuracy falls by {_points(narrow)} percentage points with a "
        f"vector {widths[0]} wide and by {_points(wide)} with one {widths[1]} wide, after as many updates. "
        f"{_described(rows, WIDE)} A wider model may also learn faster, which this does not part."
        f"{'' if able else ' Where one has not learned, or too little is lost, this cannot tell.'}",
    )


def _relieved(rows: list[Row]) -> Verdict:
    without, with_ = falls(rows, WITHOUT), falls(rows, WITH)
    squeezed, learned = without.low > MATTERS, _learned(rows, WITH)
    why_not = UNLEARNED
    if learned:
        why_not = "" if squeezed else f" With less than {100 * MATTERS:.0f} to relieve, this cannot tell."
    return Verdict(
        "Attention relieves that bottleneck.",
        order_of(without, with_) if learned and squeezed else None,
        f"{_described(rows, WITH)} From the shortest sentences to the longest accuracy falls by {_points(with_)} "
        f"percentage points with attention and by {_points(without)} without, at "
        f"{select(rows, context=WITH)[0]['parameters']:,} parameters each.{why_not}",
    )


def _described(rows: list[Row], context: str) -> str:
    points = [(length, spread(samples)) for length, samples in over_repeats(rows, context)]
    (first, at_first), (last, at_last) = points[0], points[-1]
    below = next((length for length, each in points if each.median < GOOD), None)
    where = f"nowhere below {GOOD:.0%}" if below is None else f"first below {GOOD:.0%} at {below} symbols"
    return (
        f"{context.capitalize()} {at_first.percent} of the symbols are right in sentences of {first}, "
        f"{at_last.percent} in sentences of {last}; the median is {where} (chance is {rows[0]['chance']:.0%})."
    )


def _points(found: Spread) -> str:
    return found.text(lambda value: f"{100 * value:.0f}")


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, [axes] = panels(1, 2, 3.2, sharey=True)
    titles = {"accuracy": "Symbols that are right", "whole": "Sentences that are right as a whole"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        ends = []
        for context, (color, mark) in zip(CONTEXTS, VARIANTS, strict=False):
            points = over_repeats(rows, context, key)
            line(ax, points, color, mark)
            ends.append((spread(points[-1][1]).median, context, color))
        ax.set(title=title, xlabel="symbols in the sentence", ylim=(-0.03, 1.03), xticks=rows[0]["lengths"])
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        name_ends(ax, ends)
    axes[0].axhline(rows[0]["chance"], color=FAINT, linewidth=1, linestyle=":")
    axes[0].annotate(
        "chance", (rows[0]["lengths"][0], rows[0]["chance"]), (0, 4), textcoords="offset points", color=FAINT
    )
    return figure, (
        "Share of symbols, and of whole sentences, that are translated rightly, over the sentence's length; the "
        f"decoder is given what it chose itself. Line: median of {len(select(rows, context=WITH))} repeats, "
        "band: their range."
    )


def table(rows: list[Row]) -> str:
    lines = [
        [context, f"{length}", spread(accuracy).percent, spread(whole).percent]
        for context in CONTEXTS
        for (length, accuracy), (_, whole) in zip(
            over_repeats(rows, context), over_repeats(rows, context, "whole"), strict=True
        )
    ]
    return markdown(["context", "symbols in the sentence", "symbols right", "whole sentences right"], lines)
