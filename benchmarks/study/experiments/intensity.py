"""What bounds a recurrent step: the roofline of the layers over the batch, weights read at every step or once."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.answers import NAMES
from benchmarks.reporting.page import INK
from benchmarks.reporting.plot_kit import FAINT, PLAIN, STYLES, panels, plain_y
from benchmarks.reporting.tables import table as markdown
from benchmarks.study.drawing import line
from benchmarks.study.experiment import Case, Row, Spread, Verdict, beyond, spread
from benchmarks.study.experiments.steps import make
from benchmarks.study.models import BODIES, RECURRENT, has_library_layers, loop
from benchmarks.timing import RoofMeter, Roofs
from seqcore.clock import Stopwatch
from seqcore.errors import UnsupportedInput
from seqcore.kernels.work import GATES, recurrent_flops, work
from seqcore.profiling import Recurrence
from seqcore.profiling.kernel_tree import kernel_tree

TITLE = "What bounds a recurrent step"
QUESTION = (
    "Is an LSTM bound by how fast its weights come from memory, as its four products a step suggest? From which batch "
    "on would it not be, and how near to any limit of the machine does it come?"
)
ALONE = True

# Which share of a roof counts as being bound by it.
NEAR = 0.5
CALLS = 3


@dataclass(frozen=True)
class Sizes:
    batches: tuple[int, ...]
    T: int
    width: int
    rounds: int
    dtype: str
    # Of the square product and of the copy that give the machine's two roofs.
    side: int
    copy_bytes: int


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = {
    "tiny": Sizes((1, 4, 16), 3, 16, 2, "float32", 32, 2**16),
    "cpu": Sizes(BATCHES, 32, 512, 3, "float32", 1024, 2**27),
    "gpu": Sizes((*BATCHES, 512, 1024), 512, 1024, 10, "bfloat16", 8192, 2**31),
}


def how(sizes: Sizes) -> str:
    return (
        f"One layer each, {sizes.width} in and out, {sizes.T} tokens, {sizes.dtype}, forward without gradients, at "
        f"batches of {sizes.batches[0]} to {sizes.batches[-1]}. Operations are those of all products, input's "
        "included. Bytes are input, output and weights, and are counted twice over: with the recurrent weights read "
        "from memory at every step, and with them read once and held on the chip. The machine's two limits are "
        f"measured in between: a product of two matrices {sizes.side:,} wide, and a copy of "
        f"{sizes.copy_bytes / 2**20:,.3g} MiB, the best of all samples. A time is the fastest of {CALLS} calls, in "
        f"turns over the layers, in each of {sizes.rounds} rounds. On a CPU torch's LSTM is one operator of oneDNN "
        "where its RNN is a loop over steps; at the least and the largest batch both are also timed as the loop "
        "(without oneDNN), which is what four products are judged by."
    )


def cases(sizes: Sizes) -> list[Case]:
    return [{"B": B} for B in sizes.batches]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    B, stopwatch = case["B"], Stopwatch(device)
    dtype = getattr(torch, sizes.dtype)
    meter = RoofMeter(stopwatch, device, sizes.dtype, sizes.side, sizes.copy_bytes)
    x = torch.randn(sizes.T, B, sizes.width, device=device, dtype=dtype)
    layers = {op: make(op, sizes, sizes.T, device) for op in BODIES}
    for layer in layers.values():
        layer.module.to(dtype)
        layer.infer(x)
    ms: dict[str, list[float]] = {op: [] for op in BODIES}
    looped: dict[str, list[float]] = {op: [] for op in ("rnn", "lstm")}
    at_end = B in (sizes.batches[0], sizes.batches[-1])
    meter.sample(1)
    # Short calls more often: they are the noisier ones.
    calls = max(CALLS, min(10, 64 // B))
    for _ in range(sizes.rounds):
        meter.sample(1)
        for op, layer in layers.items():
            ms[op].append(min(stopwatch(lambda layer=layer: layer.infer(x)) for _ in range(calls)))
        for op, samples in looped.items() if at_end and has_library_layers(device) else ():
            with loop():
                samples.append(min(stopwatch(lambda op=op: layers[op].infer(x)) for _ in range(calls)))
    shape = {"T": sizes.T, "B": B, "I": sizes.width, "H": sizes.width}
    todo = {op: work(op, "forward", shape, dtype.itemsize) for op in BODIES}
    # Beyond the first time.
    again = {op: (sizes.T - 1) * GATES[op] * sizes.width**2 * dtype.itemsize for op in RECURRENT}
    profiled = device == "cuda" and at_end
    return {
        "T": sizes.T,
        "width": sizes.width,
        "gflops": meter.roofs.tflops * 1e3,
        "gbytes": meter.roofs.gigabytes_per_s,
        "ms": ms,
        # As a loop over steps both; nothing where all run alike.
        "looped": looped if looped["rnn"] else {},
        "flops": {op: each.flops for op, each in todo.items()},
        "step_flops": {op: recurrent_flops(GATES[op], shape) for op in RECURRENT},
        "held": {op: each.bytes for op, each in todo.items()},
        "streamed": {op: each.bytes + again.get(op, 0) for op, each in todo.items()},
        "kernels": kernels(shape, sizes.dtype) if profiled else [],
    }


def kernels(shape: dict[str, int], dtype: str) -> list[dict[str, Any]]:
    """The LSTM's own kernels, with the work that each was launched for; none where Proton does not say."""
    problem = Recurrence("lstm", **shape, dtype=dtype, backend="triton")
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = kernel_tree(problem, CALLS, Path(folder, "kernels.hatchet"))
        except (RuntimeError, UnsupportedInput):
            return []
    return [{key: each[key] for key in ("name", "ms", "flops", "bytes")} for each in found if each["flops"]]


