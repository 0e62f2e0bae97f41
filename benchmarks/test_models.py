"""Character models on real text, end to end: tokens per second, and loss over the seconds of training."""

from collections.abc import Callable

import pytest

from benchmarks.layers import TORCH
from benchmarks.models import (
    MODELS,
    Trainer,
    build_model,
    check,
    choose_width,
    count_parameters,
    train_in_turn,
    training_flops,
)
from benchmarks.rows import extra_info
from benchmarks.shapes import Sizes
from benchmarks.text import Corpus, load_corpus
from benchmarks.timing import Timing
from seqcore import UnsupportedInput
from seqcore.kernels.work import Work


@pytest.fixture(scope="module")
def corpus(request: pytest.FixtureRequest, sizes: Sizes) -> Corpus:
    return load_corpus(request.config.getoption("text"), sizes.models.text_bytes)


@pytest.mark.models
@pytest.mark.training
@pytest.mark.parametrize("op", MODELS, ids="{}-model".format)
def test_character_model(benchmark, op: str, corpus: Corpus, sizes: Sizes, describe: Callable[[], dict]) -> None:
    shape, alphabet = sizes.models, len(corpus.alphabet)
    width = choose_width(op, alphabet, shape)
    ours, torchs = (
        Trainer(build_model(provider, op, alphabet, width, shape), corpus, sizes, sizes.dtype)
        for provider in (sizes.ours, TORCH)
    )
    ours.model.load_state_dict(torchs.model.state_dict())
    try:
        check(ours, torchs)
        train_in_turn(benchmark, ours, torchs)
    except UnsupportedInput as error:
        pytest.skip(f"not supported: {error}")

    parameters = count_parameters(ours.model)
    # Every weight is read and its gradient written; both moments of Adam are read and written.
    traffic = parameters * 4 * 7
    steps = Work(training_flops(op, ours.model, width, shape), traffic, 0, 0)
    benchmark.group = "models"
    benchmark.extra_info |= extra_info(
        "models",
        op,
        "training",
        sizes.dtype,
        {"T": shape.T, "B": shape.B, "H": width, "layers": shape.layers, "alphabet": alphabet},
        Timing.of(ours.step_ms),
        {TORCH: Timing.of(torchs.step_ms)},
        steps,
        describe(),
        backend=sizes.ours,
        text=corpus.name,
        parameters=parameters,
        steps=len(ours.losses),
        curves={"seqcore": ours.curve, TORCH: torchs.curve},
        max_loss_difference=max(abs(a - b) for a, b in zip(ours.losses, torchs.losses, strict=True)),
    )
