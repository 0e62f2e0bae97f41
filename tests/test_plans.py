"""How a recurrence will be launched, decided by arithmetic: on devices that need not be there."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch

import seqcore
from seqcore import Device
from seqcore.devices import pretending
from seqcore.kernels.recurrence import plan
from seqcore.kernels.recurrence.plan import NoPlan, Shape
from seqcore.ops import layout, sequence

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
H200 = Device("sm_90")
# LSTM, H=768, B=16, bfloat16: where cuDNN is at its best.
KNOWN = Shape(gates=4, units=768, blocks=1, batch=16, directions=1, itemsize=2, backward=False)


def ceil(count, size):
    return -(-count // size)


def shapes():
    sizes = itertools.product(
        (1, 3, 4, 5), (1, 31, 128, 192, 256, 640, 768, 1024, 1536, 2048, 4096), (1, 4), (1, 16, 64, 100, 256, 5000),
        (1, 2), (2, 4), (False, True),
    )  # fmt: skip
    return [Shape(*size) for size in sizes]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_plan_fits_its_device_and_covers_its_problem(arch):
    device, planned = Device(arch), 0
    for shape in shapes():
        try:
            made = plan.make(shape, device)
        except NoPlan:
            # More barriers' programs than the chip runs: only what has many units is refused.
            assert shape.units * shape.blocks * shape.directions >= 8 * device.multiprocessors, shape
            continue
        planned += 1
        assert made.shared_memory <= device.shared_memory, (shape, made)
        assert (made.slices - 1) * made.units < shape.units <= made.slices * made.units, (shape, made)
        groups = ceil(shape.batch, made.rows)
        assert (made.launches - 1) * made.groups < groups <= made.launches * made.groups, (shape, made)
        assert made.teams == made.groups * shape.directions * shape.blocks, (shape, made)
        if made.slices > 1:
            # Programs that wait for each other run at once.
            assert made.slices * made.teams <= device.multiprocessors, (shape, made)
        for size in (made.rows, made.units, made.tile, made.fold):
            assert size & (size - 1) == 0, (shape, made)
        assert made.rows <= 128 and min(made.rows, made.tile) >= 16 and made.units >= 8, (shape, made)
        assert 1 <= made.stage <= ceil(shape.contraction, made.fold * made.tile), (shape, made)
    assert planned > len(shapes()) / 2


REGIMES = {
    "weights spread over the chip": (KNOWN, "spread"),
    "small enough for one multiprocessor": (replace(KNOWN, units=128), "one program"),
    "small blocks": (replace(KNOWN, units=64, blocks=12), "one program"),
    "too large for the chip": (replace(KNOWN, units=2048), "streaming"),
    "just small enough, both ways": (replace(KNOWN, units=1024, directions=2), "spread"),
    "in float32 too large": (replace(KNOWN, units=1536, itemsize=4), "streaming"),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", REGIMES)
def test_the_regime_follows_from_what_fits(name, backward):
    shape, regime = REGIMES[name]
    assert plan.make(replace(shape, backward=backward), H200).regime == regime


def test_a_known_plan_in_words():
    assert str(plan.make(KNOWN, H200)) == (
        "spread: 48 slices of 16 units x 1 team of 16 rows = 48 programs of 4 warps and 120 KiB shared memory"
    )
    assert ", in 2 launches" in str(plan.make(replace(KNOWN, units=1536, batch=256), H200))


def test_a_smaller_device_spreads_less_or_streams():
    """The same shape, with fewer multiprocessors and with less shared memory."""
    many = replace(KNOWN, batch=64)
    assert plan.make(many, H200).teams == 2
    assert plan.make(many, Device("sm_90", multiprocessors=66)).teams == 1
    assert plan.make(KNOWN, Device("sm_90", multiprocessors=40)).slices == 24
    assert plan.make(KNOWN, Device("sm_90", multiprocessors=20)).regime == "streaming"
    assert plan.make(KNOWN, Device("sm_90", shared_memory=48 << 10)).regime == "streaming"


def test_the_kernel_of_one_step_covers_its_problem():
    for shape in shapes():
        made = plan.make_step(shape, H200)
        assert (made.slices - 1) * made.units < shape.units <= made.slices * made.units, (shape, made)
        assert (made.groups - 1) * made.rows < shape.batch <= made.groups * made.rows, (shape, made)
        assert made.shared_memory <= H200.shared_memory, (shape, made)


@pytest.mark.parametrize("gates", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("padded", [True, False])
def test_gates_are_split_into_powers_of_two(gates, padded):
    first, rest = plan.split(gates, padded)
    assert first & (first - 1) == 0 and rest & (rest - 1) == 0
    assert first + rest >= gates and (rest == 0 or first < gates)
    assert rest == 0 or not padded


def test_interpreted_programs_have_no_slices():
    for shape in shapes():
        assert plan.make(shape, Device("interpreter")).slices == 1


# --- overrides and tables -------------------------------------------------------------------------------------------


def test_overriding_nests_and_restores():
    before = plan.make(KNOWN, H200)
    with plan.overriding(rows=32, stage=2):
        with plan.overriding(units=32, hold=False):
            inner = plan.make(KNOWN, H200)
            assert (inner.rows, inner.units, inner.slices, inner.regime) == (32, 32, 24, "streaming")
            with pytest.raises(TypeError, match="columns"), plan.overriding(columns=3):
                plan.make(KNOWN, H200)
        outer = plan.make(KNOWN, H200)
        assert (outer.rows, outer.units, outer.slices) == (32, 16, 48)
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(plan.make(KNOWN, H200)))
        thread.start()
        thread.join()
    # Autograd runs backward in a thread of its own.
    assert elsewhere == [outer]
    assert plan.make(KNOWN, H200) == before


def test_a_measured_plan_is_taken_for_its_shape_alone(monkeypatch):
    row = {
        "shape": {
            "gates": 4,
            "units": 768,
            "blocks": 1,
            "directions": 1,
            "itemsize": 2,
            "backward": False,
            "batch": 16,
        },
        "plan": {"rows": 16, "units": 32, "tile": 64, "stage": 2, "num_warps": 8},
    }
    monkeypatch.setattr(plan, "table", lambda arch: {"recurrence": [row]} if arch == "sm_90" else {})
    made = plan.make(KNOWN, H200)
    assert (made.units, made.slices, made.tile, made.num_warps, made.stage) == (32, 24, 64, 8, 2)
    assert plan.make(replace(KNOWN, batch=17), H200).units == plan.make(KNOWN, Device("sm_100")).units == 16


# --- launches -------------------------------------------------------------------------------------------------------


class Recorder:
    """A kernel that does nothing but remember its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, programs):
        return lambda *arguments, **constants: self.launches.append((programs, arguments, constants))


