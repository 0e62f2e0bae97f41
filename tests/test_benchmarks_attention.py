"""The attention suite: its cases and their work, its peers, the check before a time counts, and its verdicts."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils import flop_counter

from seqcore.kernels import work as speed_of_light

from .benchmark_modules import load, needs_pytest_benchmark, run_python
from .comparisons import assert_equal_in_float64

needs_pytest_benchmark()
report, rows, shapes, timing = (load(name) for name in ("report", "rows", "shapes", "timing"))
cases, data, peers = (load(f"attention_{name}") for name in ("cases", "data", "peers"))
said = load("reporting.attention")

TINY = cases.attention_cases(shapes.TINY)
KINDS = [case for case in TINY if case.pass_ == "forward" or case.sweep in ("bias", "memory")]
TRAINED = [case for case in TINY if case.pass_ == "training" and case.sweep != "memory"]
by_id = pytest.mark.parametrize("case", KINDS, ids=lambda case: case.id)


def in_float64(case: "cases.AttentionCase") -> "data.Data":
    return data.make_data(replace(case, dtype="float64"), "cpu")


def attend(q, k, v, alibi_slopes=None, **options):
    """What is written down of [B, H, M, D] in float64."""
    return peers.seqcore.functional.attention(q, k, v, alibi_slopes=alibi_slopes, backend="reference", **options)


def test_cases_are_distinct_and_the_most_valuable_come_first():
    found = cases.attention_cases(shapes.GPU)
    ids = [case.id for case in found]
    assert len(set(ids)) == len(ids)
    assert {case.sweep for case in found} == {case.sweep for case in TINY} == set(cases.SWEEPS)
    first = [case.sweep for case in found].index("plain")
    assert {case.sweep for case in found[:first]} == {"decode", "padded", "window", "bias", "alibi"}
    plain = [case for case in found if case.sweep == "plain"]
    assert {case.tokens for case in plain} == {16384} and {case.H * case.D for case in plain} == {2048}
    assert len(plain) == 5 * 3 * 2 * 2
    for case in found:
        filled = sum(case.lengths) / (case.B * case.N)
        assert case.sweep != "padded" or filled == pytest.approx(0.5, abs=1e-3)
        assert case.sweep != "packed" or max(case.lengths) == case.N


@by_id
def test_work_is_counted_by_visible_pairs(case):
    found = data.make_data(case, "cpu")
    seen = found.visible(torch.arange(found.query.shape[2]))
    pairs = int(seen.expand(found.query.shape[0], *seen.shape[1:]).sum())
    forward = 4 * pairs * case.H * case.D
    expected = forward if case.pass_ == "forward" else 3.5 * forward
    assert cases.score_work(case, 4).flops == expected


@pytest.mark.parametrize("M, N, window", [(5, 5, None), (3, 7, None), (7, 3, 2), (9, 9, 4)])
def test_pairs_by_hand(M, N, window):
    by_hand = sum(n <= m and (not window or m - n < window) for m in range(M) for n in range(N))
    assert speed_of_light.visible_pairs(M, N, True, window) == by_hand
    assert speed_of_light.visible_pairs(M, N) == M * N


def test_flops_are_those_torch_counts():
    B, H, M, N, D, DV = 2, 3, 5, 7, 8, 6
    q, k, v = torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, DV)
    forward = H * speed_of_light.score_flops(B * M * N, D, DV, "forward")
    assert forward == flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)
    with flop_counter.FlopCounterMode(display=False) as counter:
        peers.F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == forward
    backward = H * speed_of_light.score_flops(B * M * N, D, DV, "training") - forward
    assert backward == flop_counter.sdpa_backward_flop_count((B, H, M, DV), q.shape, k.shape, v.shape)


def test_bytes_by_hand():
    case = cases.AttentionCase("x", "forward", "bfloat16", 2, 4, 8, 16, 32, H_kv=2, lengths=(10, 6))
    # Queries and output of four heads, visible keys and values of two.
    elements = 2 * (2 * 8) * 4 * 32 + 2 * (10 + 6) * 2 * 32
    assert cases.score_work(case, 2).bytes == 2 * elements
    biased = replace(case, H_kv=0, lengths=(), bias=True, pass_="training")
    elements = 2 * (2 * 8) * 4 * 32 + 2 * (2 * 16) * 4 * 32 + 4 * 8 * 16
    assert cases.score_work(biased, 2).bytes == 2 * 2 * elements


def equal(case: "cases.AttentionCase", found: "data.Data", peer: "data.Contestant", forward_only: bool = False) -> None:
    """A peer does what ours does, forward and backward."""
    mine = peers.ours(found, "reference")
    pad = lambda tensor: data.padded(tensor, case.lengths)
    padded = case.packed and len(peer.dout) == case.B
    expected = {"out": pad(mine.forward()) if padded else mine.forward()}
    out = peer.forward()
    if padded:
        # Behind its sequence's end a padded query's output is nobody's.
        out = out * pad(torch.ones_like(found.dout))
    actual = {"out": out}
    if not forward_only:
        for name, right, its in zip(data.NAMES, mine.gradients(), peer.gradients(), strict=False):
            expected[name], actual[name] = pad(right) if padded else right, its
    assert_equal_in_float64(actual, expected)


@by_id
def test_torchs_operator_is_given_the_same_problem(case):
    found = in_float64(case)
    equal(case, found, peers.sdpa(found, SDPBackend.MATH))


def test_causal_packed_sequences_need_no_mask():
    case = cases._packed("forward", 3, 2, 16, 8, causal=True)
    found = in_float64(case)
    assert found.unpacked.mask is None and not found.unpacked.masked
    equal(case, found, peers.sdpa(found, SDPBackend.MATH))


@by_id
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_given_the_same_problem(case):
    from torch.nn.attention.flex_attention import flex_attention

    found = in_float64(case)
    # On a CPU it has no backward.
    equal(case, found, peers.flex(found, flex_attention), forward_only=True)


@by_id
def test_flash_attn_is_given_the_same_problem(case, monkeypatch):
    def dense(q, k, v, causal, window_size=(-1, -1), alibi_slopes=None):
        window = tuple(None if side < 0 else side for side in window_size)
        options = {"causal": "lower_right" if causal else None, "window": window, "enable_gqa": True}
        inputs = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attend(*inputs, alibi_slopes, **options).transpose(1, 2)

    def packed(q, k, v, q_ends, k_ends, q_longest, k_longest, causal):
        assert q_longest == k_longest == int(q_ends.diff().max())
        inputs = (tensor.transpose(0, 1) for tensor in (q, k, v))
        options = {"causal": "lower_right" if causal else None, "cu_seqlens_q": q_ends, "cu_seqlens_k": k_ends}
        return attend(*inputs, **options).transpose(0, 1)

    package = types.SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = in_float64(case)
    if case.sweep in ("padded", "bias"):
        with pytest.raises(load("peers").Absent):
            peers.flash_attn(found)
    else:
        equal(case, found, peers.flash_attn(found))


def test_absent_peers_are_named():
    found = data.make_data(next(case for case in TINY if case.sweep == "bias"), "cpu")
    present, absent = peers.peers(found)
    assert present.keys() | absent.keys() == peers.PEERS.keys() and not present.keys() & absent.keys()
    assert peers.MATH in present and {"SDPA cudnn", "SDPA flash", peers.FLEX, peers.FLASH_ATTN} <= absent.keys()
    assert all(absent.values())


def test_scores_that_fill_the_memory_are_not_written_down():
    case = cases.AttentionCase("x", "forward", "bfloat16", 1, 32, 16384, 16384, 64)
    empty = [torch.empty(1, 32, 16384, 64, device="meta") for _ in range(4)]
    with pytest.raises(load("peers").Absent, match="34 GB"):
        peers.sdpa(data.Data(case, *empty), SDPBackend.MATH)
    windowed = replace(case, causal=True, window=512)
    with pytest.raises(load("peers").Absent, match="34 GB"):
        peers.sdpa(data.Data(windowed, *empty), SDPBackend.FLASH_ATTENTION)
    peers.sdpa(data.Data(case, *empty), SDPBackend.FLASH_ATTENTION)


def test_reason_of_a_backend_that_refuses():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at /a/b.cpp:1.)",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at /a/b.cpp:2.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at /a/b.cpp:3.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.\nmore")
    expected = "No available kernel. Aborting execution.; Flash Attention does not support non-null attn_mask."
    assert load("peers").reason(error, warned) == expected
    assert "memory" in load("peers").reason(torch.OutOfMemoryError("CUDA out of memory. /a/b"), [])


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.id)
def test_a_wrong_result_is_not_timed(case):
    found = data.make_data(case, "cpu")
    right = peers.ours(found, "reference")
    assert data.check(found, right, shapes.TINY)["M"] == 16
    with pytest.raises(AssertionError, match=r"output.* error budget"):
        data.check(found, replace(right, call=lambda *inputs: right.call(*inputs) * 1.001), shapes.TINY)
    for i in range(len(found.inputs)):
        # The same output, and a gradient that is off.
        def call(*inputs, i=i):
            return right.call(*inputs) + 1e-3 * (inputs[i] - inputs[i].detach()).sum()

        with pytest.raises(AssertionError, match=rf"gradient of {data.NAMES[i]}.* error budget"):
            data.check(found, replace(right, call=call), shapes.TINY)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_check_in_half_precision(dtype):
    # Positions far apart, whose distances half precision does not hold.
    case = cases.AttentionCase("alibi", "training", dtype, 2, 4, 600, 600, 16, causal=True, alibi=True)
    found = data.make_data(case, "cpu")
    right = peers.ours(found, "reference")
    data.check(found, right, shapes.TINY)
    with pytest.raises(AssertionError, match="error budget"):
        data.check(found, replace(right, call=lambda *inputs: right.call(*inputs) * 1.05), shapes.TINY)


def measured(case: "cases.AttentionCase", ratio: float, **more) -> "rows.Row":
    """A row in which the best of torch's backends takes ``ratio`` times as long as ours, and FlexAttention half."""
    ours = 1.0 if case.pass_ == "forward" else 3.0
    times = {"SDPA cudnn": 1.5 * ratio * ours, "SDPA math": ratio * ours, peers.FLEX: 0.5 * ours}
    info = rows.extra_info(
        "attention", "attention", case.pass_, case.dtype, case.shape, timing.Timing.of([ours] * 3),
        {name: timing.Timing.of([ms] * 3) for name, ms in times.items()}, cases.score_work(case, 2), {},
        sweep=case.sweep, causal=case.causal, absent={"flash-attn": "is not here"}, memory_kind="peak allocated",
        memory_bytes=100 * case.N, peer_memory_bytes={"SDPA math": case.N**2, "SDPA flash": case.N},
    )  # fmt: skip
    copied = info["bytes"] / 1e6 * (1 if ratio > 1 else 2)
    rows.add_roofs(info, timing.Roofs(1e3, copied, "bfloat16"))
    return rows.Row(info | more)


