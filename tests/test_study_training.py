"""Verdicts of the study's experiments on gradients and training: from rows that say yes, no, or neither."""

import pytest

from .benchmark_modules import load, not_interpreted

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

gradients, clipping, memory, initialisation, dropout = (
    load(f"study.experiments.{name}") for name in ("gradients", "clipping", "memory", "initialisation", "dropout")
)


def judged(experiment, rows) -> list:
    return [verdict.holds for verdict in experiment.verdicts(rows)]


def said(experiment, rows) -> str:
    return "\n".join(verdict.sentence for verdict in experiment.verdicts(rows))


# gradients

RATES = {"sigmoid": 0.1, "rnn": 0.5, "gru": 0.6, "lstm": 0.7, "lstm_long": 1.0, "attention": 1.0}
GAINS = {0.9: 0.7, 1.1: 0.8, 3.0: 1.3}


def flows(slope: float = 0.25, growth: float = 1.0, gains: dict | None = None, **rates: float) -> list[dict]:
    """What three seeds find, a little apart; ``growth`` is that of Jacobians over the gradient's, in logarithms."""
    rows = [{"part": "slope", "layer": "sigmoid", "seed": 0, "largest": slope}]
    for seed in range(3):
        near = 1 + 0.001 * seed
        for layer, rate in {**RATES, **rates}.items():
            verdict = "vanishing" if rate < 0.9 else "exploding" if rate > 1.1 else "steady"
            row = {"part": "flow", "layer": layer, "seed": seed, "rate": rate * near, "verdict": verdict}
            rows.append({**row, "lags": [0, 99], "log10_norms": [0.0, -1.0]})
        for gain, rate in (GAINS if gains is None else gains).items():
            rows += [
                {"part": "gain", "layer": layer, "gain": gain, "seed": seed, "rate": rate * near}
                for layer in ("tanh", "relu")
            ]
        for layer in ("rnn", "gru", "lstm"):
            row = {"part": "jacobian", "layer": layer, "seed": seed, "rate": 0.5, "growth": 0.5**growth}
            rows.append({**row, "largest": 0.9, "smallest": 0.1, "lags": [1, 2], "log10_largest": [-0.3, -0.6]})
    return rows


@pytest.mark.parametrize(
    "rows, place, holds",
    [
        (flows(), 0, True),
        (flows(rnn=1.0, gru=1.0, lstm=1.0), 0, False),
        (flows(gru=1.0, lstm=1.0), 0, None),
        (flows(), 1, True),
        (flows(sigmoid=0.8), 1, False),
        (flows(sigmoid=0.5), 1, None),
        (flows(slope=0.3), 1, False),
        (flows(), 2, False),
        (flows(gru=1.0, lstm=1.0), 2, True),
        (flows(gru=0.99, lstm=1.0, rnn=0.99), 2, None),
        (flows(), 3, True),
        (flows(lstm_long=0.5), 3, False),
        (flows(), 4, False),
        (flows(gains={0.9: 0.7, 1.1: 1.2, 3.0: 1.3}), 4, True),
        (flows(gains={0.9: 0.7, 1.1: 0.9995}), 4, None),
        (flows(), 5, True),
        (flows(growth=2.0), 5, False),
        (flows(), 6, True),
        (flows(attention=0.5), 6, False),
    ],
)
def test_gradients_are_judged_by_their_factor_a_step(rows, place, holds):
    assert judged(gradients, rows)[place] is holds


def test_gradients_sentences_carry_the_numbers():
    text = said(gradients, flows())
    assert "RNN, tanh 0.5 (0.5 to 0.501)" in text and "Vanishing with every seed: RNN, tanh, GRU, LSTM." in text
    assert "Of the gradient's norm 100 steps leave 8.7e-31 in the RNN, tanh" in text
    assert "Exploding with every seed: 3; shrinking all the same: 1.1." in text
    assert "differ by at most 0%" in text and "over 99 steps" in text


# clipping


def clipped(**of: dict) -> list[dict]:
    """Runs of each way; what is given by the way's name stands in place of what usually happens."""
    usual = {
        "none": {"loss": None, "rate_before": 1.4, "rate_after": None, "alignment": 1.0},
        "norm": {"loss": 0.2, "rate_before": 1.4, "rate_after": 1.2, "alignment": 1.0},
        "step": {"loss": 0.2, "rate_before": 1.1, "rate_after": 1.1, "alignment": 0.2},
    }
    found = {clip: row | of.get(clip, {}) for clip, row in usual.items()}
    return [{"clip": clip, "seed": seed, **row} for clip, row in found.items() for seed in (0, 1)]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (clipped(), [True, True, True]),
        (clipped(none={"loss": 0.1}), [None, True, True]),
        (clipped(none={"loss": 0.1}, norm={"loss": 50.0}), [False, True, True]),
        (clipped(norm={"rate_after": 0.9}), [True, False, True]),
        (clipped(norm={"rate_after": None}), [True, None, True]),
        (clipped(step={"rate_before": 1.6}), [True, True, False]),
        (clipped(step={"alignment": 1.0}), [True, True, False]),
        (clipped(step={"rate_before": 1.4}), [True, True, None]),
    ],
)
def test_clipping_is_judged_by_who_diverges_and_what_still_grows(rows, holds):
    assert judged(clipping, rows) == holds