@pytest.mark.parametrize("steps, batch", [(1, 1), (3, 128), (3, 129), (3, 256), (3, 600), (70_000, 1)])
def test_launches_cover_each_group_once_and_all_steps(steps, batch):
    made = plan.make(replace(KNOWN, batch=batch), H200)
    kernel, x = Recorder(), torch.zeros(steps, batch, 1)
    with pretending(H200):
        sequence._launch(kernel, made, x.device, (x,), layout.plain(x, 1))
    covered = []
    for programs, arguments, constants in kernel.launches:
        count = constants["groups"]
        covered += range(constants["first_group"], constants["first_group"] + count)
        assert programs == (count * made.slices,) and constants["T"] == steps
        counters = arguments[-1]
        assert counters.numel() == count * 32 and not counters.any()
    assert len(kernel.launches) == made.launches
    assert covered == list(range(ceil(batch, made.rows)))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_no_device_can_run_at_once_is_refused_with_the_reason():
    message = r"2 direction\(s\) x 3 block\(s\) of 9000 units leave more programs, .* the 132 multiprocessors of sm_90"
    with pytest.raises(NoPlan, match=message):
        plan.make(replace(KNOWN, units=9000, blocks=3, directions=2), H200)
    with plan.overriding(units=16), pytest.raises(NoPlan, match="512 slices of 16 units need as many programs at once"):
        plan.make(replace(KNOWN, units=8192), H200)


def test_auto_goes_to_aten_where_there_is_no_plan():
    module = seqcore.nn.LSTM(8, 50_000, device="meta")
    x = torch.zeros(2, 3, 8, device="meta")
    [automatic] = seqcore.explain(module, x, device=H200)
    assert automatic.chosen == "aten"
    module.backend = "triton"
    [named] = seqcore.explain(module, x, device=H200)
    assert named.chosen is None
    for explanation in (automatic, named):
        assert "of 50000 units leave more programs" in explanation.notes["triton"]


def test_explain_shows_both_plans_without_a_gpu():
    module = seqcore.nn.LSTM(768, 768, device="meta", dtype=torch.bfloat16)
    text = str(seqcore.explain(module, torch.zeros(2, 16, 768, device="meta", dtype=torch.bfloat16), device=H200))
    forward, backward = (plan.make(replace(KNOWN, backward=which), H200) for which in (False, True))
    assert f"     forward   {forward}" in text.splitlines()
    assert f"     backward  {backward}" in text.splitlines()
    assert forward.regime == backward.regime == "spread"


@pytest.mark.parametrize("backward", [False, True])
def test_rows_that_are_not_whole_sectors_are_not_pipelined(backward):
    """Else copies go through a cache that is not coherent, and a step may read what stood there before."""
    device = Device("sm_90")
    whole, odd = (plan.make(plan.Shape(4, units, 1, 16, 1, 2, backward), device) for units in (2056, 2052))
    assert whole.regime == odd.regime == "streaming"
    assert whole.stage > 1 and odd.stage == 1
