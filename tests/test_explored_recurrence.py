"""The sequence kernels with a team's units spread over several programs, under schedules drawn at random."""

import pytest
import torch

import seqcore
from seqcore.devices import INTERPRETED
from seqcore.kernels import grid
from seqcore.kernels.recurrence import backward as backward_kernels
from seqcore.kernels.recurrence import forward as forward_kernels
from seqcore.kernels.recurrence import plan
from seqcore.testing.explorer import Deadlock, explore

from .comparisons import assert_within, cotangents
from .effort import effort, tried
from .mutants import mutant
from .recurrence_twins import differing, masks, ours, packed, problem, results, yardsticks

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="the explorer schedules interpreted programs"),
]

pytest.importorskip("greenlet", reason="greenlet is not installed")

# A night's thousands are in test_explored_schedules.py, whose problems take a quarter of the time.
SEEDS = range(effort(3, 8))
SPREAD = {"rows": 16, "units": 16}

# The cell, sizes and torch's options, options of our own, the form of the input, and what is forced upon the plan.
CASES = {
    "rnn_tanh, two groups": ("rnn_tanh", {"B": 17}, {}, "padded", {}),
    "rnn_relu, packed": ("rnn_relu", {"bidirectional": True}, {}, "packed", {}),
    "gru, masked": ("gru", {"bidirectional": True}, {}, "masked", {}),
    "gru, blocks": ("gru", {"H": 48}, {"blocks": 2, "grad_clip": 0.05}, "padded", {}),
    "gru, streaming": ("gru", {}, {}, "masked", {"hold": False, "stage": 2}),
    "lstm, two groups both ways": ("lstm", {"T": 2, "B": 17, "bidirectional": True}, {}, "padded", {}),
    "lstm, packed in two groups": ("lstm", {"B": 17}, {"recompute": True}, "packed", {}),
    "lstm, blocks streaming": ("lstm", {"H": 48}, {"blocks": 2}, "packed", {"hold": False, "fold": 4}),
    "lstm, swapped": ("lstm", {"H": 50}, {}, "padded", {"swap": True, "stage": 1}),
    "lstm_proj, masked": ("lstm_proj", {}, {}, "masked", {}),
    # In expectation: what training draws would be another at each run.
    "lstm, zoneout": ("lstm", {}, {"zoneout": (0.4, 0.2), "recompute": True, "training": False}, "padded", {}),
}


def case(name):
    """A module on the kernels, its twin, arguments for both, and plan fields."""
    cell, options, own, form, fields = CASES[name]
    twin, x, hx = problem(cell, **{"T": 4, "I": 8, "H": 40, **options})
    if form == "packed":
        x = packed(x, [1 + 2 * b % 4 for b in range(x.shape[1] - 1)] + [4])
    module = ours(twin, "triton", **own)
    return module, ours(module, "reference"), (x, hx), masks() if form == "masked" else {}, {**SPREAD, **fields}


@pytest.mark.parametrize("name", CASES)
def test_results_are_right_and_the_same_bits_under_every_schedule(name):
    module, twin, inputs, keywords, fields = case(name)
    first = None
    for seed in SEEDS:
        with plan.overriding(**fields), explore(seed, weak_memory=seed % 2 == 0) as exploration:
            found = results(module, *inputs, **keywords)
        tried()
        assert exploration.launches == 2 + module.recompute
        first = first or found
        assert not differing(found, first)
    assert_within(first, *yardsticks(twin, *inputs, **keywords))


# --- broken on purpose ----------------------------------------------------------------------------------------------

KERNELS = {
    "forward": (forward_kernels, "recurrence_forward_kernel"),
    "backward": (backward_kernels, "recurrence_backward_kernel"),
}
WAIT = {"forward": "wait(counter_ptr, step * SLICES)", "backward": "wait(counter_ptr, (walked + 1) * SLICES)"}
EARLY = {"forward": "wait(counter_ptr, (step - 1) * SLICES)", "backward": "wait(counter_ptr, walked * SLICES)"}
STORE = {
    "forward": "tl.store(y_ptr + row_offs, new_h, mask=mask)",
    "backward": "store_gates(dh_gates_ptr, rows, GATES * H, columns, H, mask, dh_gates, GATES, ROW)",
}
SIGNAL = "            signal(counter_ptr)\n"


