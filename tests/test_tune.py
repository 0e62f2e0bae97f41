"""The search for tile sizes: right results only, no choice by chance, nothing measured twice."""

import contextlib
import json
import os

import pytest
import torch

from seqcore import cli, info
from seqcore.devices import INTERPRETED
from seqcore.kernels import tuning
from seqcore.tuning import ahead, problems, run, search
from seqcore.tuning.attention import Attention
from seqcore.tuning.race import Deadline, OutOfTime, race

from .tuning_stubs import FOREVER, H200, FakeClock, Stub, bench

# --- the choice ----------------------------------------------------------------------------------------------


def test_noise_does_not_change_a_choice():
    for seed in range(40):
        found = search.search(Stub([1.0] * 12), bench(FakeClock(noise=0.2, seed=seed)))
        assert found["choice"] == found["before"], seed


def test_what_is_clearly_faster_is_chosen():
    for seed in range(10):
        problem = Stub([1.0, 1.2, 0.9, 1.0, 0.95])
        found = search.search(problem, bench(FakeClock(noise=0.02, seed=seed)))
        assert found["choice"] == problem.candidates(H200)[2], seed
        assert found["ms"] < found["before_ms"] and 0.88 < found["ratio"] < 0.92


def test_a_gain_too_small_or_too_erratic_changes_nothing():
    assert search.search(Stub([1.0, 0.99]), bench(FakeClock()))["choice"]["BLOCK_M"] == 16
    assert search.search(Stub([1.0, 0.97]), bench(FakeClock()))["choice"]["BLOCK_M"] == 32
    assert search.is_better([0.9] * 31)
    assert not search.is_better([0.9] * 24 + [1.3] * 7), "slower in more than a fifth of the rounds"
    assert not search.is_better([0.985] * 31)


def test_contestants_take_turns_in_going_first():
    order = []
    contestants = [(contextlib.nullcontext, lambda n=n: order.append(n)) for n in range(3)]
    samples = race(contestants, 3, lambda call: call() or 1.0, FOREVER)
    assert [len(times) for times in samples] == [3, 3, 3], "a round before the first is not counted"
    assert [order[3 * turn] for turn in range(1, 4)] == [0, 1, 2]


# --- right results only --------------------------------------------------------------------------------------


def test_a_wrong_candidate_is_refused_a_time():
    clock = FakeClock()
    found = search.search(Stub([1.0, 0.5, 0.6, 0.9], wrong=(1,), raising=(2,)), bench(clock))
    assert 0.5 not in clock.calls and 0.6 not in clock.calls
    assert found["choice"]["BLOCK_M"] == 128
    because = [refusal["because"] for refusal in found["refused"]]
    assert "y of a case is outside the error budget" in because[0] and "RuntimeError: out of resource" in because[1]
    assert [refusal["candidate"]["BLOCK_M"] for refusal in found["refused"]] == [32, 64]


def test_where_the_present_choice_errs_nothing_is_chosen():
    clock = FakeClock()
    found = search.search(Stub([1.0, 0.5], wrong=(0,)), bench(clock))
    assert found["choice"] is None and "failed" in found and not clock.calls


# --- interrupted, resumed ------------------------------------------------------------------------------------


class Interrupting(FakeClock):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def __call__(self, call):
        if len(self.calls) == self.after:
            raise KeyboardInterrupt
        return super().__call__(call)


def tune(tmp_path, stubs, clock, force=False, deadline=FOREVER, device=H200):
    return run.run(stubs, bench(clock, deadline, device), tmp_path / "table.json", tmp_path / "log.jsonl", force)


def test_an_interrupted_search_writes_what_it_has_and_goes_on_from_there(tmp_path):
    def stubs():
        return [Stub([1.0, 0.5], 64), Stub([2.0, 1.5], 128), Stub([4.0, 4.5], 256)]

    first = Interrupting(after=80)
    outcome = tune(tmp_path, stubs(), first)
    assert set(first.calls) == {1.0, 0.5, 2.0, 1.5} and outcome.left == ["stub 128", "stub 256"]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [(row["head_dim"], row["BLOCK_M"]) for row in table["attention_forward"]] == [(64, 32)]

    second = FakeClock()
    outcome = tune(tmp_path, stubs(), second)
    assert not outcome.left and 0.5 not in second.calls and {2.0, 1.5, 4.0, 4.5} <= set(second.calls)
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["head_dim"]: row["BLOCK_M"] for row in table["attention_forward"]} == {64: 32, 128: 32, 256: 16}

    third = FakeClock()
    assert tune(tmp_path, stubs(), third).left == [] and not third.calls
    fourth = FakeClock()
    tune(tmp_path, stubs(), fourth, force=True)
    assert 0.5 in fourth.calls, "--force believes no log"


def test_out_of_time_is_no_failure(tmp_path):
    outcome = tune(tmp_path, [Stub([1.0])], FakeClock(), deadline=Deadline(-1))
    assert outcome.left == ["stub 64"] and not (tmp_path / "table.json").exists()
    with pytest.raises(OutOfTime):
        Deadline(-1).check()


# --- what is written -----------------------------------------------------------------------------------------


