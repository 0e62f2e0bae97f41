"""Verdicts of the study's experiments on time, bandwidth and architectures: from rows that say yes, no, or neither."""

import math

import pytest

from .benchmark_modules import load, not_interpreted

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

steps, intensity, gru_lstm, bottleneck, transformers = (
    load(f"study.experiments.{name}") for name in ("steps", "intensity", "gru_lstm", "bottleneck", "transformers")
)


def judged(experiment, rows) -> list:
    return [verdict.holds for verdict in experiment.verdicts(rows)]


# bottleneck


def translated(context: str, seed: int, *accuracy: float) -> dict:
    row = {"context": context, "seed": seed, "parameters": 4321, "chance": 0.1, "lengths": [5, 10, 20]}
    return {**row, "accuracy": list(accuracy), "whole": [each**5 for each in accuracy]}


def translations(without: list[tuple], with_: list[tuple]) -> list[dict]:
    named = {bottleneck.WITHOUT: without, bottleneck.WITH: with_}
    return [translated(name, seed, *each) for name, found in named.items() for seed, each in enumerate(found)]


STEADY, FALLING = [(0.99, 0.98, 0.97), (1.0, 1.0, 0.96)], [(0.99, 0.85, 0.5), (0.97, 0.8, 0.4)]
UNLEARNED = [(0.3, 0.2, 0.1), (0.95, 0.8, 0.1)]


@pytest.mark.parametrize(
    "without, with_, holds",
    [
        (FALLING, STEADY, [True, True]),
        (STEADY, STEADY, [False, None]),
        ([(0.99, 0.98, 0.94)] * 2, [(0.99, 0.99, 0.99)] * 2, [False, None]),
        ([(0.99, 0.98, 0.95), (0.99, 0.7, 0.4)], STEADY, [None, None]),
        (FALLING, FALLING, [True, None]),
        (FALLING, [(0.99, 0.5, 0.1)] * 2, [True, False]),
        (UNLEARNED, STEADY, [None, True]),
        (FALLING, UNLEARNED, [True, None]),
    ],
)
def test_the_bottleneck_is_judged_by_the_fall_in_accuracy(without, with_, holds):
    assert judged(bottleneck, translations(without, with_)) == holds


def test_bottleneck_sentences_say_where_accuracy_falls():
    squeezed, relieved = bottleneck.verdicts(translations(FALLING, STEADY))
    assert "98% (97% to 99%) of the symbols are right in sentences of 5" in squeezed.sentence
    assert "the median is below 90% from 10 symbols on" in squeezed.sentence
    assert "the median is nowhere below 90%" in relieved.sentence
    assert "by 3 (2 to 4) percentage points with attention and by 53 (49 to 57) without, at 4,321" in relieved.sentence


# transformers


def flow(T: int = 3, ahead: float = 0.0) -> list[list[float]]:
    return [[0.5 if j <= i else ahead for j in range(T)] for i in range(T)]


def transformer(model: str, accuracy: float, ahead: float, source: float | None = None) -> list[dict]:
    rows = []
    for seed, off in enumerate((-0.01, 0.01)):
        row = {"model": model, "seed": seed, "accuracy": accuracy + off, "chance": 0.1, "parameters": 1234}
        row["flow"] = flow(ahead=ahead)
        rows.append(row if source is None else {**row, "source_flow": flow(ahead=source)})
    return rows


def three_kinds(**changed) -> list[dict]:
    """As they are taught, but for (accuracy, ahead, source) of the models named."""
    taught = {"ENCODER": (0.9, 0.2), "BLIND": (0.5, 0.0), "DECODER": (0.8, 0.0), "CHEATING": (0.3, 0.2)}
    taught |= {"BOTH": (0.9, 0.0, 0.3), **changed}
    return [row for name, of in taught.items() for row in transformer(getattr(transformers, name), *of)]


