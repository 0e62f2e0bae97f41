"""The programs in docs/examples do what they say."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it)

import seqcore
from seqcore.testing import check_cell

from .process_group import SMALL, TORCHRUN

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def load(name: str):
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


@triton.jit
def forgets_the_direct_path(saved, state, new_state, dstate):
    f, n, h_n = saved
    dn = dstate[0] * f * (1.0 - n * n)
    df = (dstate[0] * (n - state[0]) + dn * h_n) * f * (1.0 - f)
    return (df, dn), (df, dn * f), (dstate[0] * 0.0,)


@pytest.mark.kernels
def test_minimal_gated_unit(capsys):
    example = load("minimal_gated_unit")
    example.main(hidden=20)
    assert "kernels equal the reference" in capsys.readouterr().out
    wrong = dataclasses.replace(example.MGU, name="forgetful", step_backward=forgets_the_direct_path)
    with pytest.raises(AssertionError, match=r": d\w+ .* outside the error budget"):
        check_cell(wrong, hidden=20)


def test_cached_generation(capsys, monkeypatch):
    example = load("cached_generation")
    example.main()
    assert "the tokens equal those computed again" in capsys.readouterr().out
    rotate = example.RotaryPositions.forward
    monkeypatch.setattr(example.RotaryPositions, "forward", lambda module, x, start: rotate(module, x, 0))
    with pytest.raises(AssertionError):
        example.main()


def test_long_sequence(tmp_path):
    command = (*TORCHRUN, str(EXAMPLES / "long_sequence.py"))
    done = subprocess.run(command, env=os.environ | SMALL, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 256 positions: attention equals one process's" in done.stdout
    assert "2 layers, 8 chunks: gradients equal one process's" in done.stdout


def test_gradient_penalty(capsys, monkeypatch):
    example = load("gradient_penalty")
    example.main()
    assert "the loss fell, and the slope is near 1" in capsys.readouterr().out
    slopes = example.slopes
    monkeypatch.setattr(example, "slopes", lambda critic, x: slopes(critic, x).detach())
    with pytest.raises(AssertionError, match="did not learn"):
        example.main()


def test_replace_in_place(capsys, monkeypatch):
    example = load("replace_in_place")
    example.main()
    out = capsys.readouterr().out
    assert "+ reader     torch.nn.LSTM -> seqcore.nn.LSTM" in out
    assert "the parameters equal those of training without the swap" in out
    forward = seqcore.nn.LSTM.forward
    monkeypatch.setattr(seqcore.nn.LSTM, "forward", lambda module, x: (2 * forward(module, x)[0],))
    with pytest.raises(AssertionError, match="reader"):
        example.main()
