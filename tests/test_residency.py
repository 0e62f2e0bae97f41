"""Programs that wait for each other: no launch has more than run at once, and none counts in another's memory."""

import itertools
from dataclasses import replace

import pytest
import torch
from triton.runtime import OutOfResources

import seqcore
from seqcore import Device, UnsupportedInput
from seqcore.devices import INTERPRETED, pretending
from seqcore.kernels import grid
from seqcore.kernels.recurrence import plan
from seqcore.kernels.recurrence.plan import NoPlan, Shape
from seqcore.ops import layout, sequence
from seqcore.testing.launches import noted_for

from .effort import effort, tried

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="pretends to be on other GPUs")

H200 = Device("sm_90")
# LSTM, H=768, B=16, bfloat16.
KNOWN = Shape(gates=4, units=768, blocks=1, batch=16, directions=1, itemsize=2, backward=False)
# A whole GPU, its slices for several tenants, and less than any team of several programs takes.
MULTIPROCESSORS = (132, 60, 46, 26, 16, 7, 2, 1)
# What someone may ask for by hand.
FORCED = ({}, {"units": 8}, {"units": 16, "rows": 16}, {"rows": 128, "stage": 1}, {"hold": False, "stage": 1})


class Recorder:
    """A kernel that does nothing but remember its launches, and leave its counters as a kernel would."""

    def __init__(self, error=None):
        self.programs, self.counters, self.cleared, self.error = [], [], [], error

    def __getitem__(self, programs):
        def launch(*arguments, **constants):
            if self.error is not None:
                raise self.error
            self.programs.append(programs[0])
            self.counters.append(arguments[-1])
            self.cleared.append(not arguments[-1].any())
            arguments[-1].fill_(7)

        return launch


def launched(made, device, batch, error=None, steps=1):
    """What a launch of the plan comes to on the device."""
    kernel, x = Recorder(error), torch.zeros(steps, batch, 1)
    with pretending(device):
        sequence._launch(kernel, made, x.device, (x,), layout.plain(x, 1))
    return kernel


# --- residency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_no_launch_has_more_programs_than_its_device_holds(multiprocessors):
    device, waiting = Device("sm_90", multiprocessors=multiprocessors), 0
    sizes = itertools.product((1, 4), (31, 640, 1536), (1, 4), effort((16, 300), (1, 16, 100, 300, 5000)), (1, 2))
    for size, backward in itertools.product(sizes, (False, True)):
        shape = Shape(*size, itemsize=2, backward=backward)
        for forced in FORCED:
            tried()
            try:
                with plan.overriding(**forced):
                    made = plan.make(shape, device)
            except NoPlan:
                continue
            if made.slices == 1:
                continue
            waiting += 1
            assert made.shared_memory <= device.shared_memory
            assert max(launched(made, device, shape.batch).programs) <= multiprocessors, (shape, forced, made)
    assert waiting or multiprocessors == 1


def test_a_plan_of_another_device_is_refused_before_anything_starts():
    made, slice_of_it = plan.make(KNOWN, H200), Device("sm_90", multiprocessors=16)
    kernel, x = Recorder(), torch.zeros(1, 16, 1)
    assert launched(made, H200, 16).programs == [48]
    with pretending(slice_of_it), pytest.raises(UnsupportedInput, match=r"48 programs would wait .* the 16 multipro"):
        sequence._launch(kernel, made, x.device, (x,), layout.plain(x, 1))
    assert not kernel.programs
    # By hand, beside what `make` would have derived.
    many = replace(made, teams=3, groups=3)
    with pytest.raises(UnsupportedInput, match=r"144 programs would wait .* leave plan.overriding"):
        launched(many, H200, 48)


def test_what_a_compiled_program_takes_beyond_its_device_is_said_before_it_starts():
    """Registers and threads are known only then; Triton looks before it launches."""
    made = plan.make(KNOWN, H200)
    with pytest.raises(UnsupportedInput, match=r"takes more than a multiprocessor has .*threads.* another backend"):
        launched(made, H200, 16, OutOfResources(512, 384, "threads"))


