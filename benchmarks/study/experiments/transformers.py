"""Three kinds of Transformer, each on a task that asks for its kind, and from where to where information flows."""

from dataclasses import dataclass
from unittest import mock

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn

from benchmarks.models import count_parameters
from benchmarks.reporting.plot_kit import FAINT, PLAIN, plt
from benchmarks.reporting.tables import table as markdown
from benchmarks.study.drawing import VARIANTS, repeats
from benchmarks.study.experiment import Case, Row, Spread, Verdict, all_of, beyond, order_of, select, spread
from benchmarks.study.training import Batch, Trainer
from benchmarks.study.transformers import (
    BOTH,
    DECODER,
    ENCODER,
    MODELS,
    RIVALS,
    SOURCELESS,
    TASK_NAMES,
    TASKS,
    flows,
    kind_of,
    make,
    use,
    without_source,
)
from seqcore import functional

TITLE = "Encoder-only, decoder-only, encoder-decoder"
QUESTION = (
    "What does each of the three kinds of Transformer let an output see, is it so in fact, and does each learn the "
    "kind of task that it is meant for?"
)
ALONE = False

# Tokens of a sequence of which gradients are taken.
FLOW = 10
ASKED = -2
# The share of right tokens from which on a task counts as learned, and how far above chance counts as at chance.
GOOD, NEAR_CHANCE = 0.9, 0.05


@dataclass(frozen=True)
class Sizes:
    symbols: int
    # Tokens of a sequence; the encoder-decoder's source, and what it makes of it, has half as many.
    T: int
    width: int
    layers: int
    heads: int
    B: int
    steps: int
    repeats: int
    learning_rate: float
    asked: int


SIZES = {
    "tiny": Sizes(4, 8, 16, 1, 2, 4, 4, 2, 1e-3, 8),
    "cpu": Sizes(20, 16, 48, 2, 4, 32, 650, 3, 3e-3, 128),
    "gpu": Sizes(64, 64, 256, 4, 8, 128, 6000, 5, 5e-4, 512),
}


def how(sizes: Sizes) -> str:
    half = sizes.T // 2
    return (
        f"torch.nn's Transformer layers, {sizes.layers} of width {sizes.width} with {sizes.heads} heads (as many each "
        "in encoder and decoder), their attention swapped for seqcore's by `seqcore.replace`, over sinusoidal "
        f"positions. Three tasks with {sizes.symbols} symbols. Encoder-only: {half} random tokens and the same again, "
        "of half of the pairs one token hidden; it is to be found. Decoder-only: a motif of 2 to "
        f"{max(sizes.T // 4, 2)} tokens over and over, {sizes.T} in all; after the first {half} the model goes on by "
        f"itself. Encoder-decoder: {half} tokens in, the same in order out, again token by token by itself. "
        "The first two are also tried under the other one's mask, on the same task, and the third with its source "
        f"hidden. {sizes.steps:,} steps of Adam at {sizes.learning_rate:g} on {sizes.B} sequences each, "
        f"{sizes.repeats} repeats, each asked for other sequences; {GOOD:.0%} right at least count as learned. "
        "Chance is what always naming each place's most frequent symbol gets right. Then, of the trained models, the "
        f"gradient of each output (its highest score) with respect to each input embedding, {FLOW} tokens, averaged "
        "over sequences. Calls of seqcore's attention are counted, so that torch's ways past it would be noticed."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"model": model, "seed": seed} for seed in range(sizes.repeats) for model in MODELS]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    torch.manual_seed(case["seed"])
    name, kind = case["model"], kind_of(case["model"])
    model = make(name, sizes).to(device)

    def drawn(T: int, B: int, *seeds: int) -> Batch:
        batch = TASKS[kind](sizes.symbols, T, B, device, *seeds)
        return without_source(batch) if name == SOURCELESS else batch

    trainer = Trainer(model, lambda step: drawn(sizes.T, sizes.B, case["seed"], step), sizes.learning_rate)
    trainer.run(sizes.steps)
    model.eval()
    asked = drawn(sizes.T, sizes.asked, ASKED, case["seed"])
    output = use(kind, model, asked)
    counts = torch.ones_like(asked.target, dtype=torch.bool) if asked.counts is None else asked.counts
    usual = asked.target.mode(1).values[:, None].expand_as(asked.target)
    few = drawn(FLOW * (2 if kind == BOTH else 1), 32, ASKED, case["seed"])
    return {
        "parameters": count_parameters(model),
        "accuracy": (output == asked.target)[counts].double().mean().item(),
        "chance": (usual == asked.target)[counts].double().mean().item(),
        "calls": attention_calls(model, few, sizes.layers * (3 if kind == BOTH else 1)),
        **flows(model, few),
    }


