"""Verdicts of the study's experiments on gradients and training: from rows that say yes, no, or neither."""

import pytest

from .benchmark_modules import load, not_interpreted

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

gradients, clipping, memory, initialisation = (
    load(f"study.experiments.{name}") for name in ("gradients", "clipping", "memory", "initialisation")
)


def judged(experiment, rows) -> list:
    return [verdict.holds for verdict in experiment.verdicts(rows)]


def said(experiment, rows) -> str:
    return "\n".join(verdict.sentence for verdict in experiment.verdicts(rows))


# gradients

RATES = {"sigmoid": 0.1, "rnn": 0.5, "gru": 0.6, "lstm": 0.7, "lstm_long": 1.0, "attention": 1.0}
GAINS = {0.9: 0.7, 1.1: 0.8, 3.0: 1.3}
EXPLODING = {0.9: 0.7, 1.1: 1.2, 3.0: 1.3}
MIXED = {0.9: 0.7, 1.1: (0.8, 1.2, 1.2), 3.0: 1.3}


def fate(rate: float) -> str:
    return "vanishing" if rate < 0.9 else "exploding" if rate > 1.1 else "steady"


def flow(seed: int, part: str, layer: str, rate, far: float, **more) -> dict:
    found = rate[seed] if isinstance(rate, tuple) else rate * (1 + 0.001 * seed)
    row = {"part": part, "layer": layer, "seed": seed, "rate": found, "rate_from_1": found, **more}
    return {**row, "verdict": fate(found), "lags": [0, 1, 100, 999], "log10_norms": [0.0, -0.5, -0.7, far]}


def flows(slope: float = 0.25, growth: float = 1.0, tanh=GAINS, relu=GAINS, far: float = -1.0, **rates) -> list[dict]:
    """What three seeds find, a little apart, unless a rate is given for each.

    ``growth`` is that of Jacobians over the gradient's; ``far`` the logarithm of the norm at the last lag.
    """
    rows = [{"part": "slope", "layer": "sigmoid", "seed": 0, "largest": slope}]
    for seed in range(3):
        rows += [flow(seed, "flow", layer, rate, far) for layer, rate in {**RATES, **rates}.items()]
        for layer, gains in (("tanh", tanh), ("relu", relu)):
            rows += [flow(seed, "gain", layer, rate, far, gain=gain) for gain, rate in gains.items()]
        for layer in ("rnn", "gru", "lstm"):
            row = {"part": "jacobian", "layer": layer, "seed": seed, "rate": 1.0, "growth": growth}
            rows.append({**row, "largest": 0.9, "smallest": 0.1, "lags": [1, 2], "log10_largest": [-0.3, -0.6]})
    return rows


@pytest.mark.parametrize(
    "rows, place, holds",
    [
        (flows(), 0, True),
        (flows(rnn=1.0, gru=1.0, lstm=1.0), 0, False),
        (flows(gru=1.0, lstm=1.0), 0, None),
        (flows(rnn=(0.5, 0.5, 1.0), gru=1.0, lstm=1.0), 0, None),
        (flows(), 1, True),
        (flows(sigmoid=0.8), 1, False),
        (flows(sigmoid=0.5), 1, None),
        (flows(slope=0.3), 1, False),
        (flows(), 2, False),
        (flows(gru=1.0, lstm=1.0), 2, True),
        (flows(gru=0.99, lstm=1.0, rnn=0.99), 2, None),
        (flows(gru=1.0, lstm=(0.7, 1.0, 1.0)), 2, None),
        (flows(gru=0.6, lstm=(0.7, 1.0, 1.0)), 2, False),
        (flows(), 3, True),
        (flows(lstm_long=0.5), 3, False),
        (flows(lstm_long=(0.5, 1.0, 1.0)), 3, None),
        (flows(), 4, False),
        (flows(tanh=EXPLODING, relu=EXPLODING), 4, True),
        (flows(tanh=GAINS, relu=EXPLODING), 4, False),
        (flows(tanh=MIXED, relu=EXPLODING), 4, None),
        (flows(tanh={0.9: 0.7, 1.1: 1.0}, relu=EXPLODING), 4, None),
        (flows(), 5, True),
        (flows(growth=1.04), 5, True),
        (flows(growth=1.06), 5, False),
        (flows(), 6, True),
        (flows(far=-1.6), 6, False),
        (flows(far=0.6), 6, False),
    ],
)
def test_gradients_are_judged_by_their_factor_a_step(rows, place, holds):
    assert judged(gradients, rows)[place] is holds