def synthetic(ratio: float, gpu: str | None = "some GPU") -> "rows.Results":
    found = [measured(case, ratio) for case in cases.attention_cases(shapes.GPU)]
    return rows.Results(found, {"gpu": gpu}, [], "today")


def test_verdicts_are_those_of_the_rows():
    good, bad = (said.sentences(synthetic(ratio))[: len(said.TARGETS)] for ratio in (9.0, 0.5))
    assert all(": met, by" in sentence for sentence in good), good
    assert all(": not met, by 0 of" in sentence for sentence in bad), bad
    # FlexAttention, twice as fast as ours, is none of torch's backends. From 2k to 16k each head dim has 8 shapes, and
    # 128 the published table's 4 besides.
    assert good[0].startswith("Head dim 64, forward, target at least 1 times the best SDPA backend: met, by 8 of 8;")
    assert any(sentence.startswith("Head dim 128, backward") and "by 12 of 12" in sentence for sentence in good)
    assert "50 (D = 128" in bad[-1] and "100 (D = 128" in good[-1]


def test_one_row_decides_a_verdict_and_none_decides_nothing():
    results = synthetic(9.0)
    worse = next(i for i, row in enumerate(results.rows) if row.info["sweep"] == "window")
    results.rows[worse] = measured(cases.attention_cases(shapes.GPU)[worse], 7.9)
    window = next(sentence for sentence in said.sentences(results) if sentence.startswith("Window"))
    assert "not met, by 1 of 2; the least is 7.9 (forward, D = 128 causal B = 1 H = 16 N = 16,384" in window
    results.rows[:] = [row for row in results.rows if row.info["sweep"] != "window"]
    window = next(sentence for sentence in said.sentences(results) if sentence.startswith("Window"))
    assert window.endswith("not measured.")
    for elsewhere in (synthetic(9.0, gpu=None), rows.Results(results.rows[:0], {"gpu": "some"}, [], "")):
        assert not any(": met" in sentence for sentence in said.sentences(elsewhere))
    assert "No target is measured" in said.sentences(synthetic(9.0, gpu=None))[0]


