"""GRU against LSTM on text, at equal width and at equal parameters: how large, how fast, and how soon how good."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.models import count_parameters
from benchmarks.reporting.plot_kit import FAINT, plain_y, plt
from benchmarks.reporting.tables import table as markdown
from benchmarks.study.drawing import VARIANTS, line, repeats
from benchmarks.study.experiment import Case, Row, Spread, Verdict, all_of, order_of, select, spread
from benchmarks.study.models import SequenceModel, has_library_layers, loop, width_for
from benchmarks.study.training import Batch, Trainer
from benchmarks.text import Corpus, load_corpus
from seqcore.clock import Stopwatch, percentile

TITLE = "GRU against LSTM"
QUESTION = (
    "What does a GRU save with its three gates instead of four, and does it pay for that by learning more slowly, "
    "counted in steps and in seconds?"
)
# Losses are also drawn over seconds, which nothing else may lengthen.
ALONE = True

LSTM, GRU, LARGER_GRU = "LSTM", "GRU, equal width", "GRU, equal parameters"
MODELS = (LSTM, GRU, LARGER_GRU)
TIMED_ROUNDS = 20


@dataclass(frozen=True)
class Sizes:
    text_bytes: int
    # Of the LSTM, and of the GRU at equal width.
    width: int
    T: int
    B: int
    steps: int
    evaluate_every: int
    asked: int
    repeats: int
    learning_rate: float


SIZES = {
    "tiny": Sizes(40_000, 8, 8, 4, 4, 2, 4, 2, 1e-2),
    "cpu": Sizes(500_000, 96, 48, 32, 480, 40, 64, 3, 3e-3),
    "gpu": Sizes(20_000_000, 1024, 256, 64, 6000, 150, 256, 5, 1e-3),
}


def how(sizes: Sizes) -> str:
    return (
        f"Character models, an embedding, one recurrent layer and a projection, learn {sizes.text_bytes:,} bytes of "
        f"source text: an LSTM {sizes.width} wide, a GRU as wide, and a GRU so wide that the whole model has as many "
        f"parameters as the LSTM's. {sizes.steps:,} steps of Adam at {sizes.learning_rate:g} on {sizes.B} excerpts of "
        f"{sizes.T} characters, the same for all three, {sizes.repeats} repeats with other weights and excerpts. "
        f"Every {sizes.evaluate_every} steps the loss on {sizes.asked} excerpts of text that is never trained on. "
        "Nothing else runs; what a step takes is the median over all steps, and that times their number are the "
        "seconds. The layer alone, forward and backward, is timed apart. On a CPU torch's LSTM is one operator of "
        f"oneDNN where its GRU is a loop over steps: there {TIMED_ROUNDS} steps more, and the layer, are timed with "
        "all of them as that loop (without oneDNN), and cells are judged by these times."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"model": model, "seed": seed} for seed in range(sizes.repeats) for model in MODELS]


@functools.lru_cache(maxsize=1)
def corpus(text_bytes: int) -> Corpus:
    return load_corpus(None, text_bytes)


def make(name: str, alphabet: int, width: int) -> SequenceModel:
    """The model of that name; ``width`` is the LSTM's."""
    build = lambda op, width: SequenceModel(op, 0, alphabet, width, alphabet)
    if name != LARGER_GRU:
        return build("lstm" if name == LSTM else "gru", width)
    with torch.device("meta"):
        parameters = count_parameters(build("lstm", width))
    return build("gru", width_for("gru", 0, alphabet, parameters, alphabet))


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    torch.manual_seed(case["seed"])
    text = corpus(sizes.text_bytes)
    model = make(case["model"], len(text.alphabet), sizes.width).to(device)

    def draw_batch(step: int, B: int = sizes.B, held_out: bool = False) -> Batch:
        characters, following = text.batch(sizes.T, B, case["seed"] * 1_000_003 + step, held_out)
        return Batch(characters.to(device), following.to(device))

    trainer, step_ms, curve = Trainer(model, draw_batch, sizes.learning_rate), [], []
    held_out = text.batch(sizes.T, sizes.asked, 0, held_out=True)
    held_out = Batch(*(part.to(device) for part in held_out))
    for step in range(sizes.steps + 1):
        if step % sizes.evaluate_every == 0:
            curve.append(trainer.evaluate(held_out)["loss"])
        if step < sizes.steps:
            step_ms.append(_wall_ms(trainer.step))
    layer, alike = model.body, {"loop_layer_ms": None, "loop_step_ms": None}
    own_ms = layer_ms(layer, sizes, device)
    if has_library_layers(device):
        with loop():
            again = [_wall_ms(trainer.step) for _ in range(TIMED_ROUNDS)]
            alike = {"loop_layer_ms": layer_ms(layer, sizes, device), "loop_step_ms": percentile(again, 50)}
    return {
        "width": layer.hidden_size,
        "parameters": count_parameters(model),
        "layer_parameters": count_parameters(layer),
        # As torch runs them here, and as its loop over steps where that is another way.
        "layer_ms": own_ms,
        "step_ms": percentile(step_ms, 50),
        **alike,
        "every": sizes.evaluate_every,
        "loss": curve,
    }


