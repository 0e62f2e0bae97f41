"""The recurrences' own launches, through Triton's binder to machine code, for GPUs that are not here."""

import pytest
import torch

from seqcore import nn
from seqcore.devices import INTERPRETED, pretending
from seqcore.errors import UnsupportedInput
from seqcore.kernels.tuning import Device
from seqcore.testing import launches

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiles for a GPU that is not here")

T, B, I = 3, 5, 24
FORWARD, BACKWARD = "recurrence_forward_kernel", "recurrence_backward_kernel"


def train(op="LSTM", H=96, dtype=torch.bfloat16, lengths=False, reset=False, T=T, **options):
    module = getattr(nn, op)(I, H, dtype=dtype, backend="triton", **options)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    masks = {"lengths": torch.arange(B) % T + 1} if lengths else {}
    masks |= {"reset": torch.rand(T, B) < 0.5} if reset else {}
    module(x, **masks)[0].float().nan_to_num().sum().backward()


CASES = {
    "lstm": ({}, {FORWARD, BACKWARD}),
    "gru over the chip": ({"op": "GRU", "H": 400}, {FORWARD, BACKWARD}),
    "both directions": ({"op": "RNN", "bidirectional": True}, {FORWARD, BACKWARD}),
    "ragged and reset": ({"lengths": True, "reset": True, "grad_clip": 1.0}, {FORWARD, BACKWARD}),
    "recomputed": ({"recompute": True, "dtype": torch.float16}, {FORWARD, BACKWARD, "pointwise_kernel"}),
    "blocks": ({"op": "GRU", "blocks": 2}, {FORWARD, BACKWARD}),
    "float32": ({"dtype": torch.float32}, {FORWARD, BACKWARD}),
    "one step": ({"T": 1}, {"recurrence_step_kernel", BACKWARD}),
}


@pytest.mark.parametrize("case", CASES)
def test_launches_compile(case):
    options, expected = CASES[case]
    device = Device("sm_90")
    with launches.compiled_for(device) as launched:
        train(**options)
    assert {launch.name for launch in launched} == expected
    for launch in launched:
        assert launch.compiled.metadata.shared <= device.shared_memory
        assert launch.grid[0] <= device.multiprocessors


def test_programs_that_wait_for_each_other_are_launched_together():
    with launches.compiled_for(Device("sm_90")) as launched:
        train(H=400)
    forward = launched[0]
    assert forward.arguments["SLICES"] > 1 and forward.arguments["NATIVE"]
    assert forward.compiled.metadata.launch_cooperative_grid


def test_amd_launches_compile():
    with launches.compiled_for(Device("gfx942")) as launched:
        train(dtype=torch.float16)
    assert not launched[0].arguments["NATIVE"]
    assert "v_mfma" in launched[0].compiled.asm["amdgcn"]


def test_lengths_and_batch_do_not_compile_anew():
    hashes = set()
    for steps in (2, 7, 16):
        with launches.compiled_for(Device("sm_90")) as launched:
            train(T=steps)
        hashes.add(tuple(launch.compiled.hash for launch in launched))
    assert len(hashes) == 1


def test_pretending_ends():
    with pretending(Device("sm_90")):
        pass
    with pytest.raises(UnsupportedInput, match="needs a GPU"):
        train()
