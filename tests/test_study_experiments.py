"""Verdicts of the study's experiments on architectures: from rows that say yes, no, or neither."""

import pytest

from .benchmark_modules import load, not_interpreted

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

bottleneck, transformers = (load(f"study.experiments.{name}") for name in ("bottleneck", "transformers"))
KINDS = load("study.transformers")


def judged(experiment, rows) -> list:
    return [verdict.holds for verdict in experiment.verdicts(rows)]


# bottleneck


def translated(context: str, seed: int, *accuracy: float) -> dict:
    row = {"context": context, "seed": seed, "parameters": 4321, "chance": 0.1, "lengths": [5, 10, 20]}
    row["width"] = 32 if context == bottleneck.WIDE else 16
    return {**row, "accuracy": list(accuracy), "whole": [each**5 for each in accuracy]}


def translations(without: list[tuple], with_: list[tuple], wide: list[tuple] | None = None) -> list[dict]:
    named = {bottleneck.WITHOUT: without, bottleneck.WIDE: wide or STEADY, bottleneck.WITH: with_}
    return [translated(name, seed, *each) for name, found in named.items() for seed, each in enumerate(found)]


STEADY = [(0.99, 0.98, 0.97), (1.0, 1.0, 0.96), (0.99, 0.98, 0.96)]
FALLING = [(0.99, 0.85, 0.5), (0.97, 0.8, 0.4), (0.98, 0.8, 0.45)]
UNLEARNED = [(0.3, 0.2, 0.1), (0.95, 0.8, 0.1), (0.95, 0.8, 0.1)]


@pytest.mark.parametrize(
    "without, with_, wide, holds",
    [
        (FALLING, STEADY, STEADY, [True, True, True]),
        (STEADY, STEADY, STEADY, [False, None, None]),
        ([(0.99, 0.98, 0.94)] * 3, [(0.99, 0.99, 0.99)] * 3, STEADY, [False, None, None]),
        ([*STEADY[:2], FALLING[2]], STEADY, STEADY, [None, None, None]),
        (FALLING, FALLING, FALLING, [True, None, None]),
        (FALLING, [(0.99, 0.5, 0.1)] * 3, [(0.99, 0.5, 0.1)] * 3, [True, False, False]),
        (UNLEARNED, STEADY, STEADY, [None, None, True]),
        (FALLING, UNLEARNED, UNLEARNED, [True, None, None]),
        # Two repeats each part nothing.
        (FALLING[:2], STEADY[:2], STEADY[:2], [True, None, None]),
    ],
)
def test_the_bottleneck_is_judged_by_the_fall_in_accuracy(without, with_, wide, holds):
    assert judged(bottleneck, translations(without, with_, wide)) == holds


def test_bottleneck_sentences_say_where_accuracy_falls():
    squeezed, widened, relieved = bottleneck.verdicts(translations(FALLING, STEADY, FALLING))
    assert "98% (97% to 99%) of the symbols are right in sentences of 5" in squeezed.sentence
    assert "the median is first below 90% at 10 symbols" in squeezed.sentence
    assert (
        "by 53 (49 to 57) percentage points with a vector 16 wide and by 53 (49 to 57) with one 32" in widened.sentence
    )
    assert "the median is nowhere below 90%" in relieved.sentence
    assert "by 3 (2 to 4) percentage points with attention and by 53 (49 to 57) without, at 4,321" in relieved.sentence


# transformers


def flow(T: int = 3, ahead: float = 0.0) -> list[list[float]]:
    return [[0.5 if j <= i else ahead for j in range(T)] for i in range(T)]


def transformer(model: str, accuracy: float, ahead: float, source: float | None = None) -> list[dict]:
    rows = []
    for seed, off in enumerate((-0.01, 0.0, 0.01)):
        row = {"model": model, "seed": seed, "accuracy": accuracy + off, "chance": 0.1 + off, "parameters": 1234}
        row["flow"] = flow(ahead=ahead)
        rows.append(row if source is None else {**row, "source_flow": flow(ahead=source)})
    return rows


def three_kinds(**changed) -> list[dict]:
    """As they are taught, but for (accuracy, ahead, source) of the models named."""
    taught = {"ENCODER": (0.95, 0.2), "BLIND": (0.5, 0.0), "DECODER": (0.93, 0.0), "CHEATING": (0.3, 0.2)}
    taught |= {"BOTH": (0.95, 0.0, 0.3), "SOURCELESS": (0.1, 0.0, 0.3), **changed}
    return [row for name, of in taught.items() for row in transformer(getattr(KINDS, name), *of)]


@pytest.mark.parametrize(
    "changed, holds",
    [
        ({}, [True, True, True]),
        ({"ENCODER": (0.95, 0.0)}, [False, True, True]),
        # Better than the rival, but not good; and good, but no better.
        ({"ENCODER": (0.8, 0.2)}, [False, True, True]),
        ({"BLIND": (0.94, 0.0)}, [None, True, True]),
        ({"DECODER": (0.93, 1e-9)}, [True, False, True]),
        ({"DECODER": (0.15, 0.0), "CHEATING": (0.11, 0.2)}, [True, False, True]),
        ({"CHEATING": (0.92, 0.2)}, [True, None, True]),
        ({"CHEATING": (0.98, 0.2)}, [True, False, True]),
        ({"BOTH": (0.95, 0.0, 0.0)}, [True, True, False]),
        ({"BOTH": (0.95, 0.1, 0.3)}, [True, True, False]),
        ({"BOTH": (0.105, 0.0, 0.3)}, [True, True, False]),
        # What reads nothing does as well, or still more than guess.
        ({"SOURCELESS": (0.94, 0.0, 0.3)}, [True, True, None]),
        ({"SOURCELESS": (0.4, 0.0, 0.3)}, [True, True, None]),
    ],
)
def test_kinds_of_transformers_are_judged_by_flow_and_accuracy(changed, holds):
    assert judged(transformers, three_kinds(**changed)) == holds


def test_transformer_sentences_tell_shares_seen_and_right():
    encoder, decoder, both = (verdict.sentence for verdict in transformers.verdicts(three_kinds()))
    assert "100% of the inputs up to their own place and on 100% after it" in encoder
    assert "95% (94% to 96%) of the hidden tokens are found, under a causal mask 50%" in encoder
    assert "on 0% after it. Left to go on by itself it tells 93% (92% to 94%)" in decoder
    assert "100% of the source" in both and "with the source hidden 10% (9% to 11%); chance is 10% (9% to 11%)" in both
    line = next(line for line in transformers.table(three_kinds()).split("\n") if "| encoder-decoder  " in line)
    assert "0%, of its source 100%" in line


def test_a_hidden_source_tells_nothing():
    batch = KINDS.sorting(5, 8, 3, "cpu", 0)
    hidden = KINDS.without_source(batch)
    assert hidden.x[0].shape == batch.x[0].shape and hidden.x[0].unique().tolist() == [5]
    assert hidden.x[1] is batch.x[1] and hidden.target is batch.target


def test_attention_that_torch_passes_by_is_noticed():
    sizes = transformers.SIZES["tiny"]
    model = transformers.make(transformers.ENCODER, sizes)
    few = transformers.TASKS[transformers.ENCODER](sizes.symbols, 4, 2, "cpu", 0)
    assert transformers.attention_calls(model.eval(), few, sizes.layers) == sizes.layers
    KINDS.seqcore.restore(model)
    with pytest.raises(AssertionError, match="counted 0"):
        transformers.attention_calls(model, few, sizes.layers)
