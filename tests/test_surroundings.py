"""Old GPUs, no Triton, another Triton, an older torch: what can be served is, and of the rest it is said why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqcore
from seqcore import Device, UnsupportedInput, capabilities, cli, functional, info, versions
from seqcore.devices import INTERPRETED, pretending

from .effort import NIGHTLY

TOO_OLD = ("sm_60", "sm_70", "sm_75")
NOT_COMPILED_FOR = ("gfx906", "gfx908", "gfx1030", "gfx1100", "gfx1201")
REASONS = dict.fromkeys(TOO_OLD, "needs compute capability 8.0 or newer") | dict.fromkeys(
    NOT_COMPILED_FOR, "needs one of gfx90a, gfx942, gfx950"
)


def attended(**options) -> torch.Tensor:
    q = torch.ones(1, 2, 3, 4, requires_grad=True)
    out = functional.attention(q, q, q, **options)
    out.sum().backward()
    return out.detach()


def recurred(**options) -> torch.Tensor:
    torch.manual_seed(0)
    y, _ = seqcore.nn.LSTM(3, 5, **options)(torch.ones(4, 2, 3))
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("arch", REASONS)
def test_a_gpu_without_kernels_is_served_by_others_and_it_is_said_why(arch, monkeypatch, capsys):
    expected = attended(), recurred()
    # Of such a GPU there is only the name: the tensors are on the CPU.
    with pretending(Device(arch)):
        assert torch.equal(attended(), expected[0]) and torch.equal(recurred(), expected[1])
        # Not to be had from torch either.
        assert attended(softcap=2.0).isfinite().all()
        for run in (attended, recurred):
            with pytest.raises(UnsupportedInput) as refused:
                run(backend="triton")
            said = str(refused.value)
            assert f"{REASONS[arch]}, got {arch}" in said and "Pass backend='auto'" in said and "aten: can" in said
    (explanation,) = seqcore.explain(attended, device=Device(arch))
    assert explanation.chosen == "aten" and REASONS[arch] in explanation.notes["triton"]
    monkeypatch.setattr(info.devices, "describe", lambda _device: Device(arch))
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.count(f"no: {REASONS[arch]}, got {arch}") == len(info.OPERATIONS)
    if not INTERPRETED:
        assert cli.main(["precompile", "lstm", "--arch", arch, "--T", "2", "--H", "16"]) == 2
        assert REASONS[arch] in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", *capabilities.AMD])
def test_a_gpu_with_kernels_is_served(arch):
    (explanation,) = seqcore.explain(lambda: functional.attention(*[torch.ones(1, 2, 3, 4)] * 3), device=Device(arch))
    assert "needs" not in explanation.notes["triton"]


@pytest.mark.parametrize("arch, number", [("sm_90a", "sm_90"), ("sm_100f", "sm_100"), ("sm_75a", "sm_75")])
def test_a_gpu_by_its_compilers_name_is_the_gpu(arch, number):
    assert Device(arch) == Device(number)
    [named], [numbered] = (seqcore.explain(attended, device=Device(name)) for name in (arch, number))
    assert str(named) == str(numbered)


@pytest.mark.parametrize("arch", ["sm_", "sm_9", "sm_x", "sm_90-a", "sm_90ab", "sm_9.0", "sm_٩٠", "sm_90\n"])
def test_what_names_no_gpu_is_refused(arch):
    with pytest.raises(ValueError, match="such as 'sm_90'"):
        Device(arch)


VERSIONS = {
    ("2.11.0", "3.6.0"): (),
    ("2.13.0+cpu", "3.7.1"): (),
    ("2.15.0a0+git1234", "3.9.0"): (),
    ("2.13.0", None): ("needs Triton, which is not installed: pip install 'triton>=3.6'",),
    ("2.13.0", "3.5.1"): ("needs Triton 3.6 or newer, got 3.5.1",),
    ("2.13.0", "2.10.0"): ("needs Triton 3.6 or newer, got 2.10.0",),
    ("2.13.0", "3.10.0"): (),
    ("2.10.1", "3.6.0"): ("needs torch 2.11 or newer, got 2.10.1",),
    ("2.4.0", "3.0.0"): ("needs Triton 3.6", "needs torch 2.11"),
    ("nightly", "unknown"): (),
}  # fmt: skip


@pytest.mark.parametrize("of_torch, of_triton", VERSIONS)
def test_which_versions_will_do(of_torch, of_triton):
    reasons = versions.why_no_kernels(of_torch, of_triton)
    assert len(reasons) == len(VERSIONS[of_torch, of_triton])
    assert all(said in reason for said, reason in zip(VERSIONS[of_torch, of_triton], reasons, strict=True))


def test_the_oldest_versions_are_those_that_are_required():
    stated = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'"torch>={versions._named(versions.OLDEST_TORCH)}"' in stated
    assert f'"triton>={versions._named(versions.OLDEST_TRITON)};' in stated
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text()
    assert f"\ntorch=={versions._named(versions.NEWEST_TORCH)}." in pins
    assert f"\ntriton=={versions._named(versions.NEWEST_TRITON)}." in pins


def test_versions_newer_than_any_tested_are_used_and_named(monkeypatch, capsys):
    assert not versions.untested("2.11.0", "3.7.9") and not versions.untested("2.9", None)
    monkeypatch.setattr(versions, "TRITON", "3.10.0")
    assert not versions.why_no_kernels("2.13.0", "3.10.0")
    assert cli.main(["info"]) == 0
    assert "Triton 3.10.0 is newer than 3.7, the newest that seqcore was tested with" in capsys.readouterr().out


def test_the_version_is_known_without_an_import(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    assert versions.TRITON == triton.__version__
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "triton").mkdir()
    for text, version in (("__version__ = '3.5.1'\n1 / 0", "3.5.1"), ("1 / 0", "unknown")):
        (tmp_path / "triton" / "__init__.py").write_text(text)
        assert versions.triton_version() == version


# --- in processes of their own -----------------------------------------------------------------------------------

SESSION = """
import torch, seqcore
from seqcore import Device, UnsupportedInput, cli
from seqcore.devices import pretending