def test_attention_is_not_judged_where_seeds_disagree():
    rows = flows()
    next(row for row in rows if row["layer"] == "attention")["log10_norms"] = [0.0, -0.5, -0.7, None]
    assert judged(gradients, rows)[6] is None


def test_gradients_sentences_carry_the_numbers():
    text = said(gradients, flows())
    assert "RNN, tanh 0.5 (0.5 to 0.501)" in text and "Vanishing with every seed: RNN, tanh, GRU, LSTM." in text
    # As measured, not as the factor would have it.
    assert "Of the gradient's norm 100 steps leave 2.0e-01 in the RNN, tanh" in text
    assert "exploding with every seed at 3, vanishing with every seed at 1.1." in text
    assert "differ by at most 0;" in text
    assert "From lag 1 to lag 999 the norm changes by a factor of 0.316 in all" in text
    assert "Lag 0 stands apart with 3.16 times" in text


# clipping


def clipped(runs: int = 3, **of: dict) -> list[dict]:
    """Runs of each way; what is given by the way's name, for every run or as a list, stands in place of the usual."""
    usual = {
        "none": {"loss": None, "rate_before": 1.4, "rate_after": None, "alignment": 1.0},
        "norm": {"loss": 0.2, "rate_before": 1.4, "rate_after": 1.2, "alignment": 1.0},
        "step": {"loss": 0.2, "rate_before": 1.1, "rate_after": 1.1, "alignment": 0.2},
    }
    rows = []
    for clip, row in usual.items():
        for seed in range(runs):
            found = {k: v[seed] if isinstance(v, list) else v for k, v in (row | of.get(clip, {})).items()}
            fates = {f"verdict_{when}": fate(found[f"rate_{when}"] or 2.0) for when in ("before", "after")}
            rows.append({"clip": clip, "seed": seed, **found, **fates})
    return rows


@pytest.mark.parametrize(
    "rows, holds",
    [
        (clipped(), [True, True, True]),
        (clipped(2), [None, True, None]),
        (clipped(none={"loss": 0.1}), [None, True, True]),
        (clipped(none={"loss": [None, 0.1, 0.1]}), [None, True, True]),
        (clipped(none={"loss": [None, None, 0.1]}, norm={"loss": [None, 0.1, 0.1]}), [None, True, True]),
        (clipped(none={"loss": 0.1}, norm={"loss": [0.1, 50.0, 50.0]}), [False, True, True]),
        (clipped(norm={"loss": 50.0}), [False, True, True]),
        (clipped(norm={"rate_after": 1.01}), [True, False, True]),
        (clipped(norm={"rate_after": [0.8, 1.2, 1.2]}), [True, None, True]),
        (clipped(norm={"rate_after": None}), [True, None, True]),
        (clipped(norm={"rate_before": 1.0}), [True, None, True]),
        (clipped(step={"rate_before": 1.6}), [True, True, False]),
        (clipped(step={"alignment": 1.0}), [True, True, False]),
        (clipped(step={"alignment": [1.0, 0.2, 0.2]}), [True, True, None]),
        (clipped(step={"alignment": None}), [True, True, None]),
        (clipped(step={"rate_before": 1.4}), [True, True, None]),
        (clipped(step={"rate_before": None}), [True, True, None]),
    ],
)
def test_clipping_is_judged_by_who_diverges_and_what_still_grows(rows, holds):
    assert judged(clipping, rows) == holds


