"""Kernels at the ends of what numbers can say: saturated gates, huge logits, numbers that are nearly nothing."""

from unittest import mock

import numpy as np
import pytest
import torch

from seqcore.devices import INTERPRETED
from seqcore.kernels import tuning
from seqcore.testing.budget import assert_within_budget

from .attention_twins import (
    amplified,
    assert_like_reference,
    beside,
    doubled,
    kernels,
    qkv,
    reference,
    results,
    torch_attention,
)
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


@pytest.mark.parametrize("factor", [2.0**13, 2.0**15])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_large_incoming_gradients_of_recurrences(cell, factor, device):
    """As a loss scale makes them: beyond float16 gradients are infinite, but NaN only where plain PyTorch's are."""
    twin, x, hx = problem(cell, T=5, B=5, I=8, H=17, dtype=torch.float16, device=device)
    found, expected = (of_amplified(ours(twin, backend), x, hx, factor) for backend in ("triton", "reference"))
    assert any((gradient.abs() > 1e4).any() for gradient in found)
    for gradient, yardstick in zip(found, expected, strict=True):
        assert not (gradient.isnan() & ~yardstick.isnan()).any()


def of_amplified(module, x, hx, factor):
    """Gradients of x and the parameters where ``factor`` comes in for each element of the output."""
    x = x.detach().requires_grad_()
    y = module(x, hx)[0]
    return torch.autograd.grad(y, [x, *module.parameters()], torch.full_like(y, factor))


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


# How many keys, and options: beside keys that are not there, past a tile, past lengths and behind masks.
BESIDE_NOTHING = {
    "plain": (17, {}),
    "lengths": (16, {"key_lengths": torch.tensor([13])}),
    "additive mask": (20, {"attn_mask": torch.zeros(20)}),
    "bool mask": (24, {"attn_mask": torch.arange(24) % 5 > 0}),
    "lower right": (24, {"causal": "lower_right"}),
    "window": (17, {"window": (9, 1)}),
}


@pytest.mark.parametrize("name", BESIDE_NOTHING)
def test_large_incoming_gradients(name, device):
    """Of float16, where a key that is not there, taken for one, would have a score's gradient beyond it."""
    N, options = BESIDE_NOTHING[name]
    query, key, value = qkv(1, 2, M=9, N=N, D=64, dtype=torch.float16, device=device)
    options = {name: beside(option, device) for name, option in options.items()}
    for function in (kernels, reference):
        gradients = amplified(function, 2.0**14, query, key, 1 + value / 10, **options)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("where", ["everywhere", "one key"])
@pytest.mark.parametrize("largest", [2.5e38, torch.finfo(torch.float32).max])
def test_masks_near_the_largest_number(largest, where, sign, kernel_dtype, device):
    """Scores of base 2 would overflow there: as transformers mask, a row stays a mean, or hangs on one key."""
    mask = torch.full((17, 37), sign * largest, device=device)
    if where == "one key":
        mask[:, torch.arange(37) != 5] = 0
    assert_like_finite_reference(kernel_dtype, device, attn_mask=mask)


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_slopes_and_sinks_near_the_largest_number(name, decoding, kernel_dtype, device, monkeypatch):
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: 2 if decoding else 0)
    given = torch.tensor([3e38, -3e38 if name == "sinks" else 0.1], requires_grad=name == "sinks")
    assert_like_finite_reference(kernel_dtype, device, M=3, **{name: beside(given, device)})


def assert_like_finite_reference(dtype, device, M=17, **options):
    """Where one key decides, gradients of query and key are what roundings leave of nothing; but finite, as lse is."""
    inputs = qkv(1, 2, M=M, N=37, D=20, dtype=dtype, device=device)
    found, eager = (results(f, *inputs, weigh=("out",), **options) for f in (kernels, reference))
    exact = results(reference, *map(doubled, inputs), weigh=("out",), **{n: doubled(o) for n, o in options.items()})
    assert all(tensor.isfinite().all() for tensor in found.values())
    for name in ("out", "gradient of value"):
        assert_within_budget(found[name], exact[name], eager[name], name)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_masks_that_are_not_finite_are_nan_where_torchs_are(value, device):
    mask = torch.zeros(17, 37, device=device)
    mask[3, 5] = value
    inputs = qkv(1, 2, M=17, N=37, D=20, device=device)
    found, expected = (f(*inputs, attn_mask=mask)[0] for f in (kernels, torch_attention))
    assert torch.equal(found.isnan(), expected.isnan()) and found[:, :, 3].isnan().all()


@pytest.mark.parametrize("softcap, scale", [(2.0**-126, 1.0), (2.0**126, None), (1.0, 2.0**126)])
def test_softcaps_at_their_limits(softcap, scale, device):
    """A least one makes a sign of each score, through which no gradient comes; the largest changes nothing."""
    inputs = qkv(1, 2, M=17, N=37, D=20, device=device)
    assert all(t.isfinite().all() for t in results(kernels, *inputs, softcap=softcap, scale=scale).values())
    if softcap > 1:
        assert_like_reference(*inputs, softcap=softcap)
