"""The plugin by which a run of tests or benchmarks goes on where another stopped."""

import json
import os
import subprocess
import sys
import types

import pytest

from seqcore.journal import Journal

from .benchmark_modules import ROOT, load

FILE = """
import os
import pathlib
import pytest

def note(name):
    with open("ran", "a") as file:
        file.write(name + " ")

def test_hangs():
    note("hangs")
    if pathlib.Path("hang").exists():
        os._exit(9)

def test_passes():
    note("passes")

def test_fails():
    note("fails")
    assert not pathlib.Path("fail").exists(), "told to"

def test_skips():
    pytest.skip("for a reason")

@pytest.mark.xfail(strict=True)
def test_is_expected_to_fail():
    note("xfails")
    assert False

def test_breaks():
    note("breaks")
    if pathlib.Path("break").exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_comes_last():
    note("last")
"""
RUN = """
import pathlib, sys, pytest
from benchmarks.resume import Resume
from seqcore.journal import Journal
journal = Journal(pathlib.Path("journal.jsonl"), "key", "test")
sys.exit(pytest.main(["-q", "test_file.py"], plugins=[Resume(journal)]))
"""


@pytest.fixture
def run(tmp_path):
    """Run the file; the exit status, and which tests ran, in their order."""
    (tmp_path / "test_file.py").write_text(FILE)

    def run(*conditions: str) -> tuple[int, list[str]]:
        for name in ("hang", "fail", "break"):
            (tmp_path / name).unlink(missing_ok=True)
            if name in conditions:
                (tmp_path / name).touch()
        (tmp_path / "ran").write_text("")
        # The checkout last, behind the installed packages, whose `kernels` is another's.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", RUN]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        return done.returncode, (tmp_path / "ran").read_text().split()

    return run


def entries(tmp_path) -> dict[str, dict]:
    found = Journal(tmp_path / "journal.jsonl", "key", "test").done
    return {name.rpartition("::test_")[2]: entry for name, entry in found.items()}


def test_only_what_did_not_pass_runs_again(run, tmp_path):
    assert run("fail") == (1, ["hangs", "passes", "fails", "xfails", "breaks", "last"])
    assert entries(tmp_path)["fails"]["outcome"] == "failed"
    assert "told to" in entries(tmp_path)["fails"]["reason"]
    assert entries(tmp_path)["skips"] == {"outcome": "skipped", "reason": "for a reason"}
    assert entries(tmp_path)["is_expected_to_fail"]["reason"].startswith("expected to fail")
    assert run() == (0, ["fails"])
    assert run() == (pytest.ExitCode.NO_TESTS_COLLECTED, [])


def test_what_is_left_is_known(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", "key", "test")
    resume = load("resume").Resume(journal)
    items = [types.SimpleNamespace(nodeid=name) for name in ("first", "second", "third")]
    journal.add("first", {"outcome": "passed"})
    config = types.SimpleNamespace(hook=types.SimpleNamespace(pytest_deselected=lambda items: None))
    resume.pytest_collection_modifyitems(config, items)
    journal.add("second", {"outcome": "failed"})
    assert resume.left == ["third"]


def test_what_began_and_never_ended_comes_last(run, tmp_path):
    assert run("hang") == (9, ["hangs"])
    assert run("hang") == (9, ["passes", "fails", "xfails", "breaks", "last", "hangs"])
    assert run()[1] == ["hangs"]
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["value"]["outcome"] == "passed"


def test_a_broken_gpu_ends_the_process(run):
    # What comes after would fail of it, too.
    assert run("break") == (pytest.ExitCode.INTERRUPTED, ["hangs", "passes", "fails", "xfails", "breaks"])
    assert run() == (0, ["last", "breaks"])


@pytest.mark.parametrize("answers", [True, False])
def test_a_broken_gpu_is_known_whatever_is_said(monkeypatch, answers):
    def synchronize():
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    assert load("resume").is_broken("Triton Error [CUDA]: an illegal memory access was encountered") is not answers
