"""torch.autocast and torch.amp.GradScaler: every module casts and trains as torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pack_sequence

import seqcore
from seqcore import UnsupportedInput, explain, functional
from seqcore.testing.budget import assert_within_budget

from .attention_twins import doubled, qkv
from .comparisons import cotangents
from .every_module import EVERY, given, outputs, twin
from .recurrence_twins import ours, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # What torch says about itself when oneDNN's switches are set.
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
]

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=HALVES.values(), ids=HALVES)
def half(request):
    return request.param


@pytest.fixture
def without_onednn():
    """Which has no LSTM in float16 for some CPUs, and raises where autocast asks it for one."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("name", EVERY)
def test_torchs_operators_cast_as_in_torchs_modules(name, half, without_onednn):
    theirs, x = twin(name), given(name)
    with torch.autocast("cpu", half):
        found, expected = outputs(ours(theirs, "aten"), x), outputs(theirs, x)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("given_in", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_auto_serves_the_lstm_that_onednn_has_not(given_in):
    module, x = seqcore.nn.LSTM(3, 5, dtype=given_in), torch.randn(4, 2, 3, dtype=given_in)
    weights, packed = [w.detach() for w in module.parameters()], pack_sequence([x[:4, 0], x[:2, 1]])
    with torch.autocast("cpu", torch.float16):
        found, expected = module(x)[0], functional.lstm(x, None, weights, backend="reference")[0]
        assert found.dtype == torch.float16 and torch.equal(found, expected)
        with pytest.raises(seqcore.UnsupportedInput, match="oneDNN"):
            functional.lstm(x, None, weights, backend="aten")
        served = {
            "float16 already": (seqcore.nn.LSTM(3, 5, dtype=torch.float16), x.half()),
            "packed": (module, packed), "a GRU": (seqcore.nn.GRU(3, 5, dtype=given_in), x),
            "a cell": (seqcore.nn.LSTMCell(3, 5, dtype=given_in), x[0]),
        }  # fmt: skip
        for name, call in served.items():
            (explanation,) = seqcore.explain(*call)
            assert explanation.chosen == "aten", name
    found.float().sum().backward()
    assert all(w.grad.isfinite().all() for w in module.parameters())


def check_casts(module, name, half):
    """Under autocast ``module`` is bit for bit itself in the lower precision, its gradients in the higher."""
    x, lower = given(name), copy.deepcopy(module).to(half)
    with torch.autocast("cpu", half):
        found = outputs(module, x)
    expected = outputs(lower, x.to(half))
    assert all(a.dtype == half and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gradients, lowered = (
        torch.autograd.grad(outs, list(each.parameters()), cotangents(outs), materialize_grads=True)
        for outs, each in ((found, module), (expected, lower))
    )
    for gradient, low in zip(gradients, lowered, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.to(half), low)


@pytest.mark.parametrize("name", EVERY)
def test_the_reference_computes_in_the_lower_precision(name, half):
    """All of it, on every device, as torch does on a GPU; on a CPU it leaves parts of the GRU and LSTM in float32."""
    check_casts(ours(twin(name), "reference"), name, half)


@pytest.mark.parametrize("name", EVERY)
def test_the_functions_compute_in_the_lower_precision(name, half, by_the_operators):
    check_casts(ours(twin(name), None), name, half)


# What torch's own compiler does to itself.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_modules_compute_in_the_lower_precision():
    """Where torch on a CPU leaves the GRU in float32, as "auto" does in eager mode."""
    module, x = ours(twin("gru"), None), given("gru")
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        assert {t.dtype for t in tensors(compiled)} == {torch.bfloat16}
        assert {t.dtype for t in tensors(module(x))} == {torch.float32}


# --- masks, which are not narrowed ---------------------------------------------------------------------------------


def wide_mask(dtype=torch.float32):
    """What float16 cannot hold, and scores whose differences bfloat16 loses."""
    mask = -300 - 3 * torch.rand(33, 17)
    mask[1, 2] = 1e6
    return mask.to(dtype)


def check_mask(half, mask, backend, dtype=torch.float32):
    """As exact as torch on the CPU without autocast, which reads a float32 mask beside half queries as it is."""
    inputs = qkv(2, 2, M=33, N=17, D=16, dtype=dtype)
    with torch.autocast("cpu", half):
        found = functional.attention(*inputs, attn_mask=mask, backend=backend)
    lower = [t if dtype == torch.float64 else t.to(half) for t in inputs]
    exact = F.scaled_dot_product_attention(*map(doubled, lower), doubled(mask))
    assert found.dtype == lower[0].dtype
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact)
    else:
        assert_within_budget(found, exact, F.scaled_dot_product_attention(*lower, mask.float()))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_leaves_a_mask_as_it_is(half, backend):
    """Autocast narrows it inside of torch's own operator."""
    check_mask(half, wide_mask(), backend)


def test_autocast_leaves_the_operators_mask_as_it_is(half, by_the_operators):
    check_mask(half, wide_mask(), None)


@pytest.mark.parametrize("mask", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_float64_beside_a_narrower_mask(half, mask):
    check_mask(half, wide_mask(mask), "auto", torch.float64)


@pytest.mark.parametrize("mask", [torch.float64, torch.bfloat16], ids=str)
def test_autocast_beside_a_mask_of_another_dtype(half, mask):
    check_mask(half, wide_mask(mask), "auto")


def test_why_torchs_operator_does_not_serve_a_mask_under_autocast(half):
    inputs = qkv(1, 2)
    with torch.autocast("cpu", half):
        assert explain(functional.attention, *inputs, attn_mask=torch.zeros(5, 7, dtype=half))[0].chosen == "aten"
        with pytest.raises(UnsupportedInput, match="torch's attention has no mask of another dtype than queries"):
            functional.attention(*inputs, attn_mask=torch.zeros(5, 7), backend="aten")


# --- training with a scaler ----------------------------------------------------------------------------------------

STEPS_OF_TRAINING = 3


def trained(module, forward, x, scaler):
    """The parameters, one vector, after some steps, the first of which overflows and is left out."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(module.state_dict())
    for step in range(STEPS_OF_TRAINING):
        optimizer.zero_grad()
        loss = sum(out.to(torch.float32).square().mean() for out in forward(x))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
            assert scaler.get_scale() == 2.0**10
    return parameters_to_vector(module.parameters()).detach()


def overflowing_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)


def trained_in_float64(module, x):
    """As ``trained`` without a scaler: the steps that count."""
    module, x = copy.deepcopy(module).double(), x.double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS_OF_TRAINING - 1):
        optimizer.zero_grad()
        sum(out.square().mean() for out in outputs(module, x)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return parameters_to_vector(module.parameters()).detach()


def lowered(module):
    """``module`` run in float16 as autocast does it on a GPU, all of it in the lower precision."""

    def forward(x):
        parameters = {name: value.half() for name, value in module.named_parameters()}
        arguments = (x.half(),) * (3 if isinstance(module, torch.nn.MultiheadAttention) else 1)
        return tensors(functional_call(module, parameters, arguments))

    return forward


def check_training(name, backend, device="cpu"):
    theirs = twin(name).to(device)
    module, x = ours(theirs, backend), given(name, T=5, B=16).to(device)
    exact = trained_in_float64(theirs, x)

    def autocast(x):
        with torch.autocast(x.device.type, torch.float16):
            return outputs(module, x)

    found = trained(module, autocast, x, overflowing_scaler())
    assert_within_budget(found, exact, trained(theirs, lowered(theirs), x, overflowing_scaler()))


@pytest.mark.parametrize("name", EVERY)
def test_a_scaler_trains_the_reference(name):
    check_training(name, "reference")


@pytest.mark.parametrize("name", EVERY)
def test_a_scaler_trains_the_functions(name, by_the_operators):
    check_training(name, None)


# An interpreted kernel computes by NumPy, which remarks on the gradients that overflow here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.kernels
@pytest.mark.parametrize("name", ["gru", "lstm cell", "attention"])
def test_a_scaler_trains_the_kernels(name, device):
    check_training(name, "triton", device)