def attention_calls(model: nn.Module, batch: Batch, expected: int) -> int:
    """Of seqcore's attention in one evaluation, where torch's layers have ways past their attention module.

    Raises:
        AssertionError: if there are not as many as attention modules.
    """
    with torch.no_grad(), mock.patch.object(functional, "attention", wraps=functional.attention) as counting:
        model(batch.x)
    if counting.call_count != expected:
        raise AssertionError(f"expected {expected} calls of seqcore's attention, counted {counting.call_count}")
    return counting.call_count


def seen(rows: list[Row], model: str, ahead: bool, key: str = "flow") -> Spread:
    """The share of pairs of an output and an input behind its place, or else not behind it, that have a gradient."""

    def share(matrix: list[list[float]]) -> float:
        pairs = [value for i, line in enumerate(matrix) for j, value in enumerate(line) if (j > i) == ahead]
        return sum(value != 0 for value in pairs) / len(pairs)

    return spread(share(row[key]) for row in select(rows, model=model))


def accuracies(rows: list[Row], model: str, key: str = "accuracy") -> Spread:
    return spread(row[key] for row in select(rows, model=model))


def verdicts(rows: list[Row]) -> list[Verdict]:
    found = {model: accuracies(rows, model).percent for model in MODELS}
    guess = {kind: f"chance is {accuracies(rows, kind, 'chance').percent}" for kind in TASKS}
    hidden = _above_chance(rows, SOURCELESS)
    return [
        Verdict(
            "Encoder-only: every token sees all others, before and after it, which suits understanding a whole text.",
            all_of([*_full(rows, ENCODER), *_learned(rows, ENCODER)]),
            f"{_flow_text(rows, ENCODER)} {found[ENCODER]} of the hidden tokens are found, under a causal mask "
            f"{found[RIVALS[ENCODER]]}; {guess[ENCODER]}.",
        ),
        Verdict(
            "Decoder-only: every token sees only what came before, which is what generating a text needs.",
            all_of([*_causal(rows, DECODER), *_learned(rows, DECODER)]),
            f"{_flow_text(rows, DECODER)} Left to go on by itself it tells {found[DECODER]} of the tokens "
            f"rightly, one trained without the mask {found[RIVALS[DECODER]]}; {guess[DECODER]}.",
        ),
        Verdict(
            "Encoder-decoder: reads one sequence as a whole and writes another, token by token.",
            all_of(
                [
                    *(*_full(rows, BOTH, "source_flow"), *_causal(rows, BOTH), *_learned(rows, BOTH)),
                    *([] if hidden is False else [None]),
                ]
            ),
            f"{_flow_text(rows, BOTH, 'source_flow')} {_flow_text(rows, BOTH)} {found[BOTH]} of the sorted tokens are "
            f"right, with the source hidden {found[SOURCELESS]}; {guess[BOTH]}."
            + ("" if hidden is False else " That is more than chance, so what is learned may not be the source's."),
        ),
    ]


def _learned(rows: list[Row], model: str) -> list[bool | None]:
    """Whether every repeat is good, and better than the rival."""
    found = accuracies(rows, model)
    return [found.low >= GOOD, order_of(found, accuracies(rows, RIVALS[model]))]


def _above_chance(rows: list[Row], model: str) -> bool | None:
    return beyond(spread(row["accuracy"] - row["chance"] for row in select(rows, model=model)), NEAR_CHANCE)


