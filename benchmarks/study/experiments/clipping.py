"""Exploding gradients, and what clipping does about them: of the whole gradient, and at every step of backward."""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.reporting.plot_kit import PLAIN, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Verdict, all_of, beyond, finite, order_of, select, spread, thinned
from benchmarks.study.models import SequenceModel
from benchmarks.study.tasks import adding
from benchmarks.study.training import Batch, Trainer, loss_of
from seqcore.diagnostics import gradient_flow
from seqcore.diagnostics.magnitude import DECADES
from seqcore.nn.init import orthogonal_recurrent_

TITLE = "Exploding gradients and clipping"
QUESTION = (
    "An RNN whose gradients explode is trained as it is, with the norm of its whole gradient clipped, and with the "
    "gradient bounded at every step of the recurrence. What does each change?"
)
ALONE = False
NAMES = {"none": "no clipping", "norm": "clipped norm", "step": "clipped each step"}
# Norms over the lag, by their key in rows: how they are drawn, and when they were found.
FLOWS = {"log10_norms": (drawing.SOLID, "before"), "log10_norms_after": (drawing.DASHED, "after training")}
POINTS = 40
HELD_OUT = 99
# The mean squared error of always answering the mean, 1: two variances of a number in 0 … 1.
GUESSING = 1 / 6
DIVERGED = 10 * GUESSING
SAME_DIRECTION = 0.99


@dataclass(frozen=True)
class Sizes:
    lag: int
    H: int
    gain: float
    steps: int
    batch: int
    held_out: int
    seeds: int
    learning_rate: float = 0.1
    norm: float = 1.0
    # Of each element of the gradient of the pre-activations at a step.
    bound: float = 0.01


SIZES = {
    "tiny": Sizes(4, 6, 3.0, 4, 4, 8, 3),
    "cpu": Sizes(30, 50, 3.0, 150, 32, 256, 8),
    "gpu": Sizes(100, 256, 2.0, 1000, 64, 1024, 10),
}


def how(sizes: Sizes) -> str:
    return (
        f"The adding problem over {sizes.lag} steps (mean squared error; always answering the mean gives "
        f"{GUESSING:.2f}), an RNN with tanh and {sizes.H} units whose recurrent matrix begins as an orthogonal one "
        f"times {sizes.gain:g}, plain stochastic gradient descent at {sizes.learning_rate}, {sizes.steps} updates of "
        f"{sizes.batch} sequences. As it is; with `torch.nn.utils.clip_grad_norm_` to {sizes.norm:g}; and with "
        f"`RNN(grad_clip={sizes.bound:g})`, which bounds each element of the pre-activations' gradient at every step "
        f"inside the backward pass (Graves 2013). {sizes.seeds} seeds. The norm of ∂L/∂h_t by "
        "`seqcore.diagnostics.gradient_flow` before and after; it explodes if at the first step it is more than "
        f"{10**DECADES:,.0f} times what it is at the last. A run counts as diverged if its held-out error is above "
        f"{DIVERGED:.2f} or no number at all."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"clip": clip, "seed": seed} for clip in reversed(NAMES) for seed in range(sizes.seeds)]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    clip, seed = case["clip"], case["seed"]
    model = _model(sizes, seed, sizes.bound if clip == "step" else None).to(device)
    held_out = adding(sizes.lag, sizes.held_out, device, HELD_OUT, seed)
    trainer = Trainer(
        model,
        lambda step: adding(sizes.lag, sizes.batch, device, seed, step),
        sizes.learning_rate,
        sizes.norm if clip == "norm" else None,
        torch.optim.SGD,
    )
    before, alignment = _flow(model, held_out), _alignment(model, _model(sizes, seed, None).to(device), held_out)
    trainer.run(sizes.steps)
    after = _flow(model, held_out)
    kept = thinned(len(trainer.losses) - 1, POINTS)
    return {
        "loss": trainer.evaluate(held_out)["loss"],
        "updates": [1 + i for i in kept],
        "losses": [finite(trainer.losses[i]) for i in kept],
        "largest_gradient": finite(max(trainer.gradient_norms)),
        "rate_before": finite(before.rate),
        "rate_after": finite(after.rate),
        "verdict_before": before.verdict,
        "verdict_after": after.verdict,
        "log10_norms": _logarithms(before.norms),
        "log10_norms_after": _logarithms(after.norms),
        "alignment": alignment,
    }


def _model(sizes: Sizes, seed: int, bound: float | None) -> SequenceModel:
    torch.manual_seed(seed)
    model = SequenceModel("rnn", 2, 1, sizes.H, grad_clip=bound)
    orthogonal_recurrent_(model.body, sizes.gain)
    return model


def _flow(model: SequenceModel, batch: Batch):
    return gradient_flow(model, batch.x, loss=lambda output: loss_of(output, batch))["body.h"]


def _logarithms(norms: Tensor) -> list[float | None]:
    """By lag; None where there is no finite logarithm."""
    return [finite(math.log10(norm)) if norm > 0 else None for norm in norms.flip(0).tolist()]


def _alignment(model: SequenceModel, plain: SequenceModel, batch: Batch) -> float | None:
    """The cosine of the angle between the model's gradient of its recurrent matrix and the true one."""
    found, true = (
        torch.autograd.grad(loss_of(each(batch.x), batch), each.body.weight_hh_l0)[0].double().flatten()
        for each in (model, plain)
    )
    return finite((found @ true / (found.norm() * true.norm())).item())


