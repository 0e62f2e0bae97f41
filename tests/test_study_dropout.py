"""The study's experiment on dropout: verdicts from rows fed by hand, its text, and its recurrent dropout."""

import pytest
import torch

from .benchmark_modules import load, not_interpreted
from .comparisons import assert_equal_in_float64

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

dropout = load("study.experiments.dropout")


def judged(rows) -> list:
    return [verdict.holds for verdict in dropout.verdicts(rows)]


def learned(**held_out: tuple[float, float]) -> list[dict]:
    """Of each kind the held-out loss at its best and at the end, of three seeds."""
    usual = {"none": (2.0, 2.3), "between": (1.95, 2.1), "locked": (1.9, 1.9), "around": (1.8, 1.8)}
    usual |= {"zoneout": (1.9, 1.95), "recurrent": (2.1, 2.4), "recurrent_locked": (1.9, 2.0), **held_out}
    return [
        {
            "kind": kind.replace("_", " "),
            "seed": seed,
            "train": [3.0, 0.5],
            "held_out": [best + 0.01 * seed, final + 0.01 * seed],
        }
        for kind, (best, final) in usual.items()
        for seed in range(3)
    ]


OVERFITS, BETWEEN, LOCKED, AROUND, RECURRENT, ZONEOUT = range(6)


@pytest.mark.parametrize(
    "changed, place, holds",
    [
        ({}, OVERFITS, True),
        # It rises by less than matters.
        ({"none": (2.0, 2.01)}, OVERFITS, False),
        ({"none": (2.0, 2.0401)}, OVERFITS, None),
        # What is trained on is no better.
        ({"none": (0.3, 0.4)}, OVERFITS, False),
        ({}, BETWEEN, True),
        ({"between": (2.1, 2.4)}, BETWEEN, False),
        # Only the best says so; only the end does; each says another thing.
        ({"between": (1.9, 2.31)}, BETWEEN, None),
        ({"between": (2.01, 2.1)}, BETWEEN, None),
        ({"locked": (2.0, 2.0)}, LOCKED, None),
        ({}, LOCKED, True),
        ({"around": (1.9, 2.4)}, AROUND, None),
        ({"zoneout": (2.1, 2.4)}, ZONEOUT, False),
        ({}, RECURRENT, True),
        # A new mask helps as well; the same one hurts too; the new one is not known to hurt.
        ({"recurrent": (1.8, 2.0), "recurrent_locked": (1.7, 1.9)}, RECURRENT, False),
        ({"recurrent_locked": (2.05, 2.35)}, RECURRENT, False),
        ({"recurrent": (2.0, 2.3)}, RECURRENT, None),
    ],
)
def test_dropout_is_judged_where_the_end_and_the_best_moment_agree(changed, place, holds):
    assert judged(learned(**changed))[place] is holds


def test_seeds_that_overlap_decide_nothing():
    assert judged(learned(**dict.fromkeys(["between", "none"], (2.0, 2.3))))[BETWEEN] is None


def test_dropout_sentences_tell_end_and_best():
    said = [verdict.sentence for verdict in dropout.verdicts(learned(locked=(2.0, 2.0)))]
    assert "2.01 (2.00 to 2.02) nats a character at its best and 2.31 (2.30 to 2.32) at the end" in said[OVERFITS]
    assert "at the end: zoneout 1.96 (1.95 to 1.97); no dropout 2.31 (2.30 to 2.32)." in said[ZONEOUT]
    assert "At its best: zoneout 1.91 (1.90 to 1.92); no dropout 2.01 (2.00 to 2.02)." in said[ZONEOUT]
    assert "The end says yes and the best moment says no, so this cannot tell." in said[LOCKED]
    assert "a new mask at every step hurts, the same mask helps; the same mask is better than a new" in said[RECURRENT]


def test_text_held_out_is_from_all_over_and_never_trained_on():
    text = load("text").Corpus("numbers", torch.arange(900), torch.arange(900, 1000), b"")
    pieces = text.scattered(piece=20, every=5)
    assert (len(pieces.train), len(pieces.held_out)) == (200, 800)
    for held_out, part in ((False, pieces.train), (True, pieces.held_out)):
        x, following = pieces.batch(8, 400, 0, held_out)
        # No excerpt goes on where another piece begins, and every piece is drawn from.
        assert torch.equal(x + 1, following)
        assert set(x.flatten().tolist()) <= set(part.tolist())
        assert set((x[0] // 20).tolist()) == set((part // 20).tolist())


@pytest.mark.parametrize("locked", [False, True])
def test_recurrent_dropout_is_an_lstm_with_masks_on_h(locked):
    torch.manual_seed(0)
    body = dropout.LSTM(3, 4, num_layers=2).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_equal_in_float64({"y": dropout.recurrent_dropout(body, x, 0.0, locked)}, {"y": body(x)[0]})
    # Where every h is dropped, each step but for its c is a first one.
    alone = dropout.recurrent_dropout(body, x, 1.0, locked)
    body.weight_hh_l0.data.zero_(), body.weight_hh_l1.data.zero_()
    assert_equal_in_float64({"y": alone}, {"y": body(x)[0]})


@pytest.mark.parametrize("locked, drawn", [(False, 3), (True, 1)])
def test_one_mask_or_one_for_each_step(locked, drawn, monkeypatch):
    masks = []
    cell = lambda x, state, *weights: masks.append(state[0]) or (torch.ones_like(state[0]), state[1])
    monkeypatch.setattr(dropout, "lstm_cell", cell)
    dropout.recurrent_dropout(dropout.LSTM(3, 50), torch.randn(4, 2, 3), 0.5, locked)
    # The first h is all zeros.
    assert len({tuple(mask.flatten().tolist()) for mask in masks[1:]}) == drawn