def _wall_ms(step: Callable[[], None]) -> float:
    """Of a training step, which waits for the device since it asks for the loss."""
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def layer_ms(layer: torch.nn.Module, sizes: Sizes, device: str) -> float:
    """Forward and backward of the layer by itself."""
    stopwatch = Stopwatch(device)
    x = torch.randn(sizes.T, sizes.B, layer.input_size, device=device, requires_grad=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn(sizes.T, sizes.B, layer.hidden_size, device=device)
    call = lambda: torch.autograd.grad(layer(x)[0], inputs, dy)
    call()
    return percentile([stopwatch(call) for _ in range(TIMED_ROUNDS)], 50)


def steps_to(loss: float, row: Row) -> float | None:
    """After how many steps the held-out loss is that low, interpolated; None if it never is."""
    curve = row["loss"]
    for i, reached in enumerate(curve):
        if reached <= loss:
            before = curve[i - 1] if i else reached
            share = 1.0 if before == reached else (before - loss) / (before - reached)
            return row["every"] * (i - 1 + share) if i else 0.0
    return None


def like(rows: list[Row], model: str, key: str) -> Spread:
    """``key``, "layer_ms" or "step_ms", where all cells run alike."""
    return of(rows, model, key if ran_alike(rows) else f"loop_{key}")


def ran_alike(rows: list[Row]) -> bool:
    """Whether torch itself runs both cells in the same way."""
    return rows[0]["loop_step_ms"] is None


def step_seconds(rows: list[Row], alike: bool) -> dict[str, float]:
    """Of each model what a step takes, the median over repeats."""
    times = like if alike else of
    return {model: times(rows, model, "step_ms").median / 1e3 for model in MODELS}


def loss_after(seconds: float, row: Row, step: float) -> float:
    """The held-out loss after that long at so many seconds a step, interpolated; the last one if all is done sooner."""
    place = min(seconds / (step * row["every"]), len(row["loss"]) - 1)
    i = min(int(place), len(row["loss"]) - 2)
    return row["loss"][i] + (place - i) * (row["loss"][i + 1] - row["loss"][i])


def steps_of(row: Row) -> int:
    return row["every"] * (len(row["loss"]) - 1)


def of(rows: list[Row], model: str, key: str) -> Spread:
    return spread(row[key] for row in select(rows, model=model))


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [_fewer(rows), _cheaper(rows), _slower_in_steps(rows), _worse_in_time(rows)]


def _fewer(rows: list[Row]) -> Verdict:
    lstm, gru = (of(rows, model, "layer_parameters").median for model in (LSTM, GRU))
    return Verdict(
        "A GRU has three gates where an LSTM has four, and three quarters of its parameters.",
        abs(gru / lstm - 0.75) < 0.005,
        f"{of(rows, LSTM, 'width').median:.0f} wide, the GRU has {gru:,.0f} parameters and the LSTM {lstm:,.0f}: "
        f"{gru / lstm:.1%} of them.",
    )


def _cheaper(rows: list[Row]) -> Verdict:
    times = {model: like(rows, model, "layer_ms") for model in MODELS}
    gates = of(rows, GRU, "layer_parameters").median / of(rows, LSTM, "layer_parameters").median
    here = ""
    if not ran_alike(rows):
        own = {model: of(rows, model, "layer_ms") for model in MODELS}
        here = (
            f" As torch runs them here, the LSTM as one operator, the GRU as a loop: {own[LSTM]} ms and {own[GRU]} ms, "
            f"{over(rows, GRU, of)} times that."
        )
    return Verdict(
        "A GRU is cheaper to compute.",
        order_of(times[LSTM], times[GRU]),
        f"Forward and backward{_as_loops(rows)}, the LSTM takes {times[LSTM]} ms, the GRU as wide {times[GRU]} ms: "
        f"{over(rows, GRU)} times that, where its weights say {gates:.2f}. A GRU with as many parameters takes "
        f"{times[LARGER_GRU]} ms, {over(rows, LARGER_GRU)} times that.{here}",
    )


def over(rows: list[Row], model: str, times: Callable[..., Spread] = like) -> str:
    """How many times the LSTM's the layer's time is, repeat by repeat."""
    pairs = zip(times(rows, model, "layer_ms").values, times(rows, LSTM, "layer_ms").values, strict=True)
    return spread(mine / its for mine, its in pairs).text("{:.2f}".format)


def _as_loops(rows: list[Row]) -> str:
    return "" if ran_alike(rows) else ", all as torch's loop over steps"


def _slower_in_steps(rows: list[Row]) -> Verdict:
    # All get there, so that all can be compared.
    goal = max(row["loss"][-1] for row in rows)
    needed = {model: spread(steps_to(goal, row) for row in select(rows, model=model)) for model in MODELS}
    last = {model: spread(row["loss"][-1] for row in select(rows, model=model)) for model in MODELS}
    form = "{:,.0f}".format
    text = ", the ".join(f"{model} {needed[model].text(form)} steps" for model in MODELS)
    return Verdict(
        "A GRU converges more slowly, counted in steps.",
        all_of([order_of(needed[model], needed[LSTM]) for model in (GRU, LARGER_GRU)]),
        f"To a held-out loss of {goal:.2f} nats a character the {text}. After {steps_of(rows[0]):,} steps it is "
        f"{_losses(last)}.",
    )


def _worse_in_time(rows: list[Row]) -> Verdict:
    budget, found = after_equal_time(rows, alike=True)
    here = ""
    if not ran_alike(rows):
        own_budget, own = after_equal_time(rows, alike=False)
        here = f" As torch runs them here, after {own_budget:.3g} s: {_losses(own)}."
    return Verdict(
        "What a GRU saves on each step, it gives back by converging more slowly: after equal time it is behind.",
        all_of([order_of(found[model], found[LSTM]) for model in (GRU, LARGER_GRU)]),
        f"After {budget:.3g} s of training{_as_loops(rows)}, which the fastest needs for all its steps, the held-out "
        f"loss is {_losses(found)}.{here}",
    )


def after_equal_time(rows: list[Row], alike: bool) -> tuple[float, dict[str, Spread]]:
    """The seconds in which the fastest is done, and the losses that each model has reached by then."""
    step = step_seconds(rows, alike)
    budget = min(step.values()) * steps_of(rows[0])
    reached = lambda model: (loss_after(budget, row, step[model]) for row in select(rows, model=model))
    return budget, {model: spread(reached(model)) for model in MODELS}


def _losses(found: dict[str, Spread]) -> str:
    return ", ".join(f"{found[model].text('{:.2f}'.format)} ({model})" for model in MODELS)


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, [by_step, by_second, step] = plt.subplots(
        1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(3, 3, 2)
    )
    looks = dict(zip(MODELS, VARIANTS, strict=False))
    _curves(by_step, rows, looks, lambda row: row["every"])
    each_step = step_seconds(rows, alike=True)
    _curves(by_second, rows, looks, lambda row: row["every"] * each_step[row["model"]])
    by_step.set(title="Held-out loss over steps", xlabel="training steps", ylabel="nats a character")
    by_second.set(title="Held-out loss over time", xlabel="seconds of training", ylabel="nats a character")
    by_step.legend()
    for place, (model, look) in enumerate(looks.items()):
        repeats(step, place, like(rows, model, "step_ms").values, *look)
        if not ran_alike(rows):
            repeats(step, place + 0.3, of(rows, model, "step_ms").values, FAINT, "x")
    step.set(title="A training step", ylabel="ms", xlim=(-0.6, 2.8))
    step.set_ylim(bottom=0)
    step.set_xticks(range(len(MODELS)), [model.replace(" ", "\n") for model in MODELS])
    step.grid(axis="x", visible=False)
    crosses = "" if ran_alike(rows) else " Times are those of torch's loop over steps; grey, as torch runs them here."
    return figure, (
        "Loss on text that is never trained on, over training steps and over the seconds they take (their number times "
        f"the median step): median of {len(select(rows, model=LSTM))} repeats, and their range. On the right what a "
        f"training step takes, update included; a point is a repeat, a bar their median.{crosses}"
    )


def _curves(ax: Axes, rows: list[Row], looks: dict[str, Sequence[str]], each) -> None:
    """Losses from the second evaluation on: the first, of untrained weights, would flatten all others."""

    for model, (color, mark) in looks.items():
        found = select(rows, model=model)
        points = [(i * each(found[0]), [row["loss"][i] for row in found]) for i in range(1, len(found[0]["loss"]))]
        line(ax, points, color, mark, model)
    ax.set_xlim(left=0)
    ax.set_yscale("log")
    plain_y(ax)


def table(rows: list[Row]) -> str:
    lines = [
        [
            model,
            *(f"{of(rows, model, key).median:,.0f}" for key in ("width", "layer_parameters", "parameters")),
            *(str(times(rows, model, key)) for key in ("layer_ms", "step_ms") for times in (like, of)),
            spread(row["loss"][-1] for row in select(rows, model=model)).text("{:.3f}".format),
        ]
        for model in MODELS
    ]
    header = [
        "model",
        "width",
        "layer's parameters",
        "all parameters",
        "layer, all alike, ms",
        "layer, as run here, ms",
        "training step, all alike, ms",
        "training step, as run here, ms",
        "loss at the end",
    ]
    return markdown(header, lines)
