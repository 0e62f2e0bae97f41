"""How many steps must wait for each other as sequences grow, and how the time grows with them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import seqcore
from benchmarks.layers import attend, plain
from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.fits import Fit, fit_power
from benchmarks.reporting.plot_kit import STYLES, log_log, name_ends, plt
from benchmarks.reporting.tables import table as markdown
from benchmarks.study.drawing import line
from benchmarks.study.experiment import Case, Row, Spread, Verdict, all_of, beyond, spread
from benchmarks.study.models import BODIES, HEADS, RECURRENT, causal_mask
from seqcore.clock import Stopwatch
from seqcore.kernels.work import dependent_steps
from seqcore.nn import MultiheadAttention

TITLE = "Steps that wait for each other"
QUESTION = (
    "How many operations must wait for each other before the last token's output is known, and how does the time to "
    "compute and to train grow with the length: in proportion, with the square, or exponentially?"
)
ALONE = True

PASSES = ("forward", "training")
# Autograd's names for products of matrices.
PRODUCTS = ("AddmmBackward", "MmBackward", "BmmBackward", "BaddbmmBackward")
SENTENCE = 1000
# Slopes that count as in proportion; as a square, at the end; and as on the way there, if they rise, by how much.
PROPORTION, SQUARE, ON_THE_WAY, RISES = (0.85, 1.15), 1.75, 1.5, 0.1


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...]
    B: int
    width: int
    rounds: int
    # Over all lengths, in a round.
    turns: int
    # Chains are followed through plain PyTorch, a step at a time, which takes a while.
    longest_chain: int


SIZES = {
    "tiny": Sizes((2, 4, 8, 16), 2, 8, 2, 1, 16),
    "cpu": Sizes((16, 32, 64, 128, 256, 512, 1024, 2048, 4096), 2, 64, 5, 2, 2048),
    "gpu": Sizes((128, 256, 512, 1024, 2048, 4096, 8192), 8, 1024, 5, 4, 2048),
}


def how(sizes: Sizes) -> str:
    return (
        f"One layer each of RNN, GRU, LSTM and causal attention ({heads(sizes.width)} heads, projections included), "
        f"{sizes.width} in and out, {sizes.B} sequences of {sizes.lengths[0]:,} to {sizes.lengths[-1]:,} tokens. "
        "Steps are counted in the graph that autograd records of plain PyTorch: the most products of matrices on any "
        "way from the output back to the input. If fused, a recurrent layer first projects all inputs at "
        "once and then takes T steps, and attention is three. Times, in turns over the layers, are those of forward "
        "without gradients and of training, which is forward and backward, each the fastest of "
        f"{sizes.turns} calls or more; {sizes.rounds} rounds. Over the larger half of the lengths T both T^a and "
        "e^(bT) are fitted to each round's times, by least squares of the logarithm; R² tells which fits."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"seed": seed} for seed in range(sizes.rounds)]


@dataclass(frozen=True)
class Layer:
    module: nn.Module
    forward: Callable[[Tensor], Tensor]

    def infer(self, x: Tensor) -> None:
        with torch.no_grad():
            self.forward(x)

    def train(self, x: Tensor, dy: Tensor) -> None:
        torch.autograd.grad(self.forward(x), [x, *self.module.parameters()], dy)


def heads(width: int) -> int:
    """Of at most 64 features each, as is usual."""
    return max(HEADS, width // 64)


def make(op: str, sizes: Any, T: int, device: str, backend: str | None = None) -> Layer:
    """The layer of ``sizes.width`` as a function of [T, B, width]."""
    torch.manual_seed(0)
    if op in RECURRENT:
        module: nn.Module = RECURRENT[op](sizes.width, sizes.width, backend=backend, device=device)
        return Layer(module, lambda x: plain(module, x))
    module = MultiheadAttention(sizes.width, heads(sizes.width), backend=backend, device=device)
    mask = causal_mask(T, device)
    return Layer(module, lambda x: attend(module, x, mask))


def passes(layer: Layer, sizes: Sizes, T: int, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    x = torch.randn(T, sizes.B, sizes.width, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    yield "forward", lambda: layer.infer(x)
    yield "training", lambda: layer.train(x, dy)


def longest_chain(output: Tensor) -> int:
    """Products of matrices on the way from ``output`` back through autograd's graph that has most of them."""
    chain: dict = {None: 0}
    stack = [output.grad_fn]
    while stack:
        node = stack[-1]
        before = [each for each, _ in node.next_functions if each is not None]
        unknown = [each for each in before if each not in chain]
        stack += unknown
        if not unknown:
            stack.pop()
            chain[node] = node.name().startswith(PRODUCTS) + max((chain[each] for each in before), default=0)
    return chain[output.grad_fn]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    """All lengths in turns: what disturbs the machine for a while disturbs no length alone."""
    stopwatch = Stopwatch(device)
    calls = [
        {(pass_, op): call for op in BODIES for pass_, call in passes(make(op, sizes, T, device), sizes, T, device)}
        for T in sizes.lengths
    ]
    fastest = [dict.fromkeys(each, math.inf) for each in calls]
    for turn in range(sizes.turns + 1):
        for found, by_name, T in zip(fastest, calls, sizes.lengths, strict=True):
            for name, call in by_name.items():
                # Short calls more often: they are the noisier ones. The first turn warms up.
                for _ in range(max(1, min(4, 256 // T)) if turn else 1):
                    ms = stopwatch(call)
                    found[name] = min(found[name], ms) if turn else math.inf
    times = {pass_: {op: [found[pass_, op] for found in fastest] for op in BODIES} for pass_ in PASSES}
    # The same in every round.
    counted = [T for T in sizes.lengths if T <= sizes.longest_chain and case["seed"] == 0]
    chain = {op: [chain_of(op, sizes, T) for T in counted] for op in BODIES}
    steps = {op: [dependent_steps(op, T, "forward") for T in sizes.lengths] for op in BODIES}
    return {"B": sizes.B, "lengths": list(sizes.lengths), **times, "chain": chain, "steps": steps}


def chain_of(op: str, sizes: Sizes, T: int) -> int:
    """Of the last token of one sequence: what it needs is all that counts, whoever computes it."""
    x = torch.randn(T, 1, sizes.width, requires_grad=True)
    with seqcore.use_backend("reference"):
        return longest_chain(make(op, sizes, T, "cpu", "reference").forward(x)[-1])


def over_rounds(rows: list[Row], pass_: str, op: str) -> list[tuple[int, list[float]]]:
    """Each length, with its milliseconds in every round."""
    return [(T, [row[pass_][op][i] for row in rows]) for i, T in enumerate(rows[0]["lengths"])]


def chain(rows: list[Row], op: str) -> list[tuple[int, int]]:
    """Each length that was counted, with its chain."""
    return list(zip(rows[0]["lengths"], next(row["chain"][op] for row in rows if row["chain"][op]), strict=False))


def fits(rows: list[Row], pass_: str, op: str, of: Callable[[float], float] = lambda T: T) -> list[Fit]:
    """Each round's law: time ∝ T^slope; with ``of`` = exp, time ∝ e^(slope·T)."""
    found = [fit_power([of(T) for T in row["lengths"]], row[pass_][op]) for row in rows]
    return [fit for fit in found if fit]


def slope(rows: list[Row], pass_: str, op: str) -> Spread:
    return spread(fit.slope for fit in fits(rows, pass_, op))


def last_slopes(rows: list[Row], pass_: str, op: str, pairs: int = 3) -> list[list[float]]:
    """Of each round the slopes between neighbours among the longest sequences, ``pairs`` of them at most."""
    lengths = rows[0]["lengths"][-pairs - 1 :]
    found = []
    for row in rows:
        points = list(zip(lengths, row[pass_][op][-pairs - 1 :], strict=True))
        found.append([math.log(b / a) / math.log(last / first) for (first, a), (last, b) in pairwise(points)])
    return found


def fit_qualities(rows: list[Row], op: str) -> tuple[list[float], list[float]]:
    """R² of a power of T, and of an exponential, in training, for each round."""
    last = rows[0]["lengths"][-1]
    # In units of the longest, so that exp holds it; the same law in another unit.
    exponential = fits(rows, "training", op, lambda T: math.exp(T / last))
    return [fit.r_squared for fit in fits(rows, "training", op)], [fit.r_squared for fit in exponential]


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [_dependent(rows), _exponential(rows), _proportional(rows), _quadratic(rows)]


def _dependent(rows: list[Row]) -> Verdict:
    chains = {op: chain(rows, op) for op in BODIES}
    first, last = (chains["rnn"][place][0] for place in (0, -1))
    per_token = {op: (found[-1][1] - found[0][1]) / (last - first) for op, found in chains.items()}
    each_token = all(per_token[op] >= 1 for op in RECURRENT)
    holds = each_token if last >= SENTENCE or not each_token else None
    counted = ", ".join(f"{NAMES[op]} {found[-1][1]:,}" for op, found in chains.items())
    growth = ", ".join(f"{NAMES[op]} {per_token[op]:.3g}" for op in BODIES)
    reach = "" if last >= SENTENCE else f" The longest counted is {last:,}, short of {SENTENCE:,}."
    return Verdict(
        f"A recurrent layer needs T dependent steps for T tokens: a {SENTENCE:,}-word sentence {SENTENCE:,} of them.",
        holds,
        f"Products of matrices that wait for each other at T = {last:,}: {counted}; more for each further token: "
        f"{growth}.{reach} {_at_last(rows)}",
    )


def _at_last(rows: list[Row]) -> str:
    texts = []
    for op in BODIES:
        T, samples = over_rounds(rows, "training", op)[-1]
        ms = spread(samples)
        texts.append(f"{NAMES[op]} {ms} ms, {spread(1e3 * each / T for each in samples)} µs a token")
    return f"Forward and backward of {rows[0]['B']} sequences of {T:,} take " + "; ".join(texts) + "."


def _exponential(rows: list[Row]) -> Verdict:
    if not fits(rows, "training", "rnn"):
        few = len(rows[0]["lengths"])
        return Verdict(EXPONENTIAL, None, f"With {few} lengths measured no law can be told from another.")
    texts, answers = [], []
    for op in BODIES:
        power, exponential = fit_qualities(rows, op)
        # Round by round, as both are fitted to the same times.
        better = spread(b - a for a, b in zip(power, exponential, strict=True))
        answers.append(beyond(better, 0))
        qualities = [spread(each).text("{:.3f}".format) for each in (power, exponential)]
        power_law = f"T^{slope(rows, 'training', op).text('{:.2f}'.format)}"
        texts.append(f"{NAMES[op]} as {power_law} (R² {qualities[0]}; as an exponential of T {qualities[1]})")
    fit = fits(rows, "training", "rnn")[0]
    return Verdict(
        EXPONENTIAL,
        all_of(answers[: len(RECURRENT)]),
        f"From T = {fit.first:,} to {fit.last:,} the time to train grows: {'; '.join(texts)}.",
    )


EXPONENTIAL = "Longer sequences take a recurrent layer exponentially longer to train."


def _proportional(rows: list[Row]) -> Verdict:
    least, most = PROPORTION
    slopes = {pass_: {op: slope(rows, pass_, op) for op in RECURRENT} for pass_ in PASSES}
    answers = [
        answer for found in slopes["training"].values() for answer in (beyond(found, least), _not(beyond(found, most)))
    ]
    told = {
        pass_: ", ".join(f"{NAMES[op]} T^{each.text('{:.2f}'.format)}" for op, each in found.items())
        for pass_, found in slopes.items()
    }
    return Verdict(
        "The time to train a recurrent layer grows in proportion to the length.",
        all_of(answers),
        f"Over the larger half of the lengths training takes: {told['training']}; forward alone: {told['forward']}. In "
        f"proportion is T^1; {least:g} to {most:g} count as that. What a call costs at any length makes it less.",
    )


def _not(answer: bool | None) -> bool | None:
    return None if answer is None else not answer


def _quadratic(rows: list[Row]) -> Verdict:
    found = {pass_: last_slopes(rows, pass_, "attention") for pass_ in PASSES}
    answers = {pass_: _square(slopes) for pass_, slopes in found.items()}
    texts = []
    for pass_, slopes in found.items():
        each = ", ".join(f"T^{spread(place).text('{:.2f}'.format)}" for place in zip(*slopes, strict=True))
        texts.append(f"{pass_} as {each}, {answers[pass_][1]}")
    lengths = rows[0]["lengths"][-len(found["training"][0]) - 1 :]
    return Verdict(
        "Attention does all tokens at once, but its time tends to the square of their number.",
        all_of([answer for answer, _ in answers.values()]),
        f"From T = {' to '.join(f'{T:,}' for T in lengths)} attention's time grows {'; '.join(texts)}. Two is a "
        "square, one in proportion, and projections, which are in proportion, make the more of it the shorter "
        "sequences are.",
    )


def _square(slopes: list[list[float]]) -> tuple[bool | None, str]:
    """Whether rounds' slopes, up to the longest sequences, are a square's or rise towards it, and that in words."""
    last = spread(each[-1] for each in slopes)
    medians = [spread(place).median for place in zip(*slopes, strict=True)]
    rises = beyond(spread(each[-1] - each[0] for each in slopes), RISES) if len(medians) > 2 else False
    rises = rises and medians == sorted(medians)
    if beyond(last, SQUARE):
        return True, f"at the end above {SQUARE:g}, a square"
    if rises and beyond(last, ON_THE_WAY):
        return True, f"rising and above {ON_THE_WAY:g}, so tending to a square"
    if beyond(last, ON_THE_WAY) is False or (beyond(last, SQUARE) is False and rises is False):
        return False, "neither near a square nor rising to it"
    return None, "which rounds do not agree on"


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
    chains = lambda rows, _, op: [(T, [count]) for T, count in chain(rows, op)]
    panels = {"Dependent products": (chains, "chain"), "Forward": (over_rounds, "forward")}
    panels["Forward and backward"] = (over_rounds, "training")
    for ax, (title, (points_of, key)) in zip(axes, panels.items(), strict=True):
        ends: dict[float, list[str]] = {}
        for op in BODIES:
            points = points_of(rows, key, op)
            line(ax, points, *STYLES[op])
            ends.setdefault(spread(points[-1][1]).median, []).append(op)
        ax.set(title=title, xlabel="tokens T", ylabel="products" if key == "chain" else "ms")
        log_log(ax, rows[0]["lengths"])
        # One name for those that lie upon each other.
        named = [(y, ", ".join(NAMES[op] for op in ops), STYLES[ops[-1]][0]) for y, ops in ends.items()]
        name_ends(ax, named)
    return figure, (
        "Over the length of the sequences: the products of matrices of which each needs the one before, counted in "
        "plain PyTorch's graph; the time of one layer forward; and forward and backward. Both axes are logarithmic: in "
        f"proportion is a slope of 1, a square one of 2. Median of {len(rows)} rounds, and their range."
    )


def table(rows: list[Row]) -> str:
    lines = []
    for op in BODIES:
        counted = dict(chain(rows, op))
        forward, training = (over_rounds(rows, pass_, op) for pass_ in PASSES)
        for i, (T, samples) in enumerate(training):
            us = spread(1e3 * ms / T for ms in samples)
            steps = [f"{counted[T]:,}" if T in counted else "-", f"{rows[0]['steps'][op][i]:,}"]
            times = [str(each) for each in (spread(forward[i][1]), spread(samples), us)]
            lines.append([f"{NAMES[op]}, T = {T:,}", *steps, *times])
    fused = "steps if fused (input's projection + T)"
    header = ["layer", "chain of products", fused, "forward, ms", "training, ms", "training, µs a token"]
    return markdown(header, lines)
