"""The command line: info, and verify with its exit status."""

import json
import os
import re
import sys
from unittest import mock

import pytest
import torch

import seqcore
from seqcore import backends, cli, functional
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


LARGE = "99999999999999999999"
# Of bytes more than any address space has, and more than can be counted.
TOO_MANY = ["--T", "2147483647", "--B", "1024"], ["--T", "2147483647", "--B", "2147483647"]
MISTAKES = {
    "a size beyond all numbers": (["profile", "lstm", "--T", LARGE], f"T must be a positive number .*{LARGE}"),
    "a window beyond all numbers": (["profile", "attention", "--causal", "--window", LARGE], "window must be"),
    "no such memory": (["profile", "gru", "--H", "4", "--I", "768", *TOO_MANY[0]], "not enough memory"),
    "no such numbers": (["profile", "gru", "--H", "4", "--I", "768", *TOO_MANY[1]], "not enough memory"),
    "no repeats": (["profile", "gru", "--repeats", "0"], "repeats must be a positive number, got 0"),
    "a share of nothing": (["verify", "--share", "0/2"], "--share needs --journal"),
    "a share and no journal": (["verify", "--share", "0/2", "--jobs", "2"], "--share needs --journal"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line(mistake, tmp_path, monkeypatch, capsys):
    arguments, words = MISTAKES[mistake]
    monkeypatch.setattr(cli.verify, "interpreted", lambda _: pytest.fail("began"))
    out = ["--out", str(tmp_path / "profile")] if arguments[0] == "profile" else []
    assert cli.main([*arguments, *out]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.match(f"seqcore {arguments[0]}: .*{words}", said), said


def test_a_backend_of_the_environments_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_ENVIRONMENT", "garbage")
    for name, command in cli.COMMANDS.items():
        monkeypatch.setattr(command, "run", lambda _: 0)
        assert cli.main([name, *["gru"] * (name in ("profile", "precompile"))]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"seqcore {name}: unknown SEQCORE_BACKEND: got 'garbage'")


LACKING = torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError(), OSError(11, "busy")


@pytest.mark.parametrize("error", LACKING)
def test_what_the_machine_has_not_is_told_in_a_line(error, monkeypatch, capsys):
    monkeypatch.setattr(cli.info.info, "gather", mock.Mock(side_effect=error))
    assert cli.main(["info"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type"), ValueError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(cli.info.info, "gather", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        cli.main(["info"])
    assert raised.value is error


def nobody_reads():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def no_room():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


NOWHERE = {"nobody reads": (nobody_reads, 141, 0), "a full disk": (no_room, 2, 1)}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=" ".join)
@pytest.mark.parametrize("where", NOWHERE)
def test_output_that_cannot_be_written(where, arguments, monkeypatch, capsys):
    make, status, lines = NOWHERE[where]
    # That it can be closed says that Python, too, finds nothing left to write as it ends.
    with make() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(arguments) == status
    monkeypatch.undo()
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="about the interpreted process")
def test_interpreted_kernels_are_not_precompiled(capsys):
    assert cli.main(["precompile", "lstm", "--arch", "sm_90", "--H", "16"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.kernels
@pytest.mark.parametrize("option", ["--journal", "--out"])
def test_verify_is_told_first_where_nothing_can_be_written(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["verify", option, str(tmp_path / "file" / "under")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in said


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
