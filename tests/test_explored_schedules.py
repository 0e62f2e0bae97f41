"""Small problems under thousands of schedules, in all cells and forms: what a night has time for.

The larger ones, and the mutants of sequence kernels, are in ``test_explored_recurrence.py``.
"""

import pytest
import torch

from seqcore import cells
from seqcore.devices import INTERPRETED
from seqcore.kernels import floors, grid
from seqcore.kernels.recurrence import plan
from seqcore.profiling.exchange import Exchange, run_barrier
from seqcore.testing.cases import LAYOUTS, ZONED, recurrence_case
from seqcore.testing.explorer import explore
from seqcore.testing.verify import compute, yardsticks

from .comparisons import assert_within
from .effort import effort, tried
from .mutants import mutant
from .recurrence_twins import differing
from .test_cells import COUPLED, MGU

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="the explorer schedules interpreted programs"),
]

pytest.importorskip("greenlet", reason="greenlet is not installed")

# Tests of their own, so that several processes share them; a usual run takes a few of the cases, one seed each.
CHUNKS = range(effort(1, 4))
SEEDS_A_CHUNK = effort(2, 12)

# H and blocks for two programs a team, or one in each of two, and what else is forced upon the plan.
PLANS = {
    "held": (20, 1, {}),
    "swapped": (20, 1, {"swap": True, "stage": 1}),
    "streaming": (24, 1, {"hold": False, "stage": 2}),
    "three slices": (40, 1, {}),
    "blocks": (40, 2, {"fold": 2}),
}
CELLS = {cell.name: cell for cell in (cells.RNN_TANH, cells.GRU, cells.LSTM, MGU, COUPLED)}


def cases():
    """Every cell in every form of input; every cell with every plan; zoneout is for torch's cells."""
    for name, cell in CELLS.items():
        yield from ((name, layout, "held") for layout in LAYOUTS)
        yield from ((name, "padded", chosen) for chosen in PLANS if chosen != "held")
        if cell in cells.BUILT_IN:
            yield (name, ZONED, "held")


CASES = list(cases())
USUAL = [CASES[i] for i in range(0, len(CASES), 11)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name, layout, chosen", effort(USUAL, CASES), ids=lambda value: str(value))
def test_results_are_right_and_the_same_bits_under_every_schedule(name, layout, chosen, chunk):
    hidden, blocks, fields = PLANS[chosen]
    case = recurrence_case(CELLS[name], 3, 2, 4, hidden, blocks, layout, torch.device("cpu"), directions=1)
    inputs, exact, eager = yardsticks(case, torch.float32)
    first = None
    for seed in range(chunk * SEEDS_A_CHUNK, (chunk + 1) * SEEDS_A_CHUNK):
        with plan.overriding(rows=16, units=16, **fields), explore(seed, weak_memory=seed % 2 == 0) as exploration:
            found = compute(case, inputs, "triton")
        tried()
        assert exploration.launches >= 2 and exploration.switches > 100
        first = first or found
        assert not differing(found, first)
    assert_within(first, exact, eager)


# --- the kernels that measure what waiting costs --------------------------------------------------------------------

EXCHANGE = Exchange(slices=3, teams=2, rows=2, width=72, share=24, num_warps=4)
STEPS = 4


def exchanged(seed):
    torch.manual_seed(seed)
    rows = EXCHANGE.rows_of(STEPS, "cpu")
    with explore(seed, weak_memory=seed % 2 == 0):
        EXCHANGE.run(rows, STEPS)
    return rows


@pytest.mark.parametrize("chunk", CHUNKS)
def test_exchanges_and_barriers_are_right_under_every_schedule(chunk):
    for seed in range(chunk * SEEDS_A_CHUNK, (chunk + 1) * SEEDS_A_CHUNK):
        EXCHANGE.check(exchanged(seed))
        with explore(seed):
            counters = run_barrier(3, 2, STEPS, "cpu")
        assert counters.view(2, -1)[:, 0].tolist() == [3 * STEPS] * 2
        tried(2)


@pytest.mark.parametrize(
    "old, new, function",
    [
        ("wait(counter_ptr, (step + 1) * SLICES)", "pass", None),
        ('sem="release"', 'sem="relaxed"', grid.signal),
        ('sem="acquire"', 'sem="relaxed"', grid.wait),
    ],
    ids=["no wait", "relaxed signal", "relaxed wait"],
)
def test_a_broken_exchange_is_found(old, new, function, monkeypatch):
    kernel = floors.exchange_kernel
    monkeypatch.setattr(floors, "exchange_kernel", mutant(kernel, old, new, of=function or kernel))
    wrong = 0
    for seed in range(0, 12, 2):
        try:
            EXCHANGE.check(exchanged(seed))
        except AssertionError:
            wrong += 1
    assert wrong >= 5
