"""What the recurrence suite measures, the most valuable first: a budget of time that runs out cuts the tail."""

from collections.abc import Iterator
from itertools import product

from benchmarks.shapes import PASSES, Case, Sizes, powers_of_two

# Sweeps in their order, and how tables call what is special about them.
SWEEPS = {
    "persistent": "cuDNN's persistent shape",
    "grid": "one layer, one direction",
    "length": "length varied",
    "bidirectional": "bidirectional",
    "packed": "packed, lengths from T/4 to T",
    "ragged": "padded, lengths from T/4 to T",
    "reset": "episodes of 64 steps on average",
    "layers": "two layers",
    "blocks": "block-diagonal",
    "recompute": "gates recomputed in backward",
    "dtype": "other dtypes",
    "streaming": "weights that fit on no chip",
    "odd": "odd sizes, and the plain RNN",
}
EPISODE = 64
HALF, SINGLE = "bfloat16", "float32"


def recurrence_cases(sizes: Sizes) -> list[Case]:
    """The suite on a GPU, or what little of it a CPU can say something about."""
    return list(_gpu() if sizes.device == "cuda" else _cpu(sizes))


def _case(sweep: str, op: str, pass_: str, T: int, B: int, H: int, dtype: str = HALF, **more) -> Case:
    return Case(op, pass_, sweep, T, B, H, 0, dtype, **more)


def _gpu() -> Iterator[Case]:
    T, gated = 512, ("lstm", "gru")
    for pass_ in PASSES:
        yield _case("persistent", "lstm", pass_, 1024, 16, 768, "float16")
    widths = (1024, 512, 768, 256, 1536)
    for B, H, op, pass_ in product((16, 64), widths, gated, PASSES):
        yield _case("grid", op, pass_, T, B, H)
    for length, pass_ in product(powers_of_two(256, 8192), PASSES):
        yield _case("length", "lstm", pass_, length, 16, 768)
    for H, B, op, pass_ in product((1024, 512), (16, 64), gated, PASSES):
        yield _case("bidirectional", op, pass_, T, B, H, directions=2)
    for H, op, pass_ in product((1024, 512), gated, PASSES):
        yield _case("packed", op, pass_, T, 64, H, packed=True)
        yield _case("ragged", op, pass_, T, 64, H, ragged=True)
    for op, pass_ in product(gated, PASSES):
        yield _case("reset", op, pass_, T, 16, 512, reset_every=EPISODE)
    for H, op, pass_ in product((1024, 512), gated, PASSES):
        yield _case("layers", op, pass_, T, 16, H, layers=2)
    # The shape of FlashRNN's published figures: 768 units as 12 heads of 64.
    for op, pass_ in product(gated, PASSES):
        yield _case("blocks", op, pass_, 1024, 16, 768, blocks=12)
    yield _case("recompute", "lstm", "training", T, 64, 1024, recompute=True)
    for B, H, op, pass_ in product((256, 1), widths, gated, PASSES):
        yield _case("grid", op, pass_, T, B, H)
    for dtype, H, B, op, pass_ in product(("float16", SINGLE), (768, 256), (16, 64), gated, PASSES):
        yield _case("dtype", op, pass_, T, B, H, dtype)
    for op, B, pass_ in product(gated, (16, 64), PASSES):
        yield _case("streaming", op, pass_, T, B, 2048)
    for (op, H), pass_ in product((("lstm", 650), ("gru", 1000), ("rnn", 1024), ("rnn", 256)), PASSES):
        yield _case("odd", op, pass_, T, 16, H)


def _cpu(sizes: Sizes) -> Iterator[Case]:
    B, H, T = sizes.batch, sizes.width, sizes.check_T
    for op, pass_ in product(("lstm", "gru", "rnn"), PASSES):
        yield _case("grid", op, pass_, T, B, H, SINGLE)
    for length, pass_ in product(powers_of_two(T // 4, 2 * T), PASSES):
        yield _case("length", "lstm", pass_, length, B, H, SINGLE)
    for op, pass_ in product(("lstm", "gru"), PASSES):
        yield _case("bidirectional", op, pass_, T, B, H, SINGLE, directions=2)
        yield _case("packed", op, pass_, T, B, H, SINGLE, packed=True)
        yield _case("ragged", op, pass_, T, B, H, SINGLE, ragged=True)
        yield _case("reset", op, pass_, T, B, H, SINGLE, reset_every=EPISODE)
        yield _case("layers", op, pass_, T, B, H, SINGLE, layers=2)
        # No library's operator has blocks: the reference's loop serves, which is slow.
        yield _case("blocks", op, pass_, T // 2, B, H, SINGLE, blocks=4)


def cudnn_path(case: Case) -> str:
    """ "persistent" or "standard": which of cuDNN's paths torch takes for torch.nn's layer of this case.

    Source: ``get_algo`` in PyTorch's aten/src/ATen/native/cudnn/RNN.cpp, for GPUs from 98 multiprocessors on.
    """
    if case.packed or case.ragged:
        return "standard"
    small = {"rnn": (384, 256)}.get(case.op, (192, 128))[case.pass_ == "training"]
    static = (
        case.dtype == "float16" and case.directions == 1 and case.layers == 1 and case.H <= 1024 and case.H % 128 == 0
        and case.B % 8 == 0 and case.B <= 128
        and (case.op == "lstm" or (case.op == "rnn" and (case.B < 96 or case.H < 896)))
    )  # fmt: skip
    return "persistent" if case.H <= small or static else "standard"