def test_clipping_sentences_count_runs():
    text = said(clipping, clipped(norm={"rate_after": [0.8, 1.2, 1.2]}))
    assert "Diverged without clipping: 3 of 3; with: 0 of 3, held-out error 0.2" in text
    assert "explodes in 2 of 3 runs after, in 3 before" in text


# memory


def remembered(lags: tuple[int, ...] = (10, 100, 1000), adding: bool = True, **reach: int) -> list[dict]:
    """Two tasks, three seeds; every layer answers rightly up to its reach, the adding problem maybe nowhere."""
    reached = {"rnn": 10, "gru": 100, "lstm": 10, "lstm_long": 100, "attention": 1000, **reach}
    usual, slow = {"rate": 0.01, "most": 600, "batch": 32}, {"rate": 0.001, "most": 1000, "batch": 32}
    return [
        {"task": task, "op": op, "lag": lag, "seed": seed, **(slow if op == "rnn" else usual)}
        | {"accuracy": (0.97 if lag <= most and (adding or task == "recall") else 0.15) + 0.01 * seed}
        for task in ("recall", "adding")
        for op, most in reached.items()
        for lag in lags
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (remembered(), [True, True, True, None, True, True]),
        (remembered(adding=False), [True, True, True, None, True, True]),
        (remembered(gru=10), [False, True, True, True, True, True]),
        (remembered(gru=0), [None, True, True, True, True, True]),
        (remembered(gru=1000), [True, False, True, False, True, True]),
        (remembered(rnn=100), [True, True, False, None, True, True]),
        (remembered(rnn=0), [True, True, None, None, True, True]),
        (remembered(lstm=100, lstm_long=10), [True, True, True, None, True, True]),
        (remembered(lstm=100), [True, True, True, None, False, True]),
        (remembered(lstm=0, lstm_long=0), [None, True, True, False, None, True]),
        (remembered(attention=100), [True, True, True, None, True, False]),
        (remembered(attention=0), [True, True, True, None, True, None]),
        (remembered(gru=0, lstm=0, lstm_long=0), [None, None, True, None, None, True]),
        (remembered(lags=(10, 20)), [None, None, None, None, True, True]),
    ],
)
def test_memory_is_judged_by_the_longest_lag(rows, holds):
    assert judged(memory, rows) == holds


def ahead(rows: list[dict], task: str, op: str, lag: int, seeds: int) -> list[dict]:
    """The same, but the layer is right there with so many seeds."""
    where = {"task": task, "op": op, "lag": lag}
    for row in rows:
        if row["seed"] < seeds and where.items() <= row.items():
            row["accuracy"] = 0.99
    return rows


def test_layers_are_compared_lag_by_lag_beyond_their_seeds():
    better = ahead(remembered(), "recall", "gru", 1000, 3)
    assert judged(memory, better)[3] is False and "delayed recall over 1,000 (99% to 16%)" in said(memory, better)
    # One seed or two of three decide nothing; nor do both, one here and the other there.
    assert judged(memory, ahead(remembered(), "recall", "gru", 1000, 1))[3] is None
    assert judged(memory, ahead(better, "adding", "lstm", 1000, 3))[3] is None
    # Nor does a task of which neither learned so much as the shortest lag.
    unlearned = remembered(gru=0, lstm=0, lstm_long=0)
    assert judged(memory, ahead(unlearned, "recall", "gru", 1000, 3))[3] is None


def test_a_bias_matters_for_better_and_for_worse_but_beyond_seeds():
    rows = ahead(remembered(), "adding", "lstm", 1000, 3)
    text = said(memory, rows)
    assert judged(memory, rows)[4] is True
    assert "less often at adding problem over 1,000 (99% to 16%)" in text
    assert judged(memory, ahead(remembered(lstm=100), "recall", "lstm", 1000, 2))[4] is None