reason = {reason!r}
lstm, x = seqcore.nn.LSTM(3, 5), torch.randn(4, 2, 3)
q = torch.randn(1, 2, 3, 4, requires_grad=True)
attend = lambda **options: seqcore.functional.attention(q, q, q, **options)
def runs():
    lstm(x)[0].sum().backward()
    attend().sum().backward()
    attend(softcap=2.0).sum().backward()
runs()
for arch in ("sm_90", "gfx942"):
    with pretending(Device(arch)):
        runs()
        for call in (lambda: attend(backend="triton"), lambda: attend(softcap=2.0, backend="triton")):
            try:
                call()
            except UnsupportedInput as refused:
                assert reason in str(refused) and "Pass backend='auto'" in str(refused), refused
            else:
                raise AssertionError("a backend that was named gave way")
    for explanation in seqcore.explain(runs, device=Device(arch)):
        assert explanation.chosen != "triton" and reason in explanation.notes["triton"], explanation
cli.info.info.devices.describe = lambda device: Device("sm_90")
assert cli.main(["info"]) == 0
"""
COMMANDS = """
for line in ("precompile gru --arch sm_90", "tune --dry-run --arch sm_90", "tune --tiny --out t.json", "verify"):
    assert cli.main(line.split()) == 2, line
"""
# What comes before it, a module in the place of Triton, and the reason that is to be given.
SURROUNDINGS = {
    "no Triton": ("import sys; sys.modules['triton'] = None", None, "needs Triton, which is not installed: pip"),
    "an old Triton": ("", "__version__ = '3.5.1'\n1 / 0", "needs Triton 3.6 or newer, got 3.5.1: pip"),
    "a broken Triton": (
        "", "__version__ = '3.7.1'\nraise OSError('libtriton.so: no such file')",
        "Triton 3.7.1 is installed and cannot be imported (OSError: libtriton.so: no such file): install it anew",
    ),
    "an old torch": ("import torch; torch.__version__ = '2.9.1+cu1'", None, "needs torch 2.11 or newer, got 2.9.1+cu1"),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="here Triton is imported already")
@pytest.mark.parametrize(
    "name",
    # What the others come to is one list of reasons, which is tested above.
    [pytest.param(name, marks=pytest.mark.skipif(name.startswith("an ") and not NIGHTLY, reason="nightly"))
     for name in SURROUNDINGS],
)  # fmt: skip
def test_without_what_kernels_need_all_else_works(name, tmp_path):
    before, module, reason = SURROUNDINGS[name]
    if module is not None:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(module)
        before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    script = before + SESSION.format(reason=reason) + COMMANDS
    environment = {**os.environ, "SEQCORE_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"no: {reason}") == len(info.OPERATIONS)
    assert done.stderr.count(reason) == 4 and "Traceback" not in done.stderr