def test_backward_is_training_less_forward():
    forward, training = (cases._square("plain", pass_, 4, 16, 4096, 128) for pass_ in shapes.PASSES)
    found = [measured(forward, 2.0), measured(training, 1.0)]
    # Ours takes 3 - 1 ms, torch's best 3 - 2.
    assert list(said.ratios(found, ("backward",)).values()) == [pytest.approx(0.5)]
    assert said.ratios(found[1:], ("backward",)) == {}


def test_growth_of_memory_is_told_in_words():
    sentence = next(line for line in said.sentences(synthetic(1.0)) if "memory, peak allocated, grows" in line)
    assert "seqcore as N^1.00, linearly (4 lengths from 8,192 to 65,536)" in sentence
    assert "SDPA math as N^2.00, quadratically" in sentence
    fit = lambda slope: said.growth(said.Fit(slope, 1.0, 4, 1, 8))
    assert "more than linearly, less than quadratically" in fit(1.5) and "less than linearly" in fit(0.5)


def test_report_of_the_attention_suite():
    results = synthetic(0.8)
    results.rows.append(measured(TINY[0], 1.0, peers={}, best_peer=None))
    results.rows[-1].info.update(ratio=None, ratio_p20=None)
    page = report.report(results, [])
    assert "### Attention against torch's kernels" in page and "| SDPA cudnn ms |" in page
    assert "- flash-attn, everywhere: is not here" in page
    results.rows[0].info["absent"] = {"flash-attn": "is elsewhere"}
    assert "- flash-attn, 1 rows (decode): is elsewhere" in said.absent_lines(results.rows)
    assert "the worst is 0.50 against FlexAttention" in page
    assert "| 64.00 MiB |" in said.memory_table([measured(cases._square("memory", "forward", 1, 1, 8192, 8), 1.0)])
    assert "sliding window" in "\n".join(said.summary(results))


def test_without_peers_there_is_no_ratio():
    work, alone = speed_of_light.Work(1.0, 1.0, 1, 1), timing.Timing.of([1.0])
    info = rows.extra_info("attention", "attention", "forward", "float32", TINY[0].shape, alone, {}, work, {})
    assert (info["best_peer"], info["ratio"], info["ratio_p20"]) == (None, None, None)


def test_tiny_suite(tmp_path):
    run_python("-m", "benchmarks", "--suite", "attention", "--sizes", "tiny", "--no-plots", "--out", str(tmp_path))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert not found["seqcore"]["not_measured"] and len(found["benchmarks"]) == len(TINY)
    for entry in found["benchmarks"]:
        info = entry["extra_info"]
        assert info["peers"].keys() | info["absent"].keys() == peers.PEERS.keys()
        assert info["ratio"] == pytest.approx(info["peers"][info["best_peer"]] / info["ms_p50"])
        assert {"floor_ms", "floor_kind", "percent_of_peak", "gpu", "torch", "commit", "kernels"} <= info.keys()
    page = (tmp_path / "report.md").read_text()
    assert "No target is measured" in page and "seqcore as N^1.00, linearly" in page