def test_a_lag_counts_only_if_every_shorter_one_is_learned():
    rows = remembered()
    for row in rows:
        if row["op"] == "gru" and row["lag"] == 10:
            row["accuracy"] = 0.5
    assert memory.reach(rows, "recall", "gru") == 0
    text = said(memory, rows)
    assert "within 600 updates of 32 sequences: GRU: delayed recall not learned, adding problem not learned" in text
    assert "attention: delayed recall 1,000 (the longest tried), adding problem 1,000 (the longest tried)" in text
    assert "at a rate of 0.001, in up to 1,000 updates, the LSTM at 0.01, in up to 600." in text


# initialisation


SCATTERED = [20, 100, 180, 260, 340, 420, 500, 500]
CLOSE = [240, 245, 250, 255, 260, 265, 270, 275]


def solved(**updates: list[int]) -> list[dict]:
    """Updates of eight seeds, 500 being all they had."""
    usual = {"default": [400] * 8, "orthogonal": [400] * 8, "bias": [200] * 8, "both": [200] * 8, "lag": [50] * 8}
    return [
        {"kind": kind, "seed": seed, "updates": count, "most": 500, "solved": count < 500, "accuracy": 1.0}
        for kind, counts in {**usual, "batches": [400] * 8, **updates}.items()
        for seed, count in enumerate(counts)
    ]


@pytest.mark.parametrize(
    "rows, holds",
    [
        (solved(), [None, True, None, True]),
        (solved(default=SCATTERED, batches=CLOSE), [True, None, None, True]),
        (solved(default=CLOSE, batches=SCATTERED), [False, True, False, True]),
        (solved(default=SCATTERED, batches=[count + 5 for count in SCATTERED]), [None, None, None, True]),
        # One that is far from the others says nothing.
        (solved(default=[400] * 7 + [40]), [None, True, None, True]),
        (solved(bias=[450] * 8), [None, False, None, True]),
        (solved(orthogonal=[300] * 7 + [450]), [None, True, True, True]),
        (solved(orthogonal=[450] * 7 + [300]), [None, True, False, True]),
        # Six of seven would be enough at one side.
        (solved(orthogonal=[300] * 6 + [450, 400]), [None, True, None, True]),
        (solved(lag=[300] * 8), [None, True, None, False]),
        (solved(**dict.fromkeys(initialisation.ALL, [500] * 8)), [None] * 4),
    ],
)
def test_initialisation_is_judged_seed_by_seed(rows, holds):
    assert judged(initialisation, rows) == holds


def test_initialisation_sentences_count_seeds():
    text = said(initialisation, solved(default=SCATTERED, batches=CLOSE))
    assert "the same batches: 6 of 8 seeds solve it, after 300 (20 to 500) updates, a standard deviation of 169" in text
    assert "15 times as much. The same weights, other batches: 8 of 8" in text
    assert "Seed by seed it is sooner 5 times, later 3 times." in text


def test_seeds_share_batches_and_the_held_out_set(monkeypatch):
    """Of the weights alone; the arm that compares has one seed's weights and batches of its own."""
    sizes, drawn = initialisation.SIZES["tiny"], []
    draw = initialisation.recall
    monkeypatch.setattr(initialisation, "recall", lambda *args: drawn.append(args) or draw(*args))

    def of(kind: str, seed: int) -> tuple[set, float]:
        drawn.clear()
        found = initialisation.measure({"kind": kind, "seed": seed}, sizes, "cpu")
        return set(drawn), found["loss"]

    (first, one), (second, two) = of("default", 0), of("default", 1)
    assert first == second and one != two
    (third, three), (fourth, four) = of("batches", 0), of("batches", 1)
    assert third != fourth and three != four
    assert first & third == third & fourth and len(third & fourth) == 1