def lstm(hidden=400, **options):
    return seqcore.nn.LSTM(8, hidden, dtype=torch.bfloat16, backend="triton", **options)


X = torch.zeros(2, 3, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "forced, message",
    [
        ({"units": 16}, r"25 slices of 16 units need .* runs 16; plan.overriding\(units=16\) asks for it.*auto"),
        ({"units": 128, "rows": 128}, r"plan.overriding\(units=128, rows=128\) .* KiB shared memory.*auto"),
    ],
    ids=["programs", "shared memory"],
)
def test_a_forced_plan_that_is_too_large_raises_and_says_what_to_do(forced, message):
    module = lstm()
    with noted_for(Device("sm_90", multiprocessors=16)) as found:
        module(X)
        with plan.overriding(**forced), pytest.raises(UnsupportedInput, match=message):
            module(X)
    assert len(found) == 1


def test_a_plan_forced_between_forward_and_backward_raises_too():
    module = lstm()
    with noted_for(Device("sm_90", multiprocessors=16)) as found:
        out = module(X)[0]
        with plan.overriding(units=16), pytest.raises(UnsupportedInput, match="25 slices of 16 units"):
            out.float().sum().backward()
    assert [launch.name for launch in found] == ["recurrence_forward_kernel"]


@pytest.mark.parametrize("units, rows", [(16, 16), (128, 128)], ids=["programs", "shared memory"])
def test_a_row_of_the_table_that_does_not_fit_is_passed_over(units, rows, monkeypatch):
    """The same architecture is sold, and divided, in many sizes."""
    small = Device("sm_90", multiprocessors=16)
    shape = {name: getattr(KNOWN, name) for name in ("gates", "units", "blocks", "directions", "itemsize", "backward")}
    row = {"shape": shape, "plan": {"rows": rows, "units": units, "tile": 64, "stage": 2, "num_warps": 8}}
    without = plan.make(KNOWN, small)
    monkeypatch.setattr(plan, "table", lambda arch: {"recurrence": [row]})
    assert plan.make(KNOWN, small) == without


# --- counters -------------------------------------------------------------------------------------------------------


def memory(counters):
    """First and last byte of each; that they are apart shows only while all are held."""
    return sorted((c.data_ptr(), c.data_ptr() + c.nbytes) for c in counters)


def assert_apart(counters):
    places = memory(counters)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


def test_every_launch_counts_from_zero_in_memory_of_its_own():
    made = plan.make(replace(KNOWN, batch=600), H200)
    first, second = (launched(made, H200, 600, steps=2) for _ in range(2))
    assert len(first.programs) == made.launches > 1
    assert all(first.cleared) and all(second.cleared)
    assert_apart(first.counters + second.counters)
    for programs, counters in zip(first.programs, first.counters, strict=True):
        assert counters.numel() == programs // made.slices * grid.COUNTER_STRIDE.value


def test_layers_passes_and_calls_in_flight_share_no_counters(monkeypatch):
    """Two layers, called twice before backward, as a graph of several launches would hold them.

    And each launch's are cleared by an operation of its own, on the stream, which a graph repeats at every replay.
    """
    zeros, cleared = torch.zeros, []

    def clear(*arguments, **keywords):
        cleared.append(zeros(*arguments, **keywords))
        return cleared[-1]

    monkeypatch.setattr(sequence.torch, "zeros", clear)
    module = lstm(num_layers=2)
    with noted_for(H200) as found:
        outputs = [module(X)[0] for _ in range(2)]
        torch.autograd.backward([out.float().sum() for out in outputs])
    waiting = [launch.arguments["counter_ptr"] for launch in found if launch.arguments["SLICES"] > 1]
    assert len(waiting) == len(found) == 8
    assert_apart(waiting)
    made = [tensor.data_ptr() for tensor in cleared if tensor.dtype == torch.int32]
    assert made == [counters.data_ptr() for counters in waiting]