@pytest.mark.parametrize(
    "changed, holds",
    [
        ({}, [True, True, True]),
        ({"ENCODER": (0.9, 0.0)}, [False, True, True]),
        ({"ENCODER": (0.4, 0.2)}, [False, True, True]),
        ({"ENCODER": (0.51, 0.2)}, [None, True, True]),
        ({"DECODER": (0.8, 1e-9)}, [True, False, True]),
        ({"CHEATING": (0.79, 0.2)}, [True, None, True]),
        ({"CHEATING": (0.9, 0.2)}, [True, False, True]),
        ({"BOTH": (0.9, 0.0, 0.0)}, [True, True, False]),
        ({"BOTH": (0.9, 0.1, 0.3)}, [True, True, False]),
        ({"BOTH": (0.105, 0.0, 0.3)}, [True, True, None]),
    ],
)
def test_kinds_of_transformers_are_judged_by_flow_and_accuracy(changed, holds):
    assert judged(transformers, three_kinds(**changed)) == holds


def test_transformer_sentences_tell_shares_seen_and_right():
    encoder, decoder, both = (verdict.sentence for verdict in transformers.verdicts(three_kinds()))
    assert "100% of the inputs up to their own place and on 100% after it" in encoder
    assert "90% (89% to 91%) of the hidden tokens are found, under a causal mask 50%" in encoder
    assert "on 0% after it. Left to go on by itself it tells 80% (79% to 81%)" in decoder
    assert "100% of the source" in both
    assert "chance is 10%" in both


def test_attention_that_torch_passes_by_is_noticed():
    sizes = transformers.SIZES["tiny"]
    model = transformers.make(transformers.ENCODER, sizes)
    few = transformers.TASKS[transformers.ENCODER](sizes.symbols, 4, 2, "cpu", 0)
    assert transformers.attention_calls(model.eval(), few, sizes.layers) == sizes.layers
    load("study.transformers").seqcore.restore(model)
    with pytest.raises(AssertionError, match="counted 0"):
        transformers.attention_calls(model, few, sizes.layers)


# gru_lstm


def trained(model: str, seed: int, losses: tuple, step_ms: float, layer_ms: float) -> dict:
    row = {"model": model, "seed": seed, "width": 10, "parameters": 1000, "every": 10, "loss": list(losses)}
    parameters = {gru_lstm.LSTM: 400, gru_lstm.GRU: 300}.get(model, 390)
    return {**row, "layer_parameters": parameters, "step_ms": step_ms + seed, "layer_ms": layer_ms + seed / 10}


SOON, LATE = (4.0, 2.0, 1.5, 1.4), (4.0, 3.0, 2.5, 2.0)


def gates(lstm: tuple, gru: tuple, ms: tuple[float, float] = (20.0, 15.0)) -> list[dict]:
    of = {gru_lstm.LSTM: (lstm, ms[0]), gru_lstm.GRU: (gru, ms[1]), gru_lstm.LARGER_GRU: (gru, ms[1])}
    return [trained(model, seed, losses, 2 * its, its) for model, (losses, its) in of.items() for seed in range(2)]


@pytest.mark.parametrize(
    "lstm, gru, ms, holds",
    [
        (SOON, LATE, (20.0, 15.0), [True, True, True, True]),
        (LATE, SOON, (20.0, 15.0), [True, True, False, False]),
        (LATE, LATE, (15.0, 20.0), [True, False, None, True]),
        (SOON, SOON, (20.0, 20.0), [True, None, None, None]),
    ],
)
def test_gru_and_lstm_are_judged_by_steps_and_by_time(lstm, gru, ms, holds):
    assert judged(gru_lstm, gates(lstm, gru, ms)) == holds


def test_a_gru_of_another_size_is_not_three_quarters():
    rows = [{**row, "layer_parameters": 400} for row in gates(SOON, LATE)]
    assert judged(gru_lstm, rows)[0] is False


def test_gru_sentences_carry_steps_and_losses():
    fewer, cheaper, slower, behind = (verdict.sentence for verdict in gru_lstm.verdicts(gates(SOON, LATE)))
    assert "the GRU has 300 parameters and the LSTM 400: 75.0% of them" in fewer
    assert "the GRU as wide 15.1 (15 to 15.1) ms: 0.75 times that, where its weights say 0.75" in cheaper
    assert "held-out loss of 2.00 nats a character the LSTM 10 steps, the GRU, equal width 30 steps" in slower
    # 30 steps of a GRU of 30 ms.
    assert "After 0.9 s" in behind