def _full(rows: list[Row], model: str, key: str = "flow") -> list[bool]:
    return [seen(rows, model, ahead, key).low == 1 for ahead in (False, True)]


def _causal(rows: list[Row], model: str) -> list[bool]:
    return [seen(rows, model, ahead=False).low == 1, seen(rows, model, ahead=True).high == 0]


def _flow_text(rows: list[Row], model: str, key: str = "flow") -> str:
    of = {"flow": "tokens it is given", "source_flow": "source"}[key] if kind_of(model) == BOTH else "inputs"
    behind, ahead = (seen(rows, model, each, key) for each in (False, True))
    return f"Outputs depend on {behind.percent} of the {of} up to their own place and on {ahead.percent} after it."


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplot_mosaic([[*"abcd"], [*"eeee"]], height_ratios=(1.1, 1))
    _flow_maps(figure, [axes[name] for name in "abcd"], rows)
    ax = axes["e"]
    for place, model in enumerate(MODELS):
        found = select(rows, model=model)
        repeats(ax, place, [row["accuracy"] for row in found], VARIANTS[0 if model in TASKS else 1][0])
        chance = accuracies(rows, model, "chance").median
        ax.plot(
            [place - 0.3, place + 0.3],
            [chance, chance],
            color=FAINT,
            linestyle=":",
            label="chance" if not place else "",
        )
    ax.set(title="What is right on the task", ylim=(0, 1.05), xlim=(-0.6, len(MODELS) - 0.4))
    names = [model.replace(", ", ",\n") if model in RIVALS.values() else f"{model}\n" for model in MODELS]
    ax.set_xticks(range(len(MODELS)), [f"{name}\n{TASK_NAMES[kind_of(name)]}" for name in names])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="lower right")
    return figure, (
        "Above: the gradient of every output with respect to every input embedding after training (norm, averaged over "
        "sequences, as a share of the largest, logarithmic), in the first repeat; white is exactly 0. Below: the share "
        "of right tokens on each model's task; a point is a repeat, a bar the median of "
        f"{len(select(rows, model=ENCODER))}; in orange their rivals, under the other mask or with the source hidden."
    )


def _flow_maps(figure: Figure, axes: list, rows: list[Row]) -> None:
    maps = {"Encoder-only": (ENCODER, "flow"), "Decoder-only": (DECODER, "flow")}
    maps |= {"Encoder-decoder, source": (BOTH, "source_flow"), "Encoder-decoder, its own": (BOTH, "flow")}
    for ax, (title, (model, key)) in zip(axes, maps.items(), strict=True):
        matrix = [[value or float("nan") for value in line] for line in select(rows, model=model)[0][key]]
        shown = ax.imshow(matrix, norm=LogNorm(1e-3, 1, clip=True), cmap="Blues")
        ax.set(
            title=title,
            xlabel="source token" if key == "source_flow" else "input token",
            xticks=[0, 3, 6, 9],
            yticks=[0, 3, 6, 9],
        )
        ax.grid(visible=False)
    axes[0].set_ylabel("output token")
    figure.colorbar(shown, ax=axes, shrink=0.8, aspect=15, label="gradient, of the largest", format=PLAIN)


def table(rows: list[Row]) -> str:
    lines = [
        [
            model,
            TASK_NAMES[kind_of(model)],
            f"{select(rows, model=model)[0]['parameters']:,}",
            *(_seen_text(rows, model, ahead) for ahead in (False, True)),
            *(accuracies(rows, model, key).percent for key in ("accuracy", "chance")),
        ]
        for model in MODELS
    ]
    return markdown(["model", "task", "parameters", "sees up to its place", "sees after it", "right", "chance"], lines)


def _seen_text(rows: list[Row], model: str, ahead: bool) -> str:
    own = seen(rows, model, ahead).percent
    if kind_of(model) != BOTH:
        return own
    source = "nothing" if model == SOURCELESS else seen(rows, model, ahead, "source_flow").percent
    return f"{own}, of its source {source}"
