"""The command line: info, and verify with its exit status."""

import json

import pytest
import torch

import seqcore
from seqcore import cli, functional
from seqcore.devices import INTERPRETED
from seqcore.testing import verify


def test_info_prints_what_each_backend_can_do(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert seqcore.__version__ in printed and torch.__version__ in printed
    assert "lstm: auto takes" in printed and "attention: auto takes" in printed


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["torch"] == torch.__version__
    assert {entry["operation"] for entry in info["backends"]} == {"rnn_tanh", "gru", "lstm", "attention"}


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["frobnicate"])
    assert "frobnicate" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_no_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    sizes = ["--T", "2", "--B", "1", "--H", "4", "--backend", "reference"]
    assert cli.main(["profile", "gru", *sizes, "--out", str(tmp_path / "file" / "under")]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "file" / "under") in said and said.startswith("seqcore profile: ")


def few_cases(monkeypatch):
    """Leave verify one recurrence and one attention, which is enough to see that it judges."""
    recurrences, attentions = verify.recurrences, verify.attentions
    monkeypatch.setattr(verify, "recurrences", lambda device: list(recurrences(device))[-1:])
    monkeypatch.setattr(verify, "attentions", lambda device: list(attentions(device))[:1])


@pytest.mark.kernels
def test_verify_passes_and_writes_its_rows(monkeypatch, tmp_path, capsys):
    few_cases(monkeypatch)
    assert cli.main(["verify", "--out", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {"recurrence_forward_kernel", "attention_forward_kernel"}
    assert {row["dtype"] for row in rows} == {str(d).removeprefix("torch.") for d in verify.dtypes()}
    assert all(row["ok"] for row in rows)
    assert "0 outside the error budget" in capsys.readouterr().out


@pytest.mark.kernels
def test_verify_fails_when_a_kernel_errs(monkeypatch, capsys):
    few_cases(monkeypatch)
    right = functional.attention

    def wrong(*args, backend, **kwargs):
        out, lse = right(*args, backend=backend, **kwargs)
        return (out * 1.01 if backend == "triton" else out), lse

    monkeypatch.setattr(functional, "attention", wrong)
    assert cli.main(["verify"]) == 1
    assert "FAIL out of attention" in capsys.readouterr().out


@pytest.mark.kernels
def test_verify_goes_on_when_a_kernel_raises(monkeypatch, tmp_path, capsys):
    few_cases(monkeypatch)
    right = functional.attention

    def raising(*args, backend, **kwargs):
        if backend == "triton":
            raise SyntaxError("does not compile")
        return right(*args, backend=backend, **kwargs)

    monkeypatch.setattr(functional, "attention", raising)
    assert cli.main(["verify", "--out", str(tmp_path / "rows.json")]) == 1
    found = json.loads((tmp_path / "rows.json").read_text())
    assert not found["left"]
    errors = {row["kernel"]: row["error"] for row in found["rows"] if not row["ok"]}
    assert errors["attention_forward_kernel"] == "SyntaxError: does not compile"
    assert "attention_backward_delta_kernel, attention_backward_dq_kernel" in errors
    assert any(row["ok"] and row["kernel"].startswith("recurrence") for row in found["rows"])
    assert "(SyntaxError: does not compile)" in capsys.readouterr().out


@pytest.mark.kernels
def test_processes_share_what_is_to_be_verified(monkeypatch, tmp_path, capsys):
    case = ["--case", "gru T=4 B=5 H=31 padded" if INTERPRETED else "gru T=33 B=5 H=64 padded"]
    assert cli.main(["verify", *case, "--journal", str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr().out
    # All of it is done by the others.
    monkeypatch.setattr(verify, "_judge", None)
    assert cli.main(["verify", *case, "--jobs", "2"]) == 0
    assert capsys.readouterr().out == alone
    monkeypatch.setattr(verify, "verify", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    assert cli.main(["verify", *case, "--journal", str(tmp_path / "alone"), "--out", str(tmp_path / "rows.json")]) == 3
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"] and found["left"]


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="about the interpreted process")
def test_verify_leaves_out_bfloat16_where_the_interpreter_miscomputes_it():
    assert torch.bfloat16 not in verify.dtypes()
