"""Verdicts of the study's experiments on time and bandwidth: from rows that say yes, no, or neither."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .benchmark_modules import load, not_interpreted

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

steps, intensity, gru_lstm = (load(f"study.experiments.{name}") for name in ("steps", "intensity", "gru_lstm"))


def judged(experiment, rows) -> list:
    return [verdict.holds for verdict in experiment.verdicts(rows)]


# gru_lstm


def trained(model: str, seed: int, losses: tuple, ms: float, loop_ms: float | None) -> dict:
    """A step takes twice what the layer does; ``loop_ms``: what the layer takes as a loop."""
    row = {"model": model, "seed": seed, "width": 10, "parameters": 1000, "every": 10, "loss": list(losses)}
    row["layer_parameters"] = {gru_lstm.LSTM: 400, gru_lstm.GRU: 300}.get(model, 390)
    row |= {"layer_ms": ms + seed / 10, "step_ms": 2 * ms + seed / 5}
    again = (None, None) if loop_ms is None else (loop_ms + seed / 10, 2 * loop_ms + seed / 5)
    return row | dict(zip(("loop_layer_ms", "loop_step_ms"), again, strict=True))


SOON, LATE = (4.0, 2.0, 1.5, 1.4), (4.0, 3.0, 2.5, 2.0)


def gates(lstm: tuple, gru: tuple, ms: tuple[float, float] = (20.0, 15.0), loop=(None, None)) -> list[dict]:
    of = {gru_lstm.LSTM: (lstm, ms[0], loop[0])} | dict.fromkeys(gru_lstm.MODELS[1:], (gru, ms[1], loop[1]))
    return [
        trained(model, seed, tuple(loss + seed / 100 for loss in losses), *times)
        for model, (losses, *times) in of.items()
        for seed in range(3)
    ]


@pytest.mark.parametrize(
    "lstm, gru, ms, loop, holds",
    [
        (SOON, LATE, (20.0, 15.0), (None, None), [True, True, True, True]),
        (LATE, SOON, (20.0, 15.0), (None, None), [True, True, False, False]),
        (LATE, LATE, (15.0, 20.0), (None, None), [True, False, None, True]),
        (SOON, SOON, (20.0, 20.0), (None, None), [True, None, None, None]),
        # A library's LSTM takes a quarter; cells are judged by what is alike.
        (LATE, LATE, (5.0, 15.0), (20.0, 15.0), [True, True, None, False]),
        (LATE, LATE, (20.0, 15.0), (15.0, 20.0), [True, False, None, True]),
    ],
)
def test_gru_and_lstm_are_judged_by_steps_and_by_time(lstm, gru, ms, loop, holds):
    assert judged(gru_lstm, gates(lstm, gru, ms, loop)) == holds


def test_a_gru_of_another_size_is_not_three_quarters():
    rows = [{**row, "layer_parameters": 400} for row in gates(SOON, LATE)]
    assert judged(gru_lstm, rows)[0] is False


def test_gru_sentences_carry_steps_and_losses():
    fewer, cheaper, slower, behind = (verdict.sentence for verdict in gru_lstm.verdicts(gates(SOON, LATE)))
    assert "the GRU has 300 parameters and the LSTM 400: 75.0% of them" in fewer
    assert "the GRU as wide 15.1 (15 to 15.2) ms: 0.75 times that, where its weights say 0.75" in cheaper
    assert "held-out loss of 2.02 nats a character the LSTM 10 steps, the GRU, equal width 30 steps" in slower
    # 30 steps of a GRU of 30 ms.
    assert "After 0.906 s" in behind and "as torch" not in (cheaper + behind).lower()


def test_gru_sentences_say_which_times_are_alike():
    rows = gates(LATE, LATE, (5.0, 15.0), (20.0, 15.0))
    _, cheaper, _, behind = (verdict.sentence for verdict in gru_lstm.verdicts(rows))
    assert "all as torch's loop over steps, the LSTM takes 20.1 (20 to 20.2) ms" in cheaper
    assert "the LSTM as one operator, the GRU as a loop: 5.1 (5 to 5.2) ms and 15.1 (15 to 15.2) ms, 2.96" in cheaper
    # 30 steps of 10 ms bring the LSTM to its end.
    assert "As torch runs them here, after 0.306 s: 2.01 (2.00 to 2.02) (LSTM), 3.00 (2.99" in behind
    assert len(gru_lstm.draw(rows)[0].axes[2].lines) == 2 * len(gru_lstm.draw(gates(SOON, LATE))[0].axes[2].lines)


def test_steps_to_a_loss_and_loss_after_seconds_are_interpolated():
    row = trained(gru_lstm.LSTM, 0, (4.0, 2.0, 1.0), 50.0, None)
    assert gru_lstm.steps_to(3.0, row) == 5
    assert gru_lstm.steps_to(4.5, row) == 0
    assert gru_lstm.steps_to(0.5, row) is None
    assert gru_lstm.loss_after(1.5, row, 0.1) == 1.5
    assert gru_lstm.loss_after(9.0, row, 0.1) == 1.0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has one way only")
def test_without_onednn_a_layer_is_torchs_loop():
    lstm, x, called = torch.nn.LSTM(3, 4), torch.randn(5, 2, 3), []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.append(operator.name())
            return operator(*args, **(kwargs or {}))

    with Listening():
        lstm(x)
    assert "aten::mkldnn_rnn_layer" in called
    called.clear()
    with Listening(), load("study.models").loop():
        lstm(x)
    assert called and "aten::mkldnn_rnn_layer" not in called
    assert torch.backends.mkldnn.enabled


# steps

LENGTHS = [64, 128, 256, 512, 1024, 2048]


def swept(recurrent=lambda T: T, attention=lambda T: T**2, per_token=1, noise=0.0, last=2048) -> list[dict]:
    """Rounds in which times and chains follow these laws."""
    lengths = [T for T in LENGTHS if T <= last]
    rows = []
    for seed in range(3):
        off = lambda T, seed=seed: 1 + noise * (seed - 1) * math.cos(T)
        times = {op: [recurrent(T) * off(T) for T in lengths] for op in steps.RECURRENT}
        times["attention"] = [attention(T) * off(T) for T in lengths]
        chain = {op: [int(per_token * T) for T in lengths] for op in steps.RECURRENT} | {
            "attention": [4] * len(lengths)
        }
        found = chain if seed == 0 else {op: [] for op in chain}
        rows.append({"seed": seed, "B": 4, "lengths": lengths, "steps": chain, "chain": found})
        rows[-1] |= {"forward": times, "training": times}
    return rows


def towards(*slopes: float):
    """Attention's time, with these slopes between the last lengths."""

    def time(T: int) -> float:
        steps_up = [slope for length, slope in zip(LENGTHS[-len(slopes) :], slopes, strict=True) if length <= T]
        return 2 ** sum(steps_up)

    return time


