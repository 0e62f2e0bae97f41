"""What is written replaces files and nothing else, and no command deletes what is not its own."""

import os
import re
import stat

import pytest

from seqcore import cli
from seqcore.files import write_whole
from seqcore.journal import Journal, discard
from seqcore.testing import aot

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are of POSIX")


def to_a_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


# Never a device of the machine's: run by root, a mutant would take it away.
NO_FILES = {
    "pipe": (os.mkfifo, stat.S_ISFIFO), "link to a pipe": (to_a_pipe, stat.S_ISFIFO),
    "folder": (os.mkdir, stat.S_ISDIR),
    "loop": (lambda path: path.symlink_to(path.name), None),
}  # fmt: skip


@pytest.fixture(params=NO_FILES)
def no_file(request, tmp_path):
    """A path at which something stands that is no file, and stands there afterwards, too."""
    make, is_it = NO_FILES[request.param]
    path = tmp_path / "rows.json"
    make(path)
    before = sorted(os.listdir(tmp_path)), path.is_symlink()
    yield path
    assert (sorted(os.listdir(tmp_path)), path.is_symlink()) == before
    assert is_it is None or is_it(os.stat(path).st_mode)


def test_what_is_no_file_is_not_replaced(no_file):
    with pytest.raises(OSError, match=re.escape(str(no_file))):
        write_whole(no_file, "{}")


def test_what_is_no_file_is_not_deleted_as_a_journal(no_file):
    with pytest.raises(OSError, match=re.escape(str(no_file))):
        discard(no_file)


def test_a_command_says_so_before_it_begins(no_file, monkeypatch, capsys):
    monkeypatch.setattr(cli.verify, "interpreted", lambda _: pytest.fail("began"))
    assert cli.main(["verify", "--out", str(no_file)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("seqcore verify: ") and str(no_file) in said
    with pytest.raises(SystemExit) as ended:
        aot.main(["--kernel", "pointwise", "--out", str(no_file)])
    assert ended.value.code == 2 and str(no_file) in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(there, tmp_path):
    (tmp_path / "folder").mkdir()
    link, end = tmp_path / "link", tmp_path / "folder" / "end"
    link.symlink_to(end)
    if there:
        end.write_text("before")
    write_whole(link, "after")
    assert link.is_symlink() and not end.is_symlink() and end.read_text() == "after"
    assert os.listdir(tmp_path / "folder") == ["end"]


def test_a_journal_is_deleted_and_no_other_file(tmp_path):
    journal, other, empty = (tmp_path / name for name in ("journal", "other", "empty"))
    Journal(journal, "key", "row").add("first", 1)
    other.write_text('years of work\n{"key": 1}\n')
    empty.touch()
    for path in (journal, empty, tmp_path / "absent"):
        discard(path)
        assert not path.exists()
    with pytest.raises(OSError, match="no journal"):
        discard(other)
    assert other.read_text().startswith("years of work")