def test_steps_to_a_loss_and_loss_after_seconds_are_interpolated():
    row = trained(gru_lstm.LSTM, 0, (4.0, 2.0, 1.0), 100.0, 1.0)
    assert gru_lstm.steps_to(3.0, row) == 5
    assert gru_lstm.steps_to(4.5, row) == 0
    assert gru_lstm.steps_to(0.5, row) is None
    assert gru_lstm.loss_after(1.5, row) == 1.5
    assert gru_lstm.loss_after(9.0, row) == 1.0


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


@pytest.mark.parametrize(
    "rows, holds",
    [
        (swept(), [True, False, True]),
        (swept(recurrent=lambda T: math.exp(T / 300)), [True, True, True]),
        (swept(attention=lambda T: T, per_token=0), [False, False, False]),
        (swept(noise=0.9, attention=lambda T: T**1.5, last=512), [None, None, None]),
    ],
    ids=["linear", "exponential", "parallel", "noise"],
)
def test_steps_are_judged_by_chain_and_law(rows, holds):
    assert judged(steps, rows) == holds


def test_steps_sentences_carry_chains_and_slopes():
    dependent, exponential, quadratic = (verdict.sentence for verdict in steps.verdicts(swept()))
    assert "at T = 2,048: RNN 2,048, GRU 2,048, LSTM 2,048, attention 4" in dependent
    assert "more for each further token: RNN 1, GRU 1, LSTM 1, attention 0" in dependent
    assert "RNN as T^1.00 (R² 1.000; as an exponential of T 0.9" in exponential
    assert "attention as T^2.00" in exponential
    assert "Between T = 1,024 and 2,048" in quadratic
    assert "short of 1,000" in steps.verdicts(swept(last=512))[0].sentence


def test_the_chain_is_counted_in_the_graph():
    sizes = steps.SIZES["tiny"]
    for op in steps.RECURRENT:
        assert [steps.chain_of(op, sizes, T) for T in (1, 2, 7)] == [1, 2, 7]
    # Projection, scores, their average of the values, projection.
    assert [steps.chain_of("attention", sizes, T) for T in (2, 7)] == [4, 4]


# intensity


def layers_at(B: int, step_us: float, times: float = 4.0, spread: float = 0.0) -> dict:
    """A machine of 100 GFLOP/s and 10 GB/s, and layers 100 wide with weights of a byte an element, 10 steps."""
    ops = {"rnn": 1, "gru": 3, "lstm": 4, "attention": 4}
    flops = {op: 10 * 2 * gates * 100 * 200 * B for op, gates in ops.items()}
    streamed = {op: 10 * gates * 100 * 200 for op, gates in ops.items()}
    ms = {op: [step_us / 100 * (times if op == "lstm" else 1) * f for f in (1 - spread, 1, 1 + spread)] for op in ops}
    row = {"B": B, "T": 10, "width": 100, "gflops": 100.0, "gbytes": 10.0, "ms": ms, "flops": flops, "kernels": []}
    held = {op: each / 10 for op, each in streamed.items()}
    step_flops = {op: 2 * ops[op] * 100 * 100 * B for op in steps.RECURRENT}
    return {**row, "streamed": streamed, "held": held, "step_flops": step_flops}


@pytest.mark.parametrize(
    "step_us, spread, holds",
    # Reading 80 KB takes 8 µs at 10 GB/s.
    [(10.0, 0.1, True), (100.0, 0.1, False), (2.0, 0.1, False), (16.0, 0.2, None)],
    ids=["near the copy", "near nothing", "faster than memory", "around half"],
)
def test_an_lstm_is_bandwidth_bound_where_it_moves_what_a_copy_does(step_us, spread, holds):
    rows = [layers_at(B, step_us / 4, spread=spread) for B in (1, 4, 16)]
    assert judged(intensity, rows)[0] is holds


@pytest.mark.parametrize("times, spread, holds", [(4, 0.0, True), (1.5, 0.0, False), (8, 0.0, False), (4, 0.3, True)])
def test_four_products_are_judged_by_the_time_they_take(times, spread, holds):
    # Rounds in which both are slow leave the ratio as it is.
    assert judged(intensity, [layers_at(B, 2.5, times, spread) for B in (1, 16)])[1] is holds


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