@pytest.mark.parametrize(
    "rows, holds",
    [
        (swept(), [True, False, True, True]),
        (swept(recurrent=lambda T: math.exp(T / 300)), [True, True, False, True]),
        (swept(recurrent=lambda T: T**0.7), [True, False, False, True]),
        (swept(recurrent=lambda T: T**1.3), [True, False, False, True]),
        (swept(attention=lambda T: T, per_token=0), [False, False, True, False]),
        (swept(noise=0.9, attention=lambda T: T**1.5, last=512), [None, None, None, None]),
    ],
    ids=["linear", "exponential", "less", "more", "parallel", "noise"],
)
def test_steps_are_judged_by_chain_and_law(rows, holds):
    assert judged(steps, rows) == holds


@pytest.mark.parametrize(
    "slopes, holds, said",
    [
        ((1.9, 1.9, 1.9), True, "at the end above 1.75, a square"),
        ((1.2, 1.4, 1.6), True, "rising and above 1.5, so tending to a square"),
        # Above 1.5 without rising, rising without being above it, and not rising at the last.
        ((1.52, 1.52, 1.52), False, "neither near a square nor rising to it"),
        ((1.0, 1.2, 1.4), False, "neither near a square nor rising to it"),
        ((1.2, 1.7, 1.6), False, "neither near a square nor rising to it"),
    ],
)
def test_a_square_is_one_at_the_end_or_on_the_way_there(slopes, holds, said):
    verdict = steps.verdicts(swept(attention=towards(*slopes)))[-1]
    assert verdict.holds is holds and said in verdict.sentence


def test_rounds_that_disagree_about_the_end_decide_nothing():
    rows = swept(attention=towards(1.2, 1.4, 1.6))
    for pass_ in steps.PASSES:
        rows[0][pass_]["attention"] = [*rows[0][pass_]["attention"][:-1], 2 ** (1.2 + 1.4 + 1.3)]
    assert steps.verdicts(rows)[-1].holds is None


def test_steps_sentences_carry_chains_and_slopes():
    dependent, exponential, proportional, quadratic = (verdict.sentence for verdict in steps.verdicts(swept()))
    assert "at T = 2,048: RNN 2,048, GRU 2,048, LSTM 2,048, attention 4" in dependent
    assert "more for each further token: RNN 1, GRU 1, LSTM 1, attention 0" in dependent
    assert "RNN as T^1.00 (R² 1.000; as an exponential of T 0.9" in exponential
    assert "attention as T^2.00" in exponential
    assert "training takes: RNN T^1.00, GRU T^1.00, LSTM T^1.00; forward alone: RNN T^1.00" in proportional
    assert "From T = 256 to 512 to 1,024 to 2,048 attention's time grows forward as T^2.00, T^2.00, T^2.00" in quadratic
    assert "short of 1,000" in steps.verdicts(swept(last=512))[0].sentence


def test_the_chain_is_counted_in_the_graph():
    sizes = steps.SIZES["tiny"]
    for op in steps.RECURRENT:
        assert [steps.chain_of(op, sizes, T) for T in (1, 2, 7)] == [1, 2, 7]
    # Projection, scores, their average of the values, projection.
    assert [steps.chain_of("attention", sizes, T) for T in (2, 7)] == [4, 4]


