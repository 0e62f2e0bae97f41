"""The recurrence suite's cases, checks and floors, and the kernels that measure the floors."""

import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from seqcore import cells as cells_of_seqcore
from seqcore.devices import INTERPRETED, pretending
from seqcore.kernels import work as speed_of_light
from seqcore.kernels.recurrence.cells import lstm_step
from seqcore.kernels.tuning import Device
from seqcore.profiling.exchange import run_barrier

from .benchmark_modules import load, needs_pytest_benchmark

needs_pytest_benchmark()
floors, layers, shapes, timing = (load(name) for name in ("floors", "layers", "shapes", "timing"))
cases, report, rows = (load(name) for name in ("recurrence_cases", "reporting.recurrence", "rows"))

H200 = Device("sm_90", multiprocessors=132, shared_memory=232448, registers=65536)
on_an_h200 = pytest.mark.usefixtures("_h200")


@pytest.fixture
def _h200():
    with pretending(H200):
        yield


@pytest.mark.kernels
@pytest.mark.parametrize("teams, rows_, width, share", [(1, 16, 512, 512), (3, 2, 72, 72), (2, 16, 1300, 1300)])
def test_exchange_does_what_its_oracle_says(device, teams, rows_, width, share):
    # Interpreted programs run one after another, so there each must be a team of its own.
    slices = 1 if INTERPRETED else 9
    exchange = floors.Exchange(slices, teams, rows_, width, -(-share // slices), 4)
    steps = 5
    found = exchange.rows_of(steps, str(device))
    assert (found[1:] == -1).all()
    exchange.run(found, steps)
    exchange.check(found)
    found[3, -1, -1] += 1
    with pytest.raises(AssertionError, match="wrong within"):
        exchange.check(found)


def test_exchange_oracle_by_hand():
    exchange = floors.Exchange(slices=3, teams=1, rows=1, width=20, share=8, num_warps=4)
    assert (exchange.words, exchange.block, exchange.bytes_read) == ((5, 2), 8, 20)
    # One tile of five words; each program writes the first of its totals: two, two, and the one that is left.
    assert exchange.follow(torch.tensor([[[10, 20, 30, 40, 50]]], dtype=torch.int32)).tolist() == [
        [[11, 21, 11, 21, 11]]
    ]


@pytest.mark.kernels
def test_a_program_writes_its_share_and_no_more(device):
    exchange = floors.Exchange(slices=1, teams=1, rows=2, width=160 * 4, share=140 * 4, num_warps=4)
    found = exchange.rows_of(1, str(device))
    exchange.run(found, 1)
    assert torch.equal(found[1, :, :140], exchange.follow(found[:1])[0, :, :140])
    assert (found[1, :, 140:] == -1).all()


@pytest.mark.kernels
def test_barrier_counts_every_program(device):
    slices, teams, steps = (1 if INTERPRETED else 8), 3, 4
    counters = run_barrier(slices, teams, steps, str(device))
    assert counters.view(teams, -1)[:, 0].tolist() == [slices * steps] * teams


@triton.jit
def a_little_wrong(x_gates, h_gates, state):
    new, saved = lstm_step(x_gates, h_gates, state)
    return (1.01 * new[0].to(tl.float32), new[1]), saved


class Timed:
    """Stands in for pytest-benchmark's fixture, and tells whether anything was timed."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            setup(), target()
        self.rounds += rounds


@pytest.mark.kernels
def test_a_wrong_kernel_is_refused_a_time(device, monkeypatch):
    case = shapes.Case("lstm", "forward", "grid", T=4, B=3, H=31, heads=0, dtype="float32")
    sizes = replace(shapes.TINY, device=str(device), ours="triton", peers=("torch.nn",))

    def contest() -> Timed:
        timed = Timed()
        load("contest").contest(timed, "recurrence", case, sizes, timing.Stopwatch(sizes.device), dict)
        return timed

    right = contest()
    assert right.rounds and right.extra_info["ms_p50"] > 0
    raced = []
    monkeypatch.setattr(load("contest"), "race", lambda *_: raced.append(1))
    backward = cells_of_seqcore.LSTM.device_functions()[1]
    monkeypatch.setattr(cells_of_seqcore.Cell, "device_functions", lambda cell: (a_little_wrong, backward))
    with pytest.raises(AssertionError, match="error budget"):
        contest()
    assert not raced


@on_an_h200
def test_exchange_follows_the_plan():
    case = shapes.Case("lstm", "training", "grid", T=512, B=3, H=768, heads=0, dtype="bfloat16")
    forward, backward = (floors.plan_of(case, back, torch.device("cuda")) for back in (False, True))
    assert (forward[1].gates, forward[1].units, forward[1].itemsize) == (4, 768, 2)
    exchanges = [floors.exchange_of(*forward), floors.exchange_of(*backward)]
    assert [exchange.width for exchange in exchanges] == [768 * 2, 4 * 768 * 2]
    for exchange, (plan, _) in zip(exchanges, (forward, backward), strict=True):
        assert (exchange.slices, exchange.teams) == (plan.slices, plan.teams)
        assert exchange.share * exchange.slices >= exchange.width
        assert exchange.rows == 4, "rows of the tile that no sequence has are not exchanged"
    alone, shape = floors.plan_of(replace(case, H=64), False, torch.device("cuda"))
    assert alone.slices == 1
    assert floors.exchange_of(alone, shape) is None


class Meter:
    """Stands in for the GPU's."""

    multiprocessors, shared_bytes_per_us, l2_bytes_per_us = 132, 1000.0, 5000.0

    def exchange(self, exchange) -> "timing.Timing":
        return timing.Timing(1e-3, 1e-3, 1e-3)


@on_an_h200
def test_weights_are_read_on_chip_or_streamed():
    case = shapes.Case("lstm", "forward", "grid", T=512, B=16, H=768, heads=0, dtype="bfloat16")
    plan, shape = floors.plan_of(case, False, torch.device("cuda"))
    slice_bytes = 4 * plan.units * 768 * 2
    assert floors.weights_us(plan, shape, Meter()) == pytest.approx(slice_bytes / 1000)
    crowded = replace(plan, teams=4 * 132 // plan.slices)
    sharing = -(-crowded.teams * plan.slices // 132)
    assert floors.weights_us(crowded, shape, Meter()) == pytest.approx(sharing * slice_bytes / 1000)
    streamed = replace(plan, hold=False)
    assert floors.weights_us(streamed, shape, Meter()) == pytest.approx(
        plan.teams * plan.slices * slice_bytes / 5000
    )


@on_an_h200
@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_floor_of_a_layer_is_the_sum_of_its_parts(pass_):
    T, B, H = 512, 16, 768
    case = shapes.Case("lstm", pass_, "grid", T=T, B=B, H=H, heads=0, dtype="bfloat16")
    work = speed_of_light.work("lstm", pass_, case.shape, 2)
    info = {"flops": work.flops, "bytes": work.bytes, "launches": work.launches, "tflops": 1.0}
    info["step_floors"] = floors.step_floors(case, Meter())
    json.dumps(info)
    slow, quick = timing.Roofs(1e-3, 1e6), timing.Roofs(1e6, 1e6)
    passes = 2 if pass_ == "training" else 1
    assert len(info["step_floors"]) == passes
    rows.add_roofs(info, quick)
    parts = info["floor_parts"]
    assert info["floor_ms"] == pytest.approx(sum(parts.values()))
    assert parts["exchange"] == pytest.approx(passes * T * 1e-3)
    assert parts["products"] == parts["launches"] == 0
    rows.add_roofs(info, replace(quick, launch_us=3.0))
    assert info["floor_ms"] - sum(parts.values()) == pytest.approx(2 * passes * 3e-3)
    # So slow a machine only multiplies: all products count, each once.
    rows.add_roofs(info, slow)
    assert info["floor_parts"]["weights"] == 0
    products = info["floor_parts"]["products"] + info["floor_parts"]["beside the steps"]
    assert products == pytest.approx(work.flops / 1e9 * 1e3)
    assert info["floor_parts"]["products"] == pytest.approx(passes * T * 2 * B * 4 * H * H / 1e9 * 1e3)


def test_cases_are_distinct_and_the_most_valuable_come_first():
    found = cases.recurrence_cases(shapes.GPU)
    ids = [case.id for case in found]
    assert len(set(ids)) == len(ids)
    assert {case.sweep for case in found} == set(cases.SWEEPS)
    assert [case.sweep for case in found[:3]] == ["persistent", "persistent", "grid"]
    grid = {(case.op, case.pass_, case.B, case.H) for case in found if case.sweep == "grid"}
    assert len(grid) == 2 * 2 * 4 * 5


@pytest.mark.parametrize(
    "path, op, pass_, B, H, dtype, more",
    [
        ("persistent", "lstm", "forward", 16, 768, "float16", {}),
        ("standard", "lstm", "forward", 16, 768, "bfloat16", {}),
        ("standard", "gru", "forward", 16, 768, "float16", {}),
        ("standard", "lstm", "forward", 256, 768, "float16", {}),
        ("standard", "lstm", "forward", 16, 768, "float16", {"directions": 2}),
        ("persistent", "gru", "forward", 1, 192, "float32", {}),
        ("standard", "gru", "training", 1, 192, "float32", {}),
        ("standard", "lstm", "forward", 16, 64, "float16", {"packed": True}),
    ],
)
def test_which_path_cudnn_takes(path, op, pass_, B, H, dtype, more):
    assert cases.cudnn_path(shapes.Case(op, pass_, "grid", 512, B, H, 0, dtype, **more)) == path


def unusual(**more) -> "shapes.Case":
    return shapes.Case("lstm", "training", "grid", T=12, B=5, H=8, heads=0, dtype="float32", **more)


UNUSUAL = [{"directions": 2}, {"packed": True}, {"packed": True, "directions": 2}, {"layers": 2}, {"ragged": True}]
UNUSUAL += [{"reset_every": 4}, {"blocks": 4}, {"recompute": True}]


@pytest.mark.skipif(INTERPRETED, reason="launches no kernel")
@pytest.mark.parametrize("more", UNUSUAL, ids=lambda more: "-".join(more))
def test_every_kind_of_layer_is_checked(more):
    case = unusual(**more)
    sizes = replace(shapes.TINY, peers=("torch.nn",), check_T=4, check_B=2)
    built = layers.build_layers(case, sizes)
    ours, torchs = built.pop("auto"), next(iter(built.values()))
    x, dy = layers.make_data(case, "cpu")
    causal = case.directions == 1
    assert layers.check(case, sizes, ours, torchs, x, dy) == {"T": 4 if causal else 12, "B": 2}
    assert layers.kept_bytes(ours, x) > 0
    with torch.no_grad():
        next(p for name, p in ours.module.named_parameters() if name.startswith("weight_hh")).mul_(1.01)
    with pytest.raises(AssertionError, match="error budget"):
        layers.check(case, sizes, ours, torchs, x, dy)


def test_a_sample_of_packed_rows_is_the_sequences_it_names():
    lengths = [5, 4, 4, 2]
    x = torch.arange(15.0)[:, None]
    packed = nn.utils.rnn.pack_sequence([torch.arange(n)[:, None] + 10.0 * i for i, n in enumerate(lengths)])
    layer = layers.Layer(nn.Identity(), inputs={"batch_sizes": packed.batch_sizes})
    short, index = layer.sample(x, T=3, B=2)
    # The first sequence and the last, three steps of each as far as there are so many.
    assert packed.data[index][:, 0].tolist() == [0, 30, 1, 31, 2]
    assert short.inputs["batch_sizes"].tolist() == [2, 2, 1]


def test_blocks_come_back_from_the_dense_weights():
    blocks = torch.randn(4, 3, 2, 2)
    dense = layers.dense(blocks)
    assert dense.shape == (24, 6) and torch.equal(layers.blocks_of(dense, 3), blocks)
    assert dense.count_nonzero() == blocks.numel()


@pytest.mark.parametrize("more", UNUSUAL[:4], ids=lambda more: "-".join(more))
def test_flops_of_unusual_layers_are_those_torch_counts(more):
    case = unusual(**more)
    module = nn.LSTM(case.H, case.H, case.layers, bidirectional=case.directions == 2, dtype=torch.float64)
    x = layers.make_data(case, "cpu")[0].double()
    with FlopCounterMode(display=False) as counter:
        layers.Layer(module, *layers.ways(case, "cpu")).forward(x)
    assert counter.get_total_flops() == speed_of_light.work("lstm", "forward", case.shape, 4).flops


def test_blocks_multiply_less():
    shape = unusual().shape
    T, B, H = 12, 5, 8
    whole, divided = (speed_of_light.work("lstm", "forward", s, 4).flops for s in (shape, {**shape, "blocks": 4}))
    assert whole - divided == 2 * T * B * 4 * (H * H - H * H // 4)


def measured(op: str, pass_: str, B: int, ratio: float, path: str | None, **more) -> "rows.Row":
    case = shapes.Case(op, pass_, more.pop("sweep", "grid"), more.pop("T", 512), B, 768, 0, "bfloat16")
    ours = timing.Timing.of([1.0, 1.0, 2.0, 2.0, 2.0])
    info = rows.extra_info(
        "recurrence", op, pass_, case.dtype, case.shape, ours, {"torch.nn": timing.Timing.of([2 * ratio] * 5)},
        speed_of_light.work(op, pass_, case.shape, 2), {}, sweep=case.sweep, cudnn_path=path, kept_bytes_per_token=None,
        step_floors=[{"steps": 512, "exchange_us": 1.0, "weights_us": 1.0, "flops": 1.0, "regime": "spread"}],
    )  # fmt: skip
    rows.add_roofs(info, timing.Roofs(1e9, 1e9, "bfloat16"))
    return rows.Row(info | more)


def test_report_of_the_recurrence_suite():
    found = [measured("lstm", "forward", 16, 4.0, "standard"), measured("gru", "forward", 256, 1.0, "standard")]
    found += [measured("lstm", "forward", 16, 0.5, "persistent", sweep="persistent")]
    found += [measured("lstm", "forward", 16, 3.0, "standard", sweep="length", T=T) for T in (256, 512, 1024)]
    kept = {"torch.nn": 8.0, "seqcore": 6.0}
    found += [measured("lstm", "training", 16, 2.0, "standard", kept_bytes_per_token=kept)]
    results = rows.Results(found, {"gpu": "some GPU"}, [], "today")
    said = "\n".join(report.sentences(results))
    assert "standard path: geometric mean of the ratios 2.00 over 2 shapes, 4.00 over those of B ≤ 64" in said
    assert "the worst is 1.00 (20 to 80 %: 1.00 to 2.00), GRU bfloat16 H = 768 B = 256 T = 512." in said
    assert "on cuDNN's persistent paths: geometric mean of the ratios 0.50 over 1 shapes" in said
    # Two milliseconds against 512 steps of two microseconds.
    assert "Forward: 0 of 6 shapes take at most 1.5 times their floor; the median takes 1.95 times" in said
    assert "time grows as seqcore T^0.000, torch.nn T^0.000" in said
    assert "torch.nn 8; seqcore 6 bytes a token" in said
    tables = "\n".join(report.tables(results))
    assert "| spread |" in tables and "cuDNN's persistent shape" in tables


def test_floors_stand_in_the_report():
    info = rows.floor_info("barrier", {"programs": 64}, 0.9, "µs", timing.Timing(8e-4, 9e-4, 1e-3), {})
    table = report.tables(rows.Results([rows.Row(info)], {}, [], ""))[1]
    assert "64 programs" in table and "0.8 to 1 " in table


def test_files_of_other_sources_are_left_out(tmp_path):
    def write(name: str, commit: str):
        times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), 1.0)
        path, row = tmp_path / name, {"extra_info": {"suite": "floors", "op": name, "pass": "", "shape": {}, **times}}
        path.write_text(json.dumps({"benchmarks": [row], "seqcore": {"machine": {"commit": commit}}}))
        return path

    files = write("new", "b"), write("old", "a"), write("also new", "b")
    assert [row.op for row in rows.Results.load(*files).rows] == ["new", "also new"]


def test_ratios_are_taken_round_by_round():
    ours, peer = timing.Timing.of([1.0, 2.0, 3.0]), timing.Timing.of([2.0, 4.0, 6.0])
    assert peer.over(ours).samples == (2.0, 2.0, 2.0)
