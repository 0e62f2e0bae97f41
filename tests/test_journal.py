"""What a run finished is found again, whatever happened to it."""

import json
import math
import os
import re
from unittest import mock

import pytest

from seqcore import cli
from seqcore.commands import verify
from seqcore.journal import Journal, forget


def test_what_was_finished_is_found_again(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path, "key", "row")
    assert not journal.done and not path.exists()
    journal.add("first", {"ms": 1.5})
    journal.add("second", [1, 2])
    again = Journal(path, "key", "row")
    assert again.done == {"first": {"ms": 1.5}, "second": [1, 2]}
    assert "first" in again and "third" not in again


def test_other_sources_and_other_kinds_do_not_count(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, "key", "row").add("first", 1)
    assert not Journal(path, "other", "row").done
    assert not Journal(path, "key", "other").done


def test_what_was_begun_and_never_finished_is_suspect(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key", "row")
    for name in ("good", "bad"):
        journal.begin(name)
    journal.add("good", 1)
    again = Journal(path, "key", "row")
    assert again.suspects == {"bad"} and again.done == {"good": 1}


def test_the_last_result_counts(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key", "row")
    journal.add("first", 1)
    journal.add("first", 2)
    assert Journal(path, "key", "row").done == {"first": 2}


def test_a_line_cut_short_loses_only_itself(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "key", "row")
    journal.add("first", 1)
    with path.open("a") as file:
        file.write(json.dumps({"key": "key", "kind": "row", "name": "torn", "value": 1})[:-4])
    again = Journal(path, "key", "row")
    again.add("second", 2)
    assert Journal(path, "key", "row").done == {"first": 1, "second": 2}


def test_what_is_to_be_forgotten_is(tmp_path):
    path = tmp_path / "journal.jsonl"
    for kind in ("row", "stage"):
        journal = Journal(path, "key", kind)
        journal.add("first", 1)
        journal.begin("second")
    forget(path, lambda kind, name: kind == "row")
    assert not Journal(path, "key", "row").done and not Journal(path, "key", "row").suspects
    assert Journal(path, "key", "stage").done == {"first": 1}


STRANGE = (
    b"[" * 10**5, b"[1, 2]", b"3", b'{"key": "key"}', b'{"key": "key", "kind": "row", "name": ["first"], "value": 1}',
    b'{"key": 1, "kind": "row", "name": "x", "value": 1}', b"\xff\xfe\x00", b'{"name": "\xff"}', b"NaN",
)  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE, ids=lambda line: str(line[:30]))
def test_a_line_that_is_no_entry_loses_only_itself(tmp_path, strange):
    path = tmp_path / "journal.jsonl"
    Journal(path, "key", "row").add("first", math.nan)
    with path.open("ab") as file:
        file.write(strange + b"\n")
    Journal(path, "key", "row").add("second", 2)
    done = Journal(path, "key", "row").done
    assert done.keys() == {"first", "second"} and math.isnan(done["first"])
    forget(path, lambda kind, name: name == "first")
    assert Journal(path, "key", "row").done == {"second": 2}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, capsys):
    path = tmp_path / "journal.jsonl"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(OSError, match=re.escape(str(path))):
        Journal(path, "key", "row")
    with mock.patch.object(verify, "INTERPRETED", True):
        assert cli.main(["verify", "--journal", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