def roofs(rows: list[Row]) -> Roofs:
    return Roofs(max(row["gflops"] for row in rows) / 1e3, max(row["gbytes"] for row in rows))


def ridge(rows: list[Row]) -> float:
    """Operations for each byte from which on products take longer than moving what they need."""
    limits = roofs(rows)
    return limits.tflops * 1e3 / limits.gigabytes_per_s


def intensity(row: Row, op: str, bytes_: str) -> float:
    """Operations for each byte; ``bytes_`` is "streamed" or "held"."""
    return row["flops"][op] / row[bytes_][op]


def rate(row: Row, op: str) -> Spread:
    """GFLOP/s."""
    return spread(row["flops"][op] / ms / 1e6 for ms in row["ms"][op])


def share_of_copy(rows: list[Row], row: Row, op: str) -> Spread:
    """What the layer moved each second, were its weights read at every step, by what a copy moves."""
    return spread(row["streamed"][op] / ms / 1e6 / roofs(rows).gigabytes_per_s for ms in row["ms"][op])


def share_of_product(rows: list[Row], row: Row, op: str) -> Spread:
    return spread(row["flops"][op] / ms / 1e9 / roofs(rows).tflops for ms in row["ms"][op])


def leaves(rows: list[Row], bytes_: str) -> int | None:
    """The first batch at which the LSTM is on the ridge's far side."""
    return next((row["B"] for row in rows if intensity(row, "lstm", bytes_) > ridge(rows)), None)


def verdicts(rows: list[Row]) -> list[Verdict]:
    rows = sorted(rows, key=lambda row: row["B"])
    return [_bandwidth(rows), _four_products(rows)]


def _bandwidth(rows: list[Row]) -> Verdict:
    first, last = rows[0], rows[-1]
    copied, multiplied = (share(rows, first, "lstm") for share in (share_of_copy, share_of_product))
    if leaves(rows, "streamed") == first["B"]:
        holds, why = False, "its products outweigh its bytes at every batch measured"
    else:
        holds, why = _bound(copied)
    best = max(rows, key=lambda row: rate(row, "lstm").median)
    where = {key: leaves(rows, key) for key in ("streamed", "held")}
    from_batch = lambda B: f"from a batch of {B} on" if B else f"at no batch up to {last['B']}"
    return Verdict(
        "An LSTM is bound by memory bandwidth: its weights are read anew at every step.",
        holds,
        f"With weights read at every step an LSTM makes {intensity(first, 'lstm', 'streamed'):.3g} operations a byte "
        f"at a batch of {first['B']} and {intensity(last, 'lstm', 'streamed'):.3g} at {last['B']}; this machine's "
        f"ridge is at {ridge(rows):.3g}, so it leaves the memory-bound side {from_batch(where['streamed'])}, and with "
        f"weights held on the chip {from_batch(where['held'])}. Measured at a batch of {first['B']}, reading them at "
        f"every step would be {copied.percent} of a copy's rate, at {multiplied.percent} of a large product's: {why}. "
        f"It comes nearest to the product's at a batch of {best['B']}: {share_of_product(rows, best, 'lstm').percent}.",
    )


def _bound(copied: Spread) -> tuple[bool | None, str]:
    """Whether bytes take the time, and why, by the share of what a copy moves."""
    too_fast, near = beyond(copied, 1), beyond(copied, NEAR)
    if too_fast:
        return False, "that is more than memory delivers, so the weights came from nearer by"
    if near is False:
        # Nor is the product's, which is the further one at this side of the ridge.
        return False, "neither limit is near, so something else takes the time"
    if near and too_fast is False:
        return True, "that is most of what memory delivers"
    some = [f"less than {NEAR:.0%} of"] if near is None else []
    some += ["more than"] if too_fast is None else []
    return None, f"in some rounds that is {' and in others '.join(some)} what memory delivers"


