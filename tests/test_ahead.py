"""What is compiled before the benchmarks is what they launch, and several processes share their tests."""

import sys

import pytest

from seqcore.journal import Journal
from seqcore.kernels.tuning import Device
from seqcore.testing.launches import compiled_for

from .benchmark_modules import load, needs_pytest_benchmark, not_interpreted

needs_pytest_benchmark()
not_interpreted("kernels are compiled here")

ahead, shapes, cases = load("ahead"), load("shapes"), load("attention_cases")
GPU = shapes.SIZES["gpu"]
RECURRENCE = shapes.Case("gru", "forward", "grid", 24, 16, 32, 0, "bfloat16")
ATTENTION = cases.AttentionCase("padded", "forward", "bfloat16", 4, 2, 256, 256, 64, causal=True, lengths=(64, 9, 1, 2))
DECODE = cases.AttentionCase("decode", "forward", "bfloat16", 4, 8, 1, 16384, 64)


@pytest.mark.parametrize("case", [RECURRENCE, ATTENTION, DECODE], ids=lambda case: case.sweep)
def test_a_smaller_case_launches_the_same_kernels(case):
    small, hashes = ahead.smaller(case), []
    assert small != case
    for one in (case, small):
        with compiled_for(Device("sm_90")) as found:
            ahead.launch(one, GPU)
        hashes.append({launch.compiled.hash for launch in found})
    assert hashes[0] == hashes[1] and hashes[0]


def test_a_case_that_does_not_compile_does_not_keep_others_from_it(monkeypatch, capsys):
    launched, launch = [], ahead.launch

    def fails_at_first(case, sizes):
        launched.append(case)
        if len(launched) == 1:
            raise RuntimeError("no such kernel")
        launch(case, sizes)

    monkeypatch.setattr(ahead, "launch", fails_at_first)
    ahead.compile_ahead([DECODE, RECURRENCE], GPU, Device("sm_90"))
    assert launched == [DECODE, RECURRENCE]
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_every_case_of_the_suites_is_compiled_once(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda found, sizes, device: compiled.extend(found) or 0)
    for index in range(3):
        ahead.main([*ahead.CASES, "--out", str(tmp_path), "--arch", "sm_90", "--share", f"{index}/3"])
    every = [ahead.smaller(case) for list_cases in ahead.CASES.values() for case in list_cases(GPU)]
    assert len(compiled) == len(set(compiled)) and set(compiled) == set(every)


FILE = """
import pytest

@pytest.mark.parametrize("number", range(7))
def test_it(number):
    with open({ran!r}, "a") as file:
        file.write(f"{{number}} ")
    assert number != 3
"""


def test_processes_share_tests(tmp_path):
    run_tests, file = load("stages.run_tests"), tmp_path / "test_file.py"
    file.write_text(FILE.format(ran=str(tmp_path / "ran")))
    command = ["--journal", str(tmp_path / "journal.jsonl"), "--key", "key", "--jobs", "2", str(file)]
    before = list(sys.path)
    assert run_tests.main(command) == pytest.ExitCode.TESTS_FAILED
    sys.path[:] = before
    assert sorted((tmp_path / "ran").read_text().split()) == sorted("0123456")
    outcomes = [entry["outcome"] for entry in Journal(tmp_path / "journal.jsonl", "key", run_tests.KIND).done.values()]
    assert (outcomes.count("passed"), outcomes.count("failed")) == (6, 1)
