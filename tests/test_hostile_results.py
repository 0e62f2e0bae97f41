"""Results that somebody else wrote: their readers name the file, and no command ends in a traceback."""

import json
import os
from pathlib import Path

import pytest

from seqcore.files import read_json

pytest.importorskip("matplotlib", reason="reports draw with it")
from benchmarks import compare, ledger, report
from benchmarks.__main__ import main as measure
from benchmarks.rows import Results
from benchmarks.study import report as study

ROW = {
    "suite": "recurrence", "op": "lstm", "pass": "forward", "dtype": "float32", "shape": {"T": 1, "B": 1}, "peers": {},
    "ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0,
}  # fmt: skip


def rows(**changes) -> bytes:
    return json.dumps({"benchmarks": [{"name": "row", "extra_info": ROW | changes}]}).encode()


CONTENTS = {
    "nothing": b"", "a bomb": b"[" * 10**5, "no text": b"\xff\x00", "a number": b"3", "a list": b"[[1]]",
}  # fmt: skip
ROWS = {
    "rows that are no list": b'{"benchmarks": 3}', "rows that are no objects": b'{"benchmarks": [3]}',
    "rows without figures": b'{"benchmarks": [{"extra_info": {"suite": "recurrence"}}]}',
    "figures that are text": rows(ms_p50="1.0"), "a shape that is a list": rows(shape=[1]),
    "peers that are none": rows(peers=None),
    "a suite that is none": rows(suite=["recurrence"]),
    "a machine that is none": b'{"benchmarks": [], "seqcore": {"machine": 3}}',
}  # fmt: skip


def test_rows_that_are_whole_are_read(tmp_path):
    path = tmp_path / "bench.json"
    path.write_bytes(rows())
    assert Results.load(path).rows[0].ms == 1.0


@pytest.mark.parametrize("content", [*CONTENTS, *ROWS])
def test_a_strange_result_is_named(content, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_bytes((CONTENTS | ROWS)[content])
    with pytest.raises(ValueError, match=r"run\.json"):
        Results.load(path)
    assert report.main([str(path), "--no-plots"]) == 1 and compare.main([str(path), str(path)]) == 2
    assert capsys.readouterr().err.count("run.json") == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
def test_what_is_no_result_of_theirs_is_neither_replaced_nor_deleted(tmp_path, capsys):
    runs, pipe, journal = tmp_path / "run.json", tmp_path / "pipe", tmp_path / "journal.jsonl"
    runs.write_bytes(rows())
    os.mkfifo(pipe)
    assert compare.main([str(runs), str(runs), "--force", "--out", str(pipe)]) == 2
    journal.write_text("years of work")
    assert measure(["--sizes", "tiny", "--out", str(tmp_path)]) == 2
    assert pipe.is_fifo() and journal.read_text() == "years of work"
    said = capsys.readouterr().err
    assert str(pipe) in said and str(journal) in said


@pytest.mark.parametrize("content", CONTENTS)
def test_so_it_is_in_the_ledger_and_the_study(content, tmp_path):
    for name, read in (("verify.json", ledger.runs), (f"{study.NAMES[0]}.json", study.read)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(CONTENTS[content])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
def test_a_pipe_is_no_result(tmp_path):
    path = Path(tmp_path, "bench.json")
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"bench\.json is not JSON: it is no regular file"):
        read_json(path)
