"""The sequence and step kernels under all kinds of plan: where weights are, which way tiles stand, and their sizes."""

import pytest
import torch

from seqcore.devices import INTERPRETED
from seqcore.kernels.recurrence import plan

from .recurrence_twins import SINGLE, assert_alike, differing, masks, ours, packed, problem, results

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture(autouse=True)
def _exact_products():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# One slice a group, so that these run interpreted; test_explored_recurrence.py has several. What is forced upon the
# plan, and sizes that cross the tiles' borders. B=17 makes two groups of 16 rows.
REGIMES = {
    "h stays inside": ({"rows": 16, "units": 32, "tile": 32}, {"H": 31, "B": 17}),
    "h stays inside, swapped": ({"rows": 16, "units": 32, "tile": 32, "swap": True, "padded": True}, {"H": 31}),
    "tiles": (
        {"rows": 16, "units": 128, "tile": 32, "stage": 1, "fold": 1, "chains": 1, "padded": True}, {"H": 65}
    ),
    "tiles, all staged": (
        {"rows": 16, "units": 128, "tile": 16, "stage": 99, "fold": 4, "chains": 3}, {"H": 100, "B": 1}
    ),
    "tiles, swapped": (
        {"rows": 16, "units": 64, "tile": 16, "stage": 2, "fold": 2, "chains": 2, "swap": True}, {"H": 50, "B": 17}
    ),
    "streaming": ({"hold": False, "rows": 16, "units": 64, "tile": 32, "fold": 1}, {"H": 40, "B": 17}),
    "streaming, swapped": (
        {"hold": False, "rows": 16, "units": 64, "tile": 16, "stage": 1, "fold": 4, "swap": True, "padded": True},
        {"H": 40},
    ),
}  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_padded(cell, regime, device):
    fields, sizes = REGIMES[regime]
    twin, x, hx = problem(cell, **{"T": 2, "I": 8, **sizes}, device=device)
    with plan.overriding(**fields):
        assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize("regime", ["tiles, swapped", "streaming"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_half_precision(cell, regime, device):
    fields, sizes = REGIMES[regime]
    twin, x, hx = problem(cell, **{"T": 2, "I": 8, **sizes}, dtype=torch.float16, device=device)
    with plan.overriding(**fields):
        assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize("form, regime", [("packed", "h stays inside, swapped"), ("masked", "streaming, swapped")])
@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_packed_and_masked(cell, form, regime, device):
    """Rows of a step's mask stand along the other side of a tile if it is swapped."""
    fields, sizes = REGIMES[regime]
    twin, x, hx = problem(cell, **{"T": 4, "I": 8, **sizes}, device=device, bidirectional=True)
    x = packed(x, [2, 4, 1, 4, 3]) if form == "packed" else x
    with plan.overriding(**fields):
        module, reference = ours(twin, "triton"), ours(twin, "reference")
        assert_alike(module, reference, x, hx, **(masks(device) if form == "masked" else {}))


@pytest.mark.skipif(not INTERPRETED, reason="compiled, another order of summation is another compiler's choice")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_staging_and_holding_change_no_bit(cell, device):
    """They decide when weights and states are loaded, and not in which order their products are summed."""
    twin, x, hx = problem(cell, I=8, H=65, device=device)
    module, found = ours(twin, "triton"), []
    for fields in ({"stage": 1}, {"stage": 99}, {"hold": False}):
        with plan.overriding(tile=32, fold=1, chains=1, **fields):
            found.append(results(module, x, hx))
    assert not any(differing(other, found[0]) for other in found[1:])


# --- one step -------------------------------------------------------------------------------------------------------

# In backward a step is a sequence, so that no fewer units than all go with these plans: programs run in turn.
STEPS = {
    "default": {},
    "swapped": {"swap": True, "rows": 16},
    "two products": {"units": 64, "tile": 16, "padded": False, "stage": 1},
    "two products, swapped": {"units": 64, "swap": True, "padded": False},
}


@pytest.mark.parametrize("regime", STEPS)
@pytest.mark.parametrize("cell", SINGLE)
def test_one_step(cell, regime, device):
    """T=1 takes the kernel of both products; I=33 and H=40 cross its tiles' borders."""
    twin, x, hx = problem(cell, T=1, B=17, I=33, H=40, device=device)
    with plan.overriding(**STEPS[regime]):
        assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize(
    "cell, options",
    [("rnn_tanh", {"bidirectional": True}), ("gru", {"bias": False}), ("lstm", {"num_layers": 2}), ("lstm_proj", {})],
    ids=str,
)
def test_one_step_with_options(cell, options, device):
    """Some of these take the kernel of whole sequences."""
    twin, x, hx = problem(cell, T=1, I=8, device=device, **options)
    assert_alike(ours(twin, "triton"), twin, x, hx)


def test_one_step_takes_rows_of_wider_tensors(device):
    twin, x, hx = problem("lstm", T=1, I=8, device=device)
    module = ours(twin, "triton")
    expected = results(module, x, hx)
    wider = [torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]] for t in (x, *hx)]
    assert not differing(results(module, wider[0], tuple(wider[1:])), expected)
