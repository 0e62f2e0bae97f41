"""The campaign's stage under compute-sanitizer, with one that only pretends: clean, faults, a crash, a hang."""

import json
import os
import sys
import textwrap
import time

import pytest
import torch

from seqcore import Device
from seqcore.journal import Journal
from seqcore.testing.launches import noted_for

from .benchmark_modules import load, needs_pytest_benchmark, not_interpreted

needs_pytest_benchmark()
not_interpreted()

from .test_campaign import alive  # noqa: E402

campaign, stages, sanitizer = load("campaign"), load("stages.definitions"), load("stages.run_sanitizer")

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACELESS = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at recurrence_forward_kernel+0x1a30 in forward.py:165
=========     by thread (3,0,0) in block (2,0,0)
=========     Access at 0x7f21c2a00400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f21c2a00000 of size 1,024 bytes
=========
========= Invalid __global__ write of size 2 bytes
=========     at attention_forward_kernel+0x90 in forward.py:80
=========
========= ERROR SUMMARY: 2 errors
"""
OLDER = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x2b0 in /work/backward.py:112:attention_backward_dq_kernel
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= Error: Race reported between Write access at pointwise_kernel+0x5c0 in pointwise.py:30
=========     and Read access at pointwise_kernel+0x740 in pointwise.py:31 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BROKEN = "========= COMPUTE-SANITIZER\nTraceback (most recent call last):\nRuntimeError: no device\n"
PROBLEM = sanitizer.problems()[0]


@pytest.mark.parametrize(
    "tool, text, status, ended, errors, kernel, first",
    [
        ("memcheck", CLEAN, 0, "clean", 0, None, ""),
        ("racecheck", RACELESS, 0, "clean", 0, None, ""),
        ("memcheck", OUT_OF_BOUNDS, 0, "errors", 2, "recurrence_forward_kernel", "Invalid __global__ read of size 2"),
        ("initcheck", OLDER, 0, "errors", 1, "attention_backward_dq_kernel", "Uninitialized __global__ memory read of"),
        ("racecheck", RACE, 0, "errors", 1, "pointwise_kernel", "Error: Race reported between Write access"),
        ("memcheck", OUT_OF_BOUNDS, 1, "errors", 2, "recurrence_forward_kernel", "Invalid __global__ read"),
        ("memcheck", BROKEN, 1, "crashed", None, None, "RuntimeError: no device"),
        ("memcheck", BROKEN + CLEAN, 1, "crashed", 0, None, "========= ERROR SUMMARY: 0 errors"),
        ("memcheck", "", -11, "crashed", None, None, "nothing printed"),
        ("memcheck", "========= COMPUTE-SANITIZER\n", None, "hung", None, None, "========= COMPUTE-SANITIZER"),
    ],
    ids=["clean", "no races", "errors", "older", "race", "errors, failed", "broken", "clean, failed", "gone", "hung"],
)  # fmt: skip
def test_what_it_prints_is_understood(tool, text, status, ended, errors, kernel, first):
    row = sanitizer.read(PROBLEM, tool, text, status, 1.0)
    assert (row.ended, row.errors, row.kernel) == (ended, errors, kernel)
    assert row.first.startswith(first) and bool(row.first) == bool(first)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(code)`` puts a compute-sanitizer on PATH that runs ``code`` with the tool as ``tool``, and notes it."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def install(code):
        folder.mkdir(exist_ok=True)
        path = folder / "compute-sanitizer"
        noted = f"print(tool, os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING'), file=open({str(calls)!r}, 'a'))"
        head = f"#!{sys.executable} -SE\nimport os, sys, time\ntool = sys.argv[sys.argv.index('--tool') + 1]\n{noted}\n"
        path.write_text(head + textwrap.dedent(code))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return lambda: calls.read_text().split("\n")[:-1] if calls.exists() else []

    return install


def run(tmp_path, *more):
    """The stage's command in this process: its status, what came out in words, whether more is left, and its rows."""
    journal = tmp_path / "journal.jsonl"
    status = sanitizer.main(["--journal", str(journal), "--key", "key", "--tiny", *more])
    found = Journal(journal, "key", sanitizer.KIND)
    return status, *sanitizer.summary(found, tiny=True), sanitizer.rows(found)


PRINTS = f"print({CLEAN!r} if tool != 'racecheck' else {RACELESS!r})"


