"""The recurrence kernels, on a GPU or interpreted: alone, and in every module, against torch.nn and the reference."""

import pytest
import torch
import triton
import triton.language as tl

from seqcore import functional, use_backend
from seqcore.kernels.activations import sigmoid, tanh
from seqcore.kernels.recurrence import backward as backward_kernels
from seqcore.testing.budget import assert_within_budget

from .recurrence_twins import (
    CELLS,
    FLAGS,
    SINGLE,
    assert_alike,
    differing,
    keep_off_the_kink,
    mapped,
    masks,
    ours,
    packed,
    problem,
    results,
    tensors,
)

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture(autouse=True)
def _exact_products():
    """The yardstick in float32 is float32, on a GPU too."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# --- activations ---------------------------------------------------------------------------------------------------


@triton.jit
def activations_kernel(x_ptr, tanh_ptr, sigmoid_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(tanh_ptr + offs, tanh(x), mask=offs < N)
    tl.store(sigmoid_ptr + offs, sigmoid(x), mask=offs < N)


def activations(x):
    """tanh and sigmoid of ``x`` as the kernels compute them."""
    found = torch.empty_like(x), torch.empty_like(x)
    activations_kernel[(-(-x.numel() // 1024),)](x, *found, x.numel(), BLOCK=1024)
    return found


def whole_range(device):
    """Both signs of magnitudes from the least normal float32 to the greatest, and of a fine grid where curves bend."""
    magnitudes = torch.cat([torch.logspace(-37.9, 38.5, 4000, dtype=torch.float64), torch.linspace(0, 20, 4001)])
    return torch.cat([magnitudes, -magnitudes]).float().to(device)


def relative_error(actual, exact):
    return ((actual.double() - exact) / exact).nan_to_num(0).abs().max().item()


# NumPy, under the interpreter, warns of what is right: e^x is infinite, inf - inf is NaN.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tanh_over_the_whole_range(device):
    x = whole_range(device)
    assert relative_error(activations(x)[0], x.double().tanh()) <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sigmoid_over_the_whole_range(device):
    x = whole_range(device)
    actual, exact = activations(x)[1], x.double().sigmoid()
    normal = exact >= torch.finfo(torch.float32).tiny
    # Where sigmoid is small it is e^x, whose relative error grows with |x|.
    allowed = torch.finfo(torch.float32).eps * (2 + x.double().abs())
    assert ((actual.double() - exact).abs() <= allowed * exact)[normal].all()
    assert (actual[~normal] <= torch.finfo(torch.float32).tiny).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_activations_of_special_values(device):
    inf = float("inf")
    x = torch.tensor([inf, -inf, 0.0, -0.0, 100.0, -100.0, float("nan")], device=device)
    tanh_x, sigmoid_x = activations(x)
    torch.testing.assert_close(tanh_x[:6], torch.tensor([1, -1, 0, -0.0, 1, -1], device=device), rtol=0, atol=0)
    torch.testing.assert_close(
        sigmoid_x[:4], torch.tensor([1, 0, 0.5, 0.5], device=device, dtype=x.dtype), rtol=0, atol=0
    )
    assert tanh_x[6].isnan() and sigmoid_x[6].isnan()


# --- whole modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_flag(cell, flags, kernel_dtype, device):
    twin, x, hx = problem(cell, dtype=kernel_dtype, device=device, **FLAGS[flags])
    assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize("T, B, I, H", [(1, 1, 1, 1), (7, 1, 3, 65), (1, 17, 4, 3)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_odd_shapes(cell, T, B, I, H, device):
    twin, x, hx = problem(cell, T, B, I, H, device=device)
    assert_alike(ours(twin, "triton"), twin, x, hx)


@pytest.mark.parametrize("cell", CELLS)
def test_default_state_and_unbatched_input(cell, kernel_dtype, device):
    twin, x, _ = problem(cell, dtype=kernel_dtype, device=device)
    assert_alike(ours(twin, "triton"), twin, x)
    assert_alike(ours(twin, "triton"), twin, x[:, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, kernel_dtype, device):
    twin, x, hx = problem(cell, dtype=kernel_dtype, device=device, bidirectional=True)
    assert_alike(ours(twin, "triton"), twin, packed(x, [2, 3, 1, 3, 2]), hx)


@pytest.mark.parametrize("cell", CELLS)
def test_masked(cell, kernel_dtype, device):
    twin, x, hx = problem(cell, T=4, dtype=kernel_dtype, device=device, bidirectional=True)
    assert_alike(ours(twin, "triton"), ours(twin, "reference"), x, hx, **masks(device))


@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_strided_inputs_weights_and_states(cell, device):
    twin, x, hx = problem(cell, device=device)
    x, hx = (mapped(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), value) for value in (x, hx))
    module = ours(twin, "triton")
    for name, weight in list(module.named_parameters()):
        wider = torch.cat([weight.detach(), weight.detach()], -1)
        setattr(module, name, torch.nn.Parameter(wider[..., : weight.shape[-1]]))
    assert not x.is_contiguous() and not module.weight_hh_l0.is_contiguous()
    assert_alike(module, twin, x, hx)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell, device):
    twin, x, hx = problem(cell, B=0, device=device, bidirectional=True)
    found = results(ours(twin, "triton"), x, hx)
    assert found["y"].shape == (3, 0, 2 * (twin.proj_size or 31))
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("cell", SINGLE)
def test_cells(cell, kernel_dtype, device):
    kind, options = SINGLE[cell]
    twin = kind(4, 31, **options, dtype=kernel_dtype, device=device)
    x = torch.randn(5, 4, dtype=kernel_dtype, device=device)
    hx = torch.randn(5, 31, dtype=kernel_dtype, device=device)
    if cell == "rnn_relu":
        keep_off_the_kink(twin)
        x, hx = x.abs(), hx.abs()
    hx = (hx, hx.flip(0)) if cell == "lstm" else hx
    module = ours(twin, "triton")
    assert_alike(module, twin, x, hx)
    assert_alike(module, twin, x)
    assert_alike(module, twin, x[0], mapped(lambda t: t[0], hx))
    bare = kind(4, 31, bias=False, **options, dtype=kernel_dtype, device=device)
    bare.load_state_dict(twin.state_dict(), strict=False)
    assert_alike(ours(bare, "triton"), bare, x, hx)


@pytest.mark.parametrize("cell", SINGLE)
def test_nan_goes_through_a_step_and_stays_in_its_row(cell, device):
    kind, options = SINGLE[cell]
    module = ours(kind(4, 31, **options, device=device), "triton")
    x = torch.randn(2, 4, device=device)
    x[0] = float("nan")
    h = tensors(module(x))[0]
    assert h[0].isnan().all() and h[1].isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell, device):
    twin, x, _ = problem(cell, T=2, H=7, device=device)
    x.requires_grad_()

    def penalty(module):
        (slope,) = torch.autograd.grad(module(x)[0].square().sum(), [x], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(module.parameters()), materialize_grads=True)

    kernels, reference = ours(twin, "triton"), ours(twin, "reference")
    eager = penalty(reference)
    actual = penalty(kernels)
    x = x.detach().double().requires_grad_()
    for name, *gradients in zip(dict(twin.named_parameters()), actual, penalty(reference.double()), eager, strict=True):
        assert_within_budget(*gradients, name)


# --- repeatability, and inputs left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_repeats_are_bitwise_equal(cell, device):
    twin, x, hx = problem(cell, device=device, bidirectional=True)
    module = ours(twin, "triton")
    assert not differing(results(module, x, hx), results(module, x, hx))


def test_inputs_are_not_written(device):
    twin, x, hx = problem("lstm", device=device)
    module = ours(twin, "triton")
    before = [t.clone() for t in (x, *hx, *module.parameters())]
    results(module, x, hx)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *hx, *module.parameters()), strict=True))


def test_backend_of_forward_serves_backward_too(device, monkeypatch):
    twin, x, _ = problem("gru", device=device)
    kernel, launches = backward_kernels.recurrence_backward_kernel, []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(backward_kernels, "recurrence_backward_kernel", Counted())
    with use_backend("triton"):
        y, _ = functional.gru(x.requires_grad_(), None, list(twin.parameters()))
    with use_backend("reference"):
        y.sum().backward()
    assert launches == [(1,)]
