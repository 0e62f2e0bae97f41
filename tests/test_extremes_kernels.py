"""Kernels at the ends of what numbers can say: saturated gates, huge logits, numbers that are nearly nothing."""

from unittest import mock

import numpy as np
import pytest
import torch

from seqcore.devices import INTERPRETED
from seqcore.testing.budget import assert_within_budget

from .attention_twins import assert_like_reference, doubled, kernels, qkv, reference, results, torch_attention
from .comparisons import assert_within, on_another_draw
from .effort import effort, tried
from .recurrence_twins import assert_alike, ours, problem, yardsticks
from .recurrence_twins import results as of_module
from .test_extremes import long_memory

pytestmark = [
    pytest.mark.kernels,
    # NumPy remarks on what the interpreter computes on its way to 0, 1 and infinity.
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]

# What x, the states and the weights are multiplied by.
SCALES = {
    "saturated by the input": (1e3, 1, 1),
    "saturated by the weights": (1, 1, 1e2),
    "the largest input": (1.5e4, 1, 1),
    "the largest state": (1, 1.5e4, 1),
    "nearly nothing": (1e-30, 1e-30, 1),
    "denormal": (1e-40, 1e-40, 1e-3),
    "nothing but tiny": (1e-20, 1e-20, 1e-20),
}
IN_HALF = {"nearly nothing": (1e-6, 1e-6, 1), "denormal": (1e-7, 1e-7, 1e-3), "nothing but tiny": (1e-3, 1e-3, 1e-3)}


def scaled(cell, factors, dtype, device):
    """A recurrence whose input, states and weights are multiplied by ``factors``."""
    twin, x, hx = problem(cell, T=5, B=5, I=8, H=17, dtype=dtype, device=device)
    of_x, of_state, of_weights = factors
    with torch.no_grad():
        for weight in twin.parameters():
            weight *= of_weights
    multiplied = lambda state: tuple(s * of_state for s in state) if isinstance(state, tuple) else state * of_state
    return twin, x * of_x, multiplied(hx)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("name", SCALES)
def test_recurrences_at_every_scale(name, cell, kernel_dtype, device):
    half = kernel_dtype != torch.float32
    factors = IN_HALF.get(name, SCALES[name]) if half else SCALES[name]

    def judge(seed):
        torch.manual_seed(seed)
        twin, x, hx = scaled(cell, factors, kernel_dtype, device)
        found, yards = of_module(ours(twin, "triton"), x, hx), yardsticks(ours(twin, "reference"), x, hx)
        assert all(t.isfinite().all() for t in found.values())
        # Of a saturated gate 16 bits keep a 0 or a 1, and what its gradient then is, is chance.
        judged = [name for name in found if not (half and max(factors) > 1 and name.startswith("gradient"))]
        assert_within(*({name: of[name] for name in judged} for of in (found, *yards)))

    on_another_draw(judge, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_overflows_is_infinite_where_torchs_is(dtype, device):
    """A relu recurrence that grows eightfold a step, past the largest number."""
    steps = 60 if dtype == torch.float32 else 12
    twin, x, hx = problem("rnn_relu", T=steps, B=5, I=4, H=17, dtype=dtype, device=device)
    with torch.no_grad():
        twin.weight_hh_l0.copy_(8 * torch.eye(17))
    with torch.no_grad():
        y, expected = ours(twin, "triton")(x, hx)[0], twin(x, hx)[0]
    assert expected.isinf().any() and expected.isfinite().any()
    assert torch.equal(y.isinf(), expected.isinf()) and torch.equal(y.isnan(), expected.isnan())


def test_nothing_drifts_over_a_long_sequence(device):
    steps = effort(60, 1_000) if INTERPRETED else 100_000

    def judge(seed):
        torch.manual_seed(seed)
        twin, x, hx = long_memory("lstm", steps, device)
        assert_alike(ours(twin, "triton"), ours(twin, "reference"), x, hx)
        tried()

    on_another_draw(judge, 0)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.fixture
def products_alike_either_way_up(monkeypatch):
    """Interpreted products that do not hang on the order in which NumPy adds up, as those of tensor cores do not.

    Backward makes scores anew from transposed tiles. A score of 1e6 that came out a rounding lower than forward's would
    be a tenth less of a probability.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def exact_dot(a, b, acc, *_):
        product = np.matmul(a.data, b.data, dtype=np.float64) + acc.data
        return interpreter.TensorHandle(product.astype(acc.data.dtype), acc.dtype.scalar)

    with mock.patch.object(interpreter.interpreter_builder, "create_dot", exact_dot):
        yield


# Query and key, value, the scale.
MAGNITUDES = {
    "logits of 1e3": (30, 1, None),
    "the largest value": (1, 1.5e4, None),
    "nearly nothing": (1e-6, 1e-6, None),
    "denormal value": (1, 1e-7, None),
    "scale of 1e-30": (1, 1, 1e-30),
    "scale of 1e4 downwards": (0.01, 1, -1e4),
}


@pytest.mark.parametrize("name", MAGNITUDES)
@pytest.mark.usefixtures("products_alike_either_way_up")
def test_attention_at_every_scale(name, kernel_dtype, device):
    of_logits, of_value, scale = MAGNITUDES[name]
    query, key, value = qkv(1, 2, M=17, N=37, D=20, dtype=kernel_dtype, device=device)
    assert_like_reference(query * of_logits, key * of_logits, value * of_value, scale=scale)


@pytest.mark.usefixtures("products_alike_either_way_up")
def test_logits_of_a_million(kernel_dtype, device):
    """Each row hangs on one key, and the gradients of query and key are what roundings leave of nothing."""
    query, key, value = (1e3 * t for t in qkv(1, 2, M=17, N=37, D=20, dtype=kernel_dtype, device=device))
    found = results(kernels, query, key, value)
    eager = results(reference, query, key, value)
    exact = results(reference, *(doubled(t) for t in (query, key, value)))
    for name in ("out", "lse", "gradient of value"):
        assert_within_budget(found[name], exact[name], eager[name], name)


def test_logits_past_the_largest_number_are_nan_where_torchs_are(device):
    query, key, value = qkv(1, 2, M=17, N=37, D=20, device=device)
    query[:, :, 3] *= 1e38
    key *= 1e5
    found, expected = (results(f, query, key, value) for f in (kernels, torch_attention))
    # Of lse torch's attention says nothing.
    assert all(torch.equal(found[name].isnan(), expected[name].isnan()) for name in expected if name != "lse")
    assert found["out"][:, :, 3].isnan().all() and found["out"][:, :, 4].isfinite().all()