def times_of(row: Row, key: str) -> Spread:
    """Of the LSTM over the RNN, round by round; ``key`` is "ms", as torch runs them, or "looped"."""
    return spread(lstm / rnn for lstm, rnn in zip(row[key]["lstm"], row[key]["rnn"], strict=True))


def _four_products(rows: list[Row]) -> Verdict:
    first, last = rows[0], rows[-1]
    counted = last["step_flops"]["lstm"] / last["step_flops"]["rnn"]
    alike = "looped" if last["looped"] else "ms"
    measured = times_of(last, alike)
    # Within a quarter of what is counted.
    near, far = (beyond(measured, limit * counted) for limit in (0.75, 1.25))
    holds = None
    if counted != 4 or near is False or far:
        holds = False
    elif near and far is False:
        holds = True
    text = lambda row, key: times_of(row, key).text("{:.2f}".format)
    how = here = ""
    if last["looped"]:
        how = ", both as a loop over steps"
        here = f" As torch runs them here, with the LSTM as one operator: {text(first, 'ms')} and {text(last, 'ms')}."
    return Verdict(
        "An LSTM makes four products a step where an RNN makes one, and so takes four times as long.",
        holds,
        f"Counted are {counted:g} times the operations. Measured at equal width{how}, the LSTM layer takes "
        f"{text(first, alike)} times the RNN layer's time at a batch of {first['B']}, and {text(last, alike)} times at "
        f"{last['B']}.{here}",
    )


def draw(rows: list[Row]) -> tuple[Figure, str]:
    rows = sorted(rows, key=lambda row: row["B"])
    figure, [axes] = panels(1, 2, 3.9, sharey=True, sharex=True)
    titles = {"streamed": "Weights read at every step", "held": "Weights read once"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        _roofline(ax, rows, key)
        ax.set(title=title, xlabel="operations a byte")
    axes[0].set_ylabel("GFLOP/s")
    axes[0].legend(loc="lower right")
    return figure, (
        f"Operations a second over operations a byte, both logarithmic, at batches of {rows[0]['B']} to "
        f"{rows[-1]['B']}, median and range of the rounds. Lines are this machine's limits, measured: rising, a large "
        "copy, level, a large product. Bytes are counted, with recurrent weights read from memory at every "
        "step on the left, once on the right."
    )


def _roofline(ax: Axes, rows: list[Row], key: str) -> None:
    limits, edge = roofs(rows), ridge(rows)
    peak, copy = limits.tflops * 1e3, limits.gigabytes_per_s
    everywhere = [intensity(row, op, kind) for row in rows for op in BODIES for kind in ("streamed", "held")]
    low, high = min(*everywhere, edge) / 2, max(*everywhere, edge) * 2
    ax.plot([low, edge, high], [low * copy, peak, peak], color=INK, linewidth=1.1)
    named = {"textcoords": "offset points", "color": FAINT}
    ax.annotate(f"{peak:,.3g} GFLOP/s", (edge, peak), (0, 4), **named)
    middle = (low * edge) ** 0.5
    ax.annotate(f"{copy:,.3g} GB/s", (middle, middle * copy), (-4, 4), ha="right", **named)
    for op in BODIES:
        color, mark = STYLES[op]
        points = [(intensity(row, op, key), [row["flops"][op] / ms / 1e6 for ms in row["ms"][op]]) for row in rows]
        line(ax, points, color, mark, NAMES[op])
    for row in (rows[0], rows[-1]):
        place = intensity(row, "lstm", key), rate(row, "lstm").median
        ax.annotate(f"B = {row['B']}", place, (7, -10), textcoords="offset points", color=STYLES["lstm"][0])
    for kernel in (each for row in rows for each in row["kernels"]):
        ax.plot(kernel["flops"] / kernel["bytes"], kernel["flops"] / kernel["ms"] / 1e6, "x", color=FAINT)
    ax.set(xscale="log", yscale="log")
    ax.xaxis.set_major_formatter(PLAIN)
    plain_y(ax)


def table(rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda row: row["B"])
    lines = []
    for op in BODIES:
        for row in rows:
            us = spread(1e3 * ms / row["T"] for ms in row["ms"][op])
            counted = [f"{intensity(row, op, key):.3g}" for key in ("streamed", "held")]
            shares = [share(rows, row, op).percent for share in (share_of_copy, share_of_product)]
            loop_us = [1e3 * ms / row["T"] for ms in row["looped"].get(op, [])]
            looped = str(spread(loop_us)) if loop_us else "-"
            lines.append([f"{NAMES[op]}, B = {row['B']}", *counted, str(us), looped, str(rate(row, op)), *shares])
    header = [
        "layer",
        "operations a byte",
        "weights read once",
        "µs a token step",
        "as a loop, µs",
        "GFLOP/s",
        "of a copy",
        "of a product",
    ]
    return markdown(header, lines)