def test_clipping_undecided_where_seeds_disagree():
    rows = clipped()
    next(row for row in rows if row["clip"] == "norm")["rate_after"] = 0.8
    assert judged(clipping, rows)[1] is None
    text = said(clipping, rows)
    assert "Diverged without clipping: 2 of 2; with: 0 of 2, held-out error 0.2" in text and "in 1 of 2 runs" in text


# memory


def remembered(lags: tuple[int, ...] = (10, 100, 1000), **reach: int) -> list[dict]:
    """Two tasks, two seeds; every layer answers rightly up to its reach."""
    reached = {"rnn": 10, "gru": 100, "lstm": 10, "lstm_long": 100, "attention": 1000, **reach}
    return [
        {"task": task, "op": op, "lag": lag, "seed": seed, "accuracy": 0.97 if lag <= most else 0.15 + 0.1 * seed}
        for task in ("recall", "adding")
        for op, most in reached.items()
        for lag in lags
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (remembered(), [True, True, True, None, True, True]),
        (remembered(gru=10), [False, True, True, True, True, True]),
        (remembered(gru=1000), [True, False, True, False, True, True]),
        (remembered(rnn=100), [True, True, False, None, True, True]),
        (remembered(lstm=100, lstm_long=10), [True, True, True, None, False, True]),
        (remembered(lstm=100), [True, True, True, None, None, True]),
        (remembered(attention=100), [True, True, True, None, True, False]),
        (remembered(lags=(10, 20)), [None, None, None, None, True, True]),
    ],
)
def test_memory_is_judged_by_the_longest_lag(rows, holds):
    assert judged(memory, rows) == holds


def test_a_lag_counts_only_if_every_shorter_one_is_remembered():
    rows = remembered()
    for row in rows:
        if row["op"] == "gru" and row["lag"] == 10:
            row["accuracy"] = 0.5
    assert memory.reach(rows, "recall", "gru") == 0
    text = said(memory, rows)
    assert "GRU: delayed recall none, adding problem none" in text
    assert "attention: delayed recall 1,000 (the longest tried), adding problem 1,000 (the longest tried)" in text


# initialisation


def solved(**updates: list[int]) -> list[dict]:
    """Updates of eight seeds, 500 being all they had."""
    usual = {"default": [400] * 8, "orthogonal": [400] * 8, "bias": [200] * 8, "both": [200] * 8, "lag": [50] * 8}
    return [
        {"kind": kind, "seed": seed, "updates": count, "most": 500, "solved": count < 500, "accuracy": 1.0}
        for kind, counts in {**usual, **updates}.items()
        for seed, count in enumerate(counts)
    ]


LUCKY = [100, 120, 140, 200, 300, 400, 500, 500]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (solved(), [False, True, None, True]),
        (solved(default=LUCKY, orthogonal=LUCKY, both=LUCKY), [True, None, None, True]),
        (solved(bias=[450] * 8), [False, False, None, True]),
        (solved(orthogonal=[300] * 7 + [450]), [False, True, True, True]),
        (solved(orthogonal=[450] * 7 + [300]), [False, True, False, True]),
        (solved(lag=[300] * 8), [False, True, None, False]),
        (solved(**dict.fromkeys(initialisation.NAMES, [500] * 8)), [None] * 4),
    ],
)
def test_initialisation_is_judged_seed_by_seed(rows, holds):
    assert judged(initialisation, rows) == holds


def test_initialisation_sentences_count_seeds():
    text = said(initialisation, solved(default=LUCKY))
    assert "Torch's default: 6 of 8 seeds solve it, after 250 (100 to 500) updates" in text
    assert "Seed by seed it is sooner 4 times, later 3 times." in text


# dropout


def learned(**held_out: tuple[float, float]) -> list[dict]:
    """Of each kind the held-out loss at its best and at the end, of three seeds."""
    usual = {"none": (2.0, 2.3), "between": (2.0, 2.1), "locked": (1.9, 1.9), "variational": (1.8, 1.8)}
    usual["zoneout"] = (1.9, 1.95)
    return [
        {"kind": kind, "seed": seed, "train": [3.0, 0.5], "held_out": [best + 0.01 * seed, final + 0.01 * seed]}
        for kind, (best, final) in {**usual, **held_out}.items()
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (learned(), [True] * 5),
        (learned(none=(2.3, 2.3)), [None, True, True, True, True]),
        (learned(none=(0.3, 0.4)), [False, False, True, False, False]),
        (learned(between=(2.0, 2.31)), [True, None, True, True, True]),
        (learned(locked=(2.0, 2.2)), [True, True, False, True, True]),
        (learned(variational=(2.0, 2.4), zoneout=(2.0, 2.4)), [True, True, True, False, False]),
    ],
)
def test_dropout_is_judged_by_the_loss_at_the_end(rows, holds):
    assert judged(dropout, rows) == holds


def test_dropout_sentences_tell_end_and_best():
    text = said(dropout, learned())
    assert "2.01 (2.00 to 2.02) nats a character at its best and 2.31 (2.30 to 2.32) at the end" in text
    assert "zoneout 1.96 (1.95 to 1.97), no dropout 2.31 (2.30 to 2.32); at its best 1.91 (1.90 to 1.92)" in text