def test_a_clean_run_is_not_repeated(tmp_path, program):
    calls = program(PRINTS)
    status, words, left, rows = run(tmp_path)
    assert (status, words, left) == (0, "4 checked, 0 not clean", False)
    assert [row["tool"] for row in rows] == ["memcheck", "initcheck", "racecheck", "synccheck"]
    assert calls() == ["memcheck 1", "initcheck 1", "racecheck None", "synccheck None"]
    assert run(tmp_path)[:3] == (0, words, False) and len(calls()) == 4


def test_what_it_finds_fails_and_is_told_first(tmp_path, program, capsys):
    program(f"print({OUT_OF_BOUNDS!r} if tool == 'memcheck' else {CLEAN!r})")
    status, words, left, rows = run(tmp_path)
    assert (status, left, len(rows)) == (1, False, 4)
    told = f"first memcheck of {PROBLEM.name}: errors in recurrence_forward_kernel"
    assert words == f"4 checked, 1 not clean, {told}"
    assert "Invalid __global__ read of size 2 bytes" in capsys.readouterr().out


def test_what_crashed_is_tried_again(tmp_path, program):
    program(f"print({CLEAN!r}); sys.exit(tool == 'initcheck')")
    status, words, left, _ = run(tmp_path)
    assert (status, left) == (1, True) and "1 left for another run" in words
    calls = program(PRINTS)
    assert run(tmp_path)[:3] == (0, "4 checked, 0 not clean", False)
    assert calls()[4:] == ["initcheck 1"]


def test_what_hangs_is_ended_with_all_that_it_began(tmp_path, program):
    child = tmp_path / "child"
    program(f"""
        if tool == 'synccheck':
            if not os.fork():
                open({str(child)!r}, 'w').write(str(os.getpid()))
                time.sleep(60)
            time.sleep(60)
        print({CLEAN!r})
    """)
    status, words, left, rows = run(tmp_path, "--case-seconds", "6")
    assert (status, left) == (1, True) and f"first synccheck of {PROBLEM.name}: hung" in words
    assert [row["ended"] for row in rows] == ["clean"] * 3 + ["hung"]
    deadline = time.monotonic() + 10
    while alive(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_that_is_spent_leaves_the_rest_for_another_run(tmp_path, program):
    calls = program(PRINTS)
    assert run(tmp_path, "--seconds", "1")[:3] == (0, "0 checked, 0 not clean; 4 left for another run", True)
    assert not calls()


def test_without_a_sanitizer_the_stage_says_so_and_passes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "find_program", lambda: None)
    assert run(tmp_path) == (0, sanitizer.NOT_HERE, True, [])


@pytest.mark.parametrize("where", ["PATH", "CUDA_HOME", "pip", "nowhere"])
def test_where_it_is_looked_for(where, tmp_path, program, monkeypatch):
    program(PRINTS)
    path = tmp_path / "bin" / "compute-sanitizer"
    if where != "PATH":
        monkeypatch.setenv("PATH", os.devnull)
    if where == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    class Distribution:
        metadata, files = {"Name": "nvidia_cuda_sanitizer_api-cu12"}, ["bin/include.h", "bin/compute-sanitizer"]

        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(sanitizer.metadata, "distributions", lambda: [Distribution()] if where == "pip" else [])
    assert sanitizer.find_program() == (None if where == "nowhere" else str(path))


def test_the_campaign_runs_it_after_verify_and_keeps_its_rows_beside_the_numerics(tmp_path, program):
    names = [stage.name for stage in stages.stages(tmp_path, "key", tiny=True)]
    assert names[:3] == ["tests", "verify", "sanitize"]
    program(f"print({RACE!r} if tool == 'racecheck' else {CLEAN!r})")
    stage = stages.stages(tmp_path, "key", tiny=True)[2]
    outcome = campaign.Campaign(tmp_path, "key", dict(os.environ)).run(stage)
    assert outcome.status == "failed" and "racecheck" in outcome.summary and "pointwise_kernel" in outcome.summary
    (tmp_path / "verify.json").write_text(json.dumps({"rows": [1]}))
    campaign.join_sanitized(tmp_path, "key")
    written = json.loads((tmp_path / "verify.json").read_text())
    assert written["rows"] == [1] and [row["errors"] for row in written["sanitizer"]] == [0, 0, 1, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to be on another GPU")
def test_the_problems_launch_every_kernel_and_what_they_say():
    covered = set()
    for problem in sanitizer.problems():
        with noted_for(Device("sm_90")) as found:
            problem.make(torch.device("cpu"))()
        launched = {launch.name for launch in found}
        assert launched == set(problem.kernels), problem.name
        covered |= launched
    assert covered == set(load("ledger").kernels())