def signal_before_store(kernel, which):
    silent = mutant(kernel, SIGNAL, "            pass\n")
    return mutant(silent, STORE[which], f"signal(counter_ptr)\n        {STORE[which]}")


MUTANTS = {
    "no wait": lambda kernel, which: mutant(kernel, WAIT[which], "pass"),
    "wait that does not wait": lambda kernel, which: mutant(kernel, "while", "if", of=grid.wait),
    "wait for the step before": lambda kernel, which: mutant(kernel, WAIT[which], EARLY[which]),
    "signal before store": signal_before_store,
}
# These are bugs only because stores may be seen late and loads may see the past.
WEAK_MUTANTS = {
    "relaxed signal": lambda kernel, which: mutant(kernel, 'sem="release"', 'sem="relaxed"', of=grid.signal),
    "signal without barrier": lambda kernel, which: mutant(kernel, "tl.debug_barrier()", "pass", of=grid.signal),
    "relaxed wait": lambda kernel, which: mutant(kernel, 'sem="acquire"', 'sem="relaxed"', of=grid.wait),
    "wait without barrier": lambda kernel, which: mutant(kernel, "tl.debug_barrier()", "pass", of=grid.wait),
}
MUTANT_SEEDS = range(effort(4, 8))


def gradients(module, x, hx, outputs):
    """Those of a weighing of ``outputs``, of which the graph is kept."""
    inputs = [x, hx, *module.parameters()]
    found = torch.autograd.grad(outputs, inputs, cotangents(outputs), retain_graph=True)
    return dict(enumerate(found))


def wrong_seeds(monkeypatch, which, mutate, always_weak):
    """Under how many seeds a kernel, once broken, gives other results than it gives whole."""
    twin, x, hx = problem("gru", T=4, I=8, H=40)
    module, x, hx = ours(twin, "triton"), x.requires_grad_(), hx.requires_grad_()

    def run(seed):
        with plan.overriding(**SPREAD), explore(seed, weak_memory=always_weak or seed % 2 == 0):
            return dict(enumerate(module(x, hx))) if which == "forward" else gradients(module, x, hx, outputs)

    with plan.overriding(**SPREAD), explore(0):
        outputs = module(x, hx)
    whole = run(0)
    home, name = KERNELS[which]
    monkeypatch.setattr(home, name, mutate(getattr(home, name), which))
    return sum(bool(differing(run(seed), whole)) for seed in MUTANT_SEEDS)


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("which", KERNELS)
def test_a_broken_kernel_is_wrong_under_nearly_every_schedule(which, name, monkeypatch):
    assert wrong_seeds(monkeypatch, which, MUTANTS[name], always_weak=False) >= len(MUTANT_SEEDS) - 1


@pytest.mark.parametrize("name", WEAK_MUTANTS)
@pytest.mark.parametrize("which", KERNELS)
def test_a_kernel_that_orders_too_little_is_wrong_in_weak_memory(which, name, monkeypatch):
    assert wrong_seeds(monkeypatch, which, WEAK_MUTANTS[name], always_weak=True) >= len(MUTANT_SEEDS) - 1


class OneProgramFewer:
    """A kernel launched without the last program of its grid."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, programs):
        return self.kernel[(programs[0] - 1,)]


@pytest.mark.parametrize("which", KERNELS)
def test_one_program_fewer_is_a_deadlock(which, monkeypatch):
    home, name = KERNELS[which]
    monkeypatch.setattr(home, name, OneProgramFewer(getattr(home, name)))
    module, _, inputs, _, fields = case("lstm, swapped")
    with plan.overriding(**fields), explore(0, patience=200), pytest.raises(Deadlock, match="3 of 3 programs wait"):
        results(module, *inputs)


def test_slices_that_would_wait_forever_are_refused():
    module, x, hx = problem("gru", H=40)
    with plan.overriding(units=16), pytest.raises(seqcore.UnsupportedInput, match="wait for each other forever"):
        ours(module, "triton")(x, hx)
