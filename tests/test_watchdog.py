"""SEQCORE_DEBUG=1: a program that would wait forever stops its launch; without it nothing is compiled that could."""

import os
import subprocess
import sys

import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError

from seqcore.devices import INTERPRETED
from seqcore.kernels import floors, grid
from seqcore.kernels.recurrence import backward as backward_kernels
from seqcore.kernels.recurrence import forward as forward_kernels
from seqcore.kernels.recurrence import plan
from seqcore.testing.aot_entry import TARGETS

from .mutants import mutant

interpreted = pytest.mark.skipif(not INTERPRETED, reason="mutants are interpreted")

TOO_LONG = "polled its counter 300 times: what it waits for never signals"


@pytest.fixture
def _watched(monkeypatch):
    monkeypatch.setattr(grid, "WATCHED", tl.constexpr(True))
    monkeypatch.setattr(grid, "MOST_POLLS", tl.constexpr(300))


def barriers(kernel, slices, steps=3):
    counters = torch.zeros(grid.COUNTER_STRIDE.value, dtype=torch.int32)
    kernel[(slices,)](counters, steps, SLICES=slices)
    return counters[0].item()


@pytest.mark.kernels
@interpreted
@pytest.mark.usefixtures("_watched")
def test_programs_that_wait_for_each_other_in_turn_raise():
    assert barriers(floors.barrier_kernel, slices=1) == 3
    with pytest.raises(InterpreterError, match=TOO_LONG):
        barriers(floors.barrier_kernel, slices=2)


@pytest.mark.kernels
@interpreted
@pytest.mark.usefixtures("_watched")
def test_a_barrier_without_its_signal_raises():
    with pytest.raises(InterpreterError, match=TOO_LONG):
        barriers(mutant(floors.barrier_kernel, "signal(counter_ptr)", "pass"), slices=1)


@pytest.mark.kernels
@interpreted
@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize(
    "home, name",
    [(forward_kernels, "recurrence_forward_kernel"), (backward_kernels, "recurrence_backward_kernel")],
    ids=["forward", "backward"],
)
def test_a_sequence_kernel_without_its_signal_raises(home, name, monkeypatch):
    """Side by side, with more patience of the explorer than of the programs themselves."""
    pytest.importorskip("greenlet", reason="greenlet is not installed")
    from seqcore.testing.explorer import explore

    from .recurrence_twins import ours, problem, results

    twin, x, hx = problem("gru", T=2, B=2, I=4, H=20)
    module = ours(twin, "triton")
    silent = mutant(getattr(home, name), "            signal(counter_ptr)\n", "            pass\n")
    monkeypatch.setattr(home, name, silent)
    with plan.overriding(rows=16, units=16), explore(0, patience=3000):
        with pytest.raises(InterpreterError, match=TOO_LONG):
            results(module, x, hx)


# --- ahead of time --------------------------------------------------------------------------------------------------

COMPILED = """
import torch, triton, seqcore
from seqcore.kernels import grid
from seqcore.testing import aot
from seqcore.testing.aot_catalogue import catalogue
from seqcore.testing.launches import compiled_for

def tell(name, target, asm):
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    print(name, target, "stops" if "__assertfail" in text or "s_trap" in text else "waits")

for entry in catalogue():
    if entry.name == "barrier_kernel":
        options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **grid.LAUNCH_OPTIONS}
        target = aot.gpu_target(entry.target)
        compiled = triton.compile(aot.specialised_source(entry), target=target, options=options)
        tell(entry.name, entry.target, compiled.asm)
with compiled_for(seqcore.Device("sm_90")) as launched:
    module = seqcore.nn.RNN(16, 400, dtype=torch.bfloat16, backend="triton").requires_grad_(False)
    module(torch.zeros(2, 3, 16, dtype=torch.bfloat16))
[launch] = launched
tell(launch.name, "launched", launch.compiled.asm)
"""


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiles for GPUs that are not here")
@pytest.mark.parametrize("debug, ends", [("1", "stops"), ("0", "waits")])
def test_what_is_compiled_stops_when_it_has_waited_too_long_only_if_asked_to(debug, ends):
    environment = os.environ | {"SEQCORE_DEBUG": debug}
    command = [sys.executable, "-c", COMPILED]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    told = [*(f"barrier_kernel {target} {ends}" for target in TARGETS), f"recurrence_forward_kernel launched {ends}"]
    assert found.stdout.splitlines() == told