def test_the_table_says_what_it_was_measured_on_and_is_read(tmp_path):
    tune(tmp_path, [Stub([1.0, 0.5])], FakeClock())
    path = tmp_path / "table.json"
    table = json.loads(path.read_text())
    here = table["measured_on"]
    assert here["torch"] == torch.__version__ and here["kernels"] == info.kernel_hashes()
    assert here.keys() >= {"device", "driver", "triton", "seqcore", "date"}
    (row,) = table["attention_forward"]
    assert (row["measured"]["ms"], row["measured"]["before_ms"]) == (0.5, 1.0)
    assert row["measured"]["kernels"] == info.family_hash("attention") != info.family_hash("recurrence")
    assert row["measured"].keys() >= {"device", "torch", "triton", "date"}
    with tuning.user_table(path):
        assert tuning.attention_tiles("attention_forward", 64, 32, H200).rows == 32
        assert tuning.is_measured("sm_90")
    assert list(tmp_path.glob("*.part")) == []


def test_a_later_run_keeps_the_rows_it_does_not_measure(tmp_path):
    tune(tmp_path, [Stub([1.0, 0.5], 64)], FakeClock())
    tune(tmp_path, [Stub([1.0, 0.7], 128)], FakeClock())
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["head_dim"]: row["measured"]["ms"] for row in table["attention_forward"]} == {64: 0.5, 128: 0.7}


def test_rows_that_nobody_measured_keep_saying_where_they_are_from(tmp_path):
    shipped = tuning.tables.SHIPPED / "sm_90.json"
    path = tmp_path / "table.json"
    path.write_text(json.dumps(json.loads(shipped.read_text()) | {"format": 1, "arch": "sm_90"}))
    for ms in (0.5, 0.4):
        tune(tmp_path, [Stub([1.0, ms])], FakeClock(), force=True)
    table, before = json.loads(path.read_text()), json.loads(shipped.read_text())
    assert table["provenance"].startswith("Measured by seqcore tune on CPU")
    assert table["provenance"].endswith(f"Rows without times: {before['provenance']}")
    assert table["provenance"].count("Measured by") == 1
    assert len(table["attention_forward"]) == len(before["attention_forward"])
    assert table["attention_decode"] == before["attention_decode"]


def test_a_damaged_table_stops_a_run_that_is_not_forced(tmp_path):
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(tuning.tables.BadTable):
        tune(tmp_path, [Stub([1.0])], FakeClock())
    tune(tmp_path, [Stub([1.0])], FakeClock(), force=True)
    assert json.loads((tmp_path / "table.json").read_text())["arch"] == "sm_90"


def test_force_deletes_no_file_that_is_no_log(tmp_path):
    log, clock = tmp_path / "log.jsonl", FakeClock()
    log.write_text("years of work")
    with pytest.raises(OSError, match=r"log\.jsonl"):
        tune(tmp_path, [Stub([1.0])], clock, force=True)
    assert log.read_text() == "years of work" and not clock.calls


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_refused_before_anything_is_measured(force, tmp_path):
    table, clock = tmp_path / "table.json", FakeClock()
    os.mkfifo(table)
    with pytest.raises(OSError, match=r"table\.json"):
        tune(tmp_path, [Stub([1.0])], clock, force)
    assert table.is_fifo() and not clock.calls and os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize(("torch_ms", "verdict"), [((1.2, 1.0), ["attention"]), ((1.2, 0.9), [])])
def test_no_slower_is_said_of_what_is_so_everywhere(torch_ms, verdict, tmp_path, monkeypatch):
    stubs = [Stub([1.0], size, torch_ms=ms) for size, ms in zip((64, 128), torch_ms, strict=True)]
    monkeypatch.setattr(run, "all_problems", lambda: stubs)
    assert tune(tmp_path, stubs[:1], FakeClock()).no_slower == [], "a verdict on some sizes is none on the others"
    assert tune(tmp_path, stubs, FakeClock()).no_slower == verdict
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["no_slower"] == verdict
    assert table["compared"] == {"attention": {"contest 64": torch_ms[0], "contest 128": torch_ms[1]}}


# --- the command ---------------------------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@no_gpu
def test_without_a_gpu_it_says_what_can_be_done(capsys):
    assert cli.main(["tune", "--out", "table.json"]) == 2
    said = capsys.readouterr().err
    assert "no GPU here" in said and "--dry-run --arch" in said and "--tiny" in said
    assert cli.main(["tune", "--arch", "sm_90"]) == 2
    assert "--dry-run" in capsys.readouterr().err


@no_gpu
def test_a_dry_run_compiles_for_a_gpu_that_is_not_here(monkeypatch, capsys):
    problem = Attention("decode", torch.float16, 128)
    present = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(Attention, "candidates", lambda *_: [present, present | {"BLOCK_N": 256, "num_stages": 4}])
    monkeypatch.setattr(problems, "problems", lambda *_: [problem])
    assert cli.main(["tune", "--dry-run", "--arch", "sm_90", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 would be measured" in printed and "BLOCK_N=16" in printed
    assert "registers" in printed and ahead.TOO_LARGE in printed


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="about the interpreted process")
def test_the_whole_path_interpreted(tmp_path, capsys, monkeypatch):
    out = tmp_path / "table.json"
    assert cli.main(["tune", "--tiny", "--op", "lstm", "--out", str(out)]) == 0
    assert "[2/2] lstm backward float32 H=20 B=3" in capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["arch"] == "interpreter" and "mean nothing" in table["provenance"]
    assert [row["shape"]["backward"] for row in table["recurrence"]] == [False, True]
    assert table["no_slower"] == []

    monkeypatch.setattr(run, "search", lambda *_: pytest.fail("measured again"))
    assert cli.main(["tune", "--tiny", "--op", "lstm", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["recurrence"] == table["recurrence"]
