"""The ledger: a kernel counts as verified only by a run on a GPU with today's sources and no failure."""

import json

import pytest

from benchmarks import ledger
from seqcore.info import kernel_hashes

FORWARD = "recurrence_forward_kernel"


def write(folder, ok=True, interpreter=False, **hashes):
    info = {"device": "a GPU", "interpreter": interpreter, "kernels": kernel_hashes() | hashes}
    rows = [{"kernel": FORWARD, "dtype": "bfloat16", "ok": True}, {"kernel": FORWARD, "dtype": "float32", "ok": ok}]
    (folder / "run-verify.json").write_text(json.dumps({"info": info, "rows": rows}))
    return ledger.verified(folder)


def test_a_run_with_todays_sources_verifies(tmp_path):
    found = write(tmp_path)
    assert found[FORWARD] == ["a GPU (bfloat16, float32; run-verify.json)"]
    assert not found["recurrence_backward_kernel"]


@pytest.mark.parametrize(
    "spoiled",
    [{"ok": False}, {"interpreter": True}, {"grid.py": "another"}, {"recurrence/forward.py": "another"}],
    ids=str,
)
def test_other_runs_do_not(tmp_path, spoiled):
    assert not write(tmp_path, **spoiled)[FORWARD]


def test_a_change_elsewhere_does_not_matter(tmp_path):
    assert write(tmp_path, **{"attention/forward.py": "another"})[FORWARD]


def test_sources_are_followed_through_imports():
    assert {"grid.py", "recurrence/layout.py", "recurrence/products.py"} <= ledger.sources("recurrence/forward.py")
    assert "attention/scores.py" not in ledger.sources("recurrence/forward.py")


def test_every_kernel_is_listed(capsys):
    assert ledger.main() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ledger.kernels()) and FORWARD in ledger.kernels()