def diverged(row: Row) -> bool:
    return row["loss"] is None or row["loss"] > DIVERGED


def verdicts(rows: list[Row]) -> list[Verdict]:
    of = {clip: select(rows, clip=clip) for clip in NAMES}
    return [_damage(of), _cause(of["norm"]), _inside(of)]


def _losses(rows: list[Row]) -> str:
    return f"held-out error {spread(row['loss'] for row in rows)}"


def _count(rows: list[Row]) -> str:
    return f"{sum(map(diverged, rows))} of {len(rows)}"


def _damage(of: dict[str, list[Row]]) -> Verdict:
    free, bounded = (spread(map(diverged, of[clip])) for clip in ("none", "norm"))
    # Of yes and no the rank-sum test is Fisher's exact one.
    fewer = order_of(free, bounded)
    as_many = any(bounded.values) and sum(bounded.values) / bounded.repeats >= sum(free.values) / free.repeats
    return Verdict(
        "Clipping the gradient's norm bounds the damage.",
        False if as_many else fewer,
        f"Diverged without clipping: {_count(of['none'])}; with: {_count(of['norm'])}, {_losses(of['norm'])}, where "
        f"guessing gives {GUESSING:.2f}.",
    )


def _cause(rows: list[Row]) -> Verdict:
    claim = "Clipping the norm does not mend the cause: gradients go on exploding."
    # Where weights are no numbers any more nothing is left to explode.
    ended = [row for row in rows if row["rate_after"] is not None]
    if not ended:
        return Verdict(claim, None, "No run with clipped norm ended with finite gradients.")
    before, after = ([row[f"verdict_{when}"] == "exploding" for row in ended] for when in ("before", "after"))
    rates = [spread(row[f"rate_{when}"] for row in ended) for when in ("before", "after")]
    return Verdict(
        claim,
        beyond(spread(after), 0) if all(before) else None,
        f"With clipped norm ∂L/∂h_t changes by a factor of {rates[1]} a step back after training, {rates[0]} before; "
        f"it explodes in {sum(after)} of {len(ended)} runs after, in {sum(before)} before.",
    )


def _inside(of: dict[str, list[Row]]) -> Verdict:
    growth = {clip: spread(row["rate_before"] for row in of[clip]) for clip in ("none", "step")}
    less = order_of(growth["none"], growth["step"])
    cosines = spread(row["alignment"] for row in of["step"])
    straight = beyond(cosines, SAME_DIRECTION)
    return Verdict(
        "Bounding the gradient at every step of the recurrence slows its growth, at the price of its direction.",
        all_of([less, None if straight is None else not straight]),
        f"At the start a factor of {growth['step']} a step instead of {growth['none']}. The cosine between the "
        f"recurrent matrix's gradient and the true one is {cosines}; clipping the norm leaves the direction as it is. "
        f"Diverged: {_count(of['step'])}, {_losses(of['step'])}.",
    )


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, ((losses, flows),) = panels(1, 2, 3.8)
    shown = [GUESSING]
    for (clip, name), (color, _) in zip(NAMES.items(), drawing.VARIANTS, strict=False):
        found = select(rows, clip=clip)
        points = zip(found[0]["updates"], zip(*(row["losses"] for row in found), strict=True), strict=True)
        # Where one seed has no finite loss any more, the line ends.
        ended = [(update, each) for update, each in points if all(loss is not None for loss in each)]
        drawing.line(losses, ended, color, label=name)
        if clip != "none":
            shown += [loss for _, each in ended for loss in each if loss > 0]
        for key, (dash, when) in FLOWS.items():
            lags = zip(*(row[key] for row in found), strict=True)
            drawn = [(lag, [n for n in norms if n is not None]) for lag, norms in enumerate(lags)]
            if any(norms for _, norms in drawn):
                drawing.line(flows, drawn, color, label=f"{name}, {when}", linestyle=dash)
    losses.set(yscale="log", xlabel="updates", ylabel="training error (mean squared)", title="Training")
    losses.set_ylim(min(shown) / 2, max(shown) * 2)
    losses.yaxis.set_major_formatter(PLAIN)
    drawing.level(losses, GUESSING, "guessing")
    losses.legend()
    flows.set(xlabel="lag (steps back)", ylabel="log10 of the norm of ∂L/∂h_t", title="Gradient over lag")
    flows.legend()
    return figure, (
        "Left: training error over updates, as high as the clipped runs need it: the line of those without clipping "
        "leaves the picture, and ends where a seed's error is no finite number any more. Right: the norm "
        "of ∂L/∂h_t over the lag, before training (solid; without clipping and with clipped norm it is the same) "
        "and after it (dashed; missing where it is not finite). Medians over seeds, bands from the least to the "
        "largest."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for clip, name in NAMES.items():
        found = select(rows, clip=clip)
        largest = [row["largest_gradient"] for row in found]
        lines.append(
            [name, _count(found), _losses(found).removeprefix("held-out error ")]
            + ["infinite" if None in largest else f"{max(largest):.2g}"]
            + [str(spread(row[key] for row in found)) for key in ("rate_before", "rate_after", "alignment")]
        )
    header = ["training", "diverged", "held-out error", "largest gradient norm", "factor a step before"]
    return markdown([*header, "factor a step after", "cosine to the true gradient"], lines)
