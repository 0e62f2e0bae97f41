"""The benchmarks' own arithmetic, their check, and one tiny run from end to end."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seqcore.kernels import work as speed_of_light

from .benchmark_modules import load, needs_pytest_benchmark, not_interpreted, run_python

needs_pytest_benchmark()
not_interpreted()

answers, fits = (load(name) for name in ("reporting.answers", "reporting.fits"))
layers, report, rows, shapes, timing = (load(name) for name in ("layers", "report", "rows", "shapes", "timing"))


@pytest.mark.parametrize("samples", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 2.0, 3.0], list(map(float, range(11)))])
def test_percentiles(samples):
    assert timing.percentile(samples, 0) == min(samples)
    assert timing.percentile(samples, 100) == max(samples)
    assert timing.percentile(samples, 50) == statistics.median(samples)
    if len(samples) > 1:
        expected = statistics.quantiles(samples, n=5, method="inclusive")
        assert timing.percentile(samples, 20) == pytest.approx(expected[0])
        assert timing.percentile(samples, 80) == pytest.approx(expected[3])


def test_floor_is_the_largest_of_the_limits():
    roofs = timing.Roofs(tflops=2.0, gigabytes_per_s=100.0)
    assert roofs.floor(flops=2e12, traffic=1e9) == (pytest.approx(1000.0), "matrix")
    assert roofs.floor(flops=2e9, traffic=1e9) == (pytest.approx(10.0), "copy")
    assert roofs.floor(flops=2e9, traffic=1e9, launches=100)[1] == "copy", "a CPU launches nothing"
    assert replace(roofs, launch_us=2.0).floor(2e6, 1e3, launches=4) == (pytest.approx(8e-3), "launch")


@pytest.mark.parametrize("op", shapes.RECURRENCES)
@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_recurrence_flops_are_those_torch_counts(op, pass_):
    T, B, I, H = 5, 3, 8, 6
    # In float64 a loop of products, which is counted; in float32 the LSTM would be one operator, which is not.
    x = torch.randn(T, B, I, requires_grad=True, dtype=torch.float64)
    module = getattr(nn, op.upper())(I, H, dtype=x.dtype)
    with FlopCounterMode(display=False) as counter:
        y = module(x)[0]
        if pass_ == "training":
            y.sum().backward()
    counted = counter.get_total_flops()
    expected = speed_of_light.work(op, pass_, {"T": T, "B": B, "I": I, "H": H}, 4).flops
    # torch skips the gradient of the first state, which nobody asked for: one product of T.
    skipped = 2 * B * speed_of_light.GATES[op] * H * H if pass_ == "training" else 0
    assert counted == expected - skipped


def test_attention_flops_are_those_torch_counts():
    T, B, E = 7, 3, 8
    module, x = nn.MultiheadAttention(E, 2), torch.randn(T, B, E, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = module(x, x, x)[0]
    assert counter.get_total_flops() == speed_of_light.attention_flops(T, B, E, "forward", causal=False)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    scores = 4 * B * T * T * E
    # The backward that stores the scores spares their recomputation: 2 instead of 2.5 times the forward.
    backward = speed_of_light.attention_flops(T, B, E, "training", causal=False) - speed_of_light.attention_flops(
        T, B, E, "forward", causal=False
    )
    assert counter.get_total_flops() == backward - scores / 2


def test_steps_that_wait_for_each_other():
    assert speed_of_light.dependent_steps("lstm", 100, "forward") == 101
    short, long = (speed_of_light.dependent_steps("attention", T, "forward") for T in (9, 100))
    assert short == long


def test_launches_do_not_grow_with_length():
    shape = {"T": 9, "B": 2, "I": 4, "H": 4}
    for pass_, launches in (("forward", 2), ("training", 4)):
        for T in (9, 100):
            assert speed_of_light.work("lstm", pass_, shape | {"T": T}, 4).launches == launches
        assert speed_of_light.work("lstm", pass_, shape | {"layers": 3}, 4).launches == 3 * launches


@pytest.mark.parametrize("pass_", shapes.PASSES)
@pytest.mark.parametrize("op", ["gru", "attention"])
def test_a_wrong_layer_is_not_timed(op, pass_):
    case = shapes.Case(op, pass_, "batch_fixed", T=40, B=3, H=16, heads=2, dtype="float32")
    built = layers.build_layers(case, shapes.TINY)
    ours, torchs = built["auto"], built["torch.nn"]
    x, dy = layers.make_data(case, "cpu")
    assert layers.check(case, shapes.TINY, ours, torchs, x, dy) == {"T": 16, "B": 2}
    with torch.no_grad():
        next(ours.module.parameters()).mul_(1.01)
    with pytest.raises(AssertionError, match=f"{op}-{pass_}.* error budget"):
        layers.check(case, shapes.TINY, ours, torchs, x, dy)


def test_slope_is_recovered_whatever_small_sizes_cost():
    T = [2**i for i in range(5, 13)]
    fit = fits.fit_power(T, [0.3 * t**1.7 + (5 if t < 300 else 0) for t in T])
    assert fit.slope == pytest.approx(1.7, abs=1e-6)
    assert fit.r_squared == pytest.approx(1.0)
    assert (fit.points, fit.first, fit.last) == (4, 512, 4096)


def test_slope_needs_three_points():
    assert fits.fit_power([1, 2], [1.0, 2.0]) is None
    assert fits.fit_power([1, 2, 4], [3.0, 3.0, 3.0]).slope == 0


def test_crossover_is_recovered():
    T = [2**i for i in range(5, 13)]
    found = fits.find_crossover(T, [1e-3 * t**2 for t in T], [0.7 * t for t in T])
    assert found.verdict == "at"
    assert found.T == pytest.approx(700)
    assert found.at_last == pytest.approx(4096 / 700)


@pytest.mark.parametrize(
    "time, other, verdict",
    [
        ([1, 2, 3], [2, 3, 4], "always"),
        ([2, 3, 4], [1, 2, 3], "never"),
        ([3, 2, 1], [2, 2.1, 2.2], "unclear"),
        ([1, 9, 1, 9], [2, 2, 2, 2], "unclear"),
        ([1, 1, 1], [1.01, 0.99, 1], "unclear"),
        # Within noise at the beginning, clear afterwards.
        ([1, 0.99, 3], [0.99, 1, 2], "never"),
    ],
)
def test_no_crossover_is_said_so(time, other, verdict):
    found = fits.find_crossover(list(range(1, len(time) + 1)), time, other)
    assert (found.verdict, found.T) == (verdict, None)


def test_batch_that_fills():
    batches = [2**i for i in range(12)]
    # A machine that is full at 64: the rate grows with the batch until there.
    found = fits.batch_to_fill(batches, [min(batch, 64) * 1e3 for batch in batches])
    assert found.batch == {0.5: pytest.approx(32), 0.9: pytest.approx(57.6)}
    assert (found.best_rate, found.best_batch, found.still_rising) == (64e3, 64, False)
    assert fits.batch_to_fill(batches, [batch * 1e3 for batch in batches]).still_rising


def row(op: str, pass_: str, sweep: str, T: int, B: int, ms: float) -> "rows.Row":
    shape = {"T": T, "B": B, "I": 8, "H": 8}
    ours, peer = timing.Timing(ms, ms, ms), timing.Timing(2 * ms, 2 * ms, 2 * ms)
    info = rows.extra_info(
        "bottleneck",
        op,
        pass_,
        "float32",
        shape,
        ours,
        {"torch.nn": peer},
        speed_of_light.work(op, pass_, shape, 4),
        {},
        sweep=sweep,
        memory_bytes=None,
    )
    rows.add_roofs(info, timing.Roofs(1.0, 10.0))
    return rows.Row(info)


def synthetic(gpu: str | None) -> "rows.Results":
    """A linear LSTM and a quadratic attention that meet at T = 500."""
    found = [
        row(op, "training", "batch_fixed", T, 4, ms)
        for T in (64, 128, 256, 512, 1024, 2048)
        for op, ms in (("lstm", 0.05 * T), ("attention", 1e-4 * T**2))
    ]
    found += [row("lstm", "training", "batch_sweep", 64, B, max(B, 16) * 0.1) for B in (1, 2, 4, 8, 16, 32, 64)]
    missing = [{"name": "test_layer[x]", "outcome": "skipped", "reason": "out of time"}]
    return rows.Results(found, {"gpu": gpu, "cpu": "a CPU", "cores": 2, "busy_cores_at_start": 0.1}, missing, "today")


def test_report_says_what_the_rows_say():
    page = report.report(synthetic(gpu=None), [])
    assert "fitted over 3 lengths from 512 to 2,048: time grows as LSTM T^1.00, attention T^2.00." in page
    assert "attention stops being cheaper than the LSTM at T ≈ 500" in page
    assert "50% at B ≈ 8 and 90% at B ≈ 14 of its best" in page
    assert "test_layer[x]: skipped, out of time" in page


def test_report_tells_a_cpu_from_a_gpu_and_quiet_from_busy():
    results = synthetic(gpu=None)
    assert "do not speak for a GPU" in report.report(results, [])
    assert "None of seqcore's kernels ran" in report.report(results, [])
    assert "busy" not in report.report(results, [])
    results.machine["busy_cores_at_start"] = 1.5
    assert "busy" in report.report(results, [])
    assert "do not speak for a GPU" not in report.report(synthetic(gpu="some GPU"), [])


def test_rows_name_the_best_peer():
    info = row("lstm", "forward", "batch_fixed", 10, 2, 5.0).info
    assert (info["best_peer"], info["ratio"], info["tokens_per_s"], info["us_per_step"]) == ("torch.nn", 2, 4000, 500)


PROMISED = {"suite", "op", "pass", "dtype", "shape", "ms_p20", "ms_p50", "ms_p80", "peers", "best_peer", "ratio"}
PROMISED |= {
    "floor_ms",
    "floor_kind",
    "gpu",
    "cpu",
    "driver",
    "torch",
    "triton",
    "cudnn",
    "commit",
    "clocks",
    "kernels",
}


def test_tiny_run_and_report(tmp_path):
    out = tmp_path / "out"
    suites = ("floors", "recurrence", "bottleneck", "models")
    run_python("-m", "benchmarks", "--sizes", "tiny", "--out", str(out), "--suite", *suites)
    measured = json.loads((out / "bench.json").read_text())
    assert "node" not in measured["machine_info"]
    found = measured["benchmarks"]
    assert {entry["extra_info"]["suite"] for entry in found} == {"recurrence", "bottleneck", "models"}
    assert {entry["extra_info"]["op"] for entry in found} == {*shapes.OPS, "transformer"}
    both = []
    for entry in found:
        info = entry["extra_info"]
        assert info.keys() >= PROMISED
        # On a CPU both clocks time the same calls, ours within the other. Beside other tests a process may have to wait
        # between the two, which of all cases together is little.
        if info["suite"] != "models":
            both.append((entry["stats"]["median"] * 1e3, info["ms_p50"]))
            assert both[-1][0] == pytest.approx(info["ms_p50"], rel=0.5, abs=0.2)
            assert both[-1][0] > info["ms_p50"] * (1 - 1e-9)
        else:
            assert info["max_loss_difference"] < 1e-4
    outer, inner = map(sum, zip(*both, strict=True))
    assert outer == pytest.approx(inner, rel=0.2, abs=0.05 * len(both))
    page = (out / "report.md").read_text()
    assert "## Recurrences against torch.nn" in page and "### Models" in page and "LSTM T^" in page
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures >= {"time_over_length.png", "rate_over_batch.png", "loss_over_time.png"}
    assert all(name in page for name in pictures)
    skipped = measured["seqcore"]["not_measured"]
    assert {entry["reason"] for entry in skipped} == {load("floors").NEEDS_A_GPU}


def test_pytest_measures_by_itself_with_marks_to_select(tmp_path):
    data = tmp_path / "out.json"
    chosen = ("-m", "recurrence and forward", f"--benchmark-json={data}", "-q")
    run_python("-m", "pytest", "benchmarks", "--sizes=tiny", *chosen)
    found = [entry["extra_info"] for entry in json.loads(data.read_text())["benchmarks"]]
    assert {(info["suite"], info["pass"]) for info in found} == {("recurrence", "forward")}
    assert all(info.keys() >= PROMISED and info["floor_ms"] > 0 for info in found)