# intensity


def layers_at(B: int, step_us: float, times: float = 4.0, spread: float = 0.0, looped: float | None = None) -> dict:
    """A machine of 100 GFLOP/s and 10 GB/s, and layers 100 wide with weights of a byte an element, 10 steps.

    An LSTM takes ``times`` the RNN's time, and ``looped`` times that as a loop.
    """
    ops = {"rnn": 1, "gru": 3, "lstm": 4, "attention": 4}
    flops = {op: 10 * 2 * gates * 100 * 200 * B for op, gates in ops.items()}
    streamed = {op: 10 * gates * 100 * 200 for op, gates in ops.items()}
    ms = {op: [step_us / 100 * (times if op == "lstm" else 1) * f for f in (1 - spread, 1, 1 + spread)] for op in ops}
    row = {"B": B, "T": 10, "width": 100, "gflops": 100.0, "gbytes": 10.0, "ms": ms, "flops": flops, "kernels": []}
    row["looped"] = {} if looped is None else {"rnn": ms["rnn"], "lstm": [looped * each for each in ms["rnn"]]}
    held = {op: each / 10 for op, each in streamed.items()}
    step_flops = {op: 2 * ops[op] * 100 * 100 * B for op in steps.RECURRENT}
    return {**row, "streamed": streamed, "held": held, "step_flops": step_flops}


@pytest.mark.parametrize(
    "step_us, spread, holds, why",
    # Reading 80 KB takes 8 µs at 10 GB/s.
    [
        (10.0, 0.1, True, ": that is most of"),
        (100.0, 0.1, False, "neither limit is near"),
        (2.0, 0.1, False, ": that is more than memory delivers"),
        (16.0, 0.2, None, "in some rounds that is less than 50% of what memory delivers"),
        (8.0, 0.1, None, "in some rounds that is more than what memory delivers"),
        (12.0, 0.6, None, "in some rounds that is less than 50% of and in others more than what memory delivers"),
    ],
    ids=["near the copy", "near nothing", "faster than memory", "around half", "around all", "anywhere"],
)
def test_an_lstm_is_bandwidth_bound_where_it_moves_what_a_copy_does(step_us, spread, holds, why):
    verdict = intensity.verdicts([layers_at(B, step_us / 4, spread=spread) for B in (1, 4, 16)])[0]
    assert verdict.holds is holds and why in verdict.sentence


@pytest.mark.parametrize("times, spread, holds", [(4, 0.0, True), (1.5, 0.0, False), (8, 0.0, False), (4, 0.3, True)])
def test_four_products_are_judged_by_the_time_they_take(times, spread, holds):
    # Rounds in which both are slow leave the ratio as it is.
    assert judged(intensity, [layers_at(B, 2.5, times, spread) for B in (1, 16)])[1] is holds


@pytest.mark.parametrize("times, looped, holds", [(1.5, 4.2, True), (4, 2, False)])
def test_four_products_are_judged_by_loops_where_a_library_has_another_way(times, looped, holds):
    verdict = intensity.verdicts([layers_at(B, 2.5, times, looped=looped) for B in (1, 16)])[1]
    assert verdict.holds is holds
    assert f"both as a loop over steps, the LSTM layer takes {looped:.2f} times" in verdict.sentence
    assert f"As torch runs them here, with the LSTM as one operator: {times:.2f} and" in verdict.sentence


def test_four_products_are_undecided_where_rounds_disagree():
    rows = [layers_at(1, 2.5), layers_at(16, 2.5)]
    rows[-1]["ms"]["rnn"] = [0.5 * ms for ms in rows[-1]["ms"]["rnn"][:1]] + rows[-1]["ms"]["rnn"][1:]
    assert judged(intensity, rows)[1] is None


def test_intensity_sentences_say_at_which_batch_the_ridge_is_passed():
    rows = [layers_at(B, 2.5) for B in (1, 4, 16)]
    sentence = intensity.verdicts(rows)[0].sentence
    # 2·B operations a byte, or 20·B with weights read once, and a ridge at 10.
    assert "makes 2 operations a byte at a batch of 1 and 32 at 16; this machine's ridge is at 10" in sentence
    assert "leaves the memory-bound side from a batch of 16 on" in sentence
    assert "held on the chip from a batch of 1 on" in sentence
    assert "80% of a copy's rate" in sentence
    assert "at no batch up to 4" in intensity.verdicts(rows[:2])[0].sentence


def test_kernels_of_a_profile_are_drawn():
    rows = [layers_at(B, 2.5) for B in (1, 4)]
    before = len(intensity.draw(rows)[0].axes[0].lines)
    rows[0]["kernels"] = [{"name": "a kernel", "ms": 0.01, "flops": 1e6, "bytes": 1e5}]
    assert len(intensity.draw(rows)[0].axes[0].lines) == before + 1
