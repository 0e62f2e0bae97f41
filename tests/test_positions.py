"""Encodings of positions against their definitions, and the modules that number positions from a start."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from seqcore import InvalidInput, functional
from seqcore.functional import alibi_slopes, rotary, sinusoidal_positions
from seqcore.nn import LearnedPositions, RotaryPositions, SinusoidalPositions
from seqcore.testing.budget import assert_within_budget

DOUBLE = {"dtype": torch.float64}
B, H, M, D = 3, 2, 5, 8


def assert_equal_in_float64(actual, expected):
    """Two orders of the same float64 arithmetic, which nothing more exact could judge: torch's own tolerances."""
    assert actual.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected)


# --- sinusoids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions, dim, base", [((0, 1, 7), 6, 10000.0), ((100_000, 3), 4, 100.0)])
def test_sinusoids_by_hand(positions, dim, base):
    found = sinusoidal_positions(torch.tensor(positions), dim, base, torch.float64)
    expected = [
        [(math.sin, math.cos)[i % 2](p / base ** ((i - i % 2) / dim)) for i in range(dim)] for p in positions
    ]  # fmt: skip
    assert_equal_in_float64(found, torch.tensor(expected, **DOUBLE))


def test_sinusoids_of_any_shape_in_the_default_dtype():
    found = sinusoidal_positions(torch.arange(6).reshape(2, 3), 4)
    assert found.shape == (2, 3, 4) and found.dtype == torch.float32
    assert torch.equal(found[1, 2], sinusoidal_positions(torch.tensor([5.0]), 4)[0])


# --- rotations -----------------------------------------------------------------------------------------------------


def rotated_as_complex_numbers(x, positions, base=10000.0, dims=None):
    """The definition: feature pairs (2i, 2i + 1), as complex numbers, times exp(i position base^(-2i/dims))."""
    dims = x.shape[-1] if dims is None else dims
    frequencies = torch.tensor([base ** (-i / dims) for i in range(0, dims, 2)], **DOUBLE)
    angles = positions.double()[..., None] * frequencies
    if positions.dim() == 2:
        angles = angles[:, None]
    numbers = torch.view_as_complex(x[..., :dims].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([turned, x[..., dims:]], -1)


def halves_together(dims, width):
    """The order of features in which the halves' pairs (i, i + dims/2) stand side by side."""
    return torch.cat([torch.arange(dims).reshape(2, -1).T.flatten(), torch.arange(dims, width)])


POSITIONS = {
    "shared": torch.arange(M),
    "far": torch.arange(100_000, 100_000 + M),
    "own": torch.tensor([[0], [7], [100_000]]) + torch.arange(M),
    "fractions": 100_000 + torch.arange(M, **DOUBLE) / 3,
}


@pytest.mark.parametrize("dims", [None, 2, 6])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_rotation_is_complex_multiplication(positions, dims):
    x = torch.randn(B, H, M, D, **DOUBLE)
    expected = rotated_as_complex_numbers(x, positions, 500.0, dims)
    assert_equal_in_float64(rotary(x, positions, 500.0, interleaved=True, dims=dims), expected)


@pytest.mark.parametrize("dims", [None, 6])
def test_halves_are_the_interleaved_form_in_another_order(dims):
    x, order = torch.randn(B, H, M, D, **DOUBLE), halves_together(dims or D, D)
    found = rotary(x, POSITIONS["own"], dims=dims)[..., order]
    assert_equal_in_float64(found, rotary(x[..., order], POSITIONS["own"], interleaved=True, dims=dims))
    assert not torch.equal(found, rotary(x, POSITIONS["own"], interleaved=True, dims=dims))


def test_halves_rotate_as_llama_writes_it():
    x, positions = torch.randn(B, H, M, D, **DOUBLE), torch.arange(M)
    angles = torch.outer(positions.double(), 10000.0 ** (-torch.arange(0, D, 2, **DOUBLE) / D)).repeat(1, 2)
    turned = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    assert_equal_in_float64(rotary(x, positions), x * angles.cos() + turned * angles.sin())


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(interleaved):
    q, k = torch.randn(2, H, M, D, **DOUBLE)
    near, far = (
        rotary(q, start + 3 + torch.arange(M), interleaved=interleaved)
        @ rotary(k, start + torch.arange(M), interleaved=interleaved).mT
        for start in (0, 1000)
    )
    assert_equal_in_float64(near, far)
    unmoved = (
        rotary(q, torch.arange(M), interleaved=interleaved) @ rotary(k, torch.arange(M), interleaved=interleaved).mT
    )
    assert not torch.allclose(near, unmoved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_as_exact_far_out_as_at_the_start(dtype):
    x = torch.randn(4, 8, 64, 64, dtype=dtype)
    positions = 100_000 + torch.arange(64)
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, 64, 2, **DOUBLE) / 64)
    a, b = x.chunk(2, -1)
    # The yardstick is given the exact angles.
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    eager = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    found = rotary(x, positions)
    assert found.dtype == dtype
    assert_within_budget(found, rotary(x.double(), positions), eager)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_has_gradients_of_every_order(interleaved):
    x = torch.randn(2, H, 3, D, requires_grad=True, **DOUBLE)
    run = lambda x: rotary(x, POSITIONS["own"][:2, :3], interleaved=interleaved, dims=6)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_rotation_without_heads_or_batch():
    x = torch.randn(B, M, D, **DOUBLE)
    each = torch.stack([rotary(x[b], POSITIONS["own"][b]) for b in range(B)])
    assert torch.equal(rotary(x, POSITIONS["own"]), each)


# --- ALiBi ---------------------------------------------------------------------------------------------------------


def test_slopes_as_published():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    four_more = [0.7071067811865476, 0.3535533905932738, 0.17677669529663689, 0.08838834764831845]
    assert alibi_slopes(8, dtype=torch.float64).tolist() == eight
    assert_equal_in_float64(alibi_slopes(12, dtype=torch.float64), torch.tensor(eight + four_more, **DOUBLE))
    assert alibi_slopes(1).tolist() == [2**-8]
    assert_equal_in_float64(alibi_slopes(3, **DOUBLE), torch.tensor([2**-4, 2**-8, 2**-2], **DOUBLE))


def test_slopes_go_into_attention():
    q, k, v = torch.randn(3, B, 4, M, D, **DOUBLE)
    bias = -alibi_slopes(4, **DOUBLE)[:, None, None] * (torch.arange(M)[:, None] - torch.arange(M)).abs()
    biased, sloped = {"attn_mask": bias}, {"alibi_slopes": alibi_slopes(4)}
    expected, found = (functional.attention(q, k, v, causal="top_left", **options) for options in (biased, sloped))
    assert_equal_in_float64(found, expected)


# --- modules -------------------------------------------------------------------------------------------------------

MODULES = {
    "sinusoidal": lambda **options: SinusoidalPositions(D, **options),
    "learned": lambda **options: LearnedPositions(40, D, dtype=torch.float64, **options),
}
STARTS = {"int": 4, "scalar": torch.tensor(4), "each": torch.tensor([0, 4, 20]), "int32": torch.tensor([1, 2, 3]).int()}


def rows(start):
    """[1 or B, M]: the positions by hand."""
    return torch.as_tensor(start).reshape(-1, 1) + torch.arange(M)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_add_the_encoding_of_each_position(kind, batch_first, start):
    module, x = MODULES[kind](batch_first=batch_first), torch.randn(B, M, D, **DOUBLE)
    table = module.weight if kind == "learned" else sinusoidal_positions(torch.arange(40), D, dtype=torch.float64)
    found = module(x if batch_first else x.transpose(0, 1), start)
    assert torch.equal(found if batch_first else found.transpose(0, 1), x + table[rows(start)])


@pytest.mark.parametrize("kind", MODULES)
def test_modules_take_one_sequence_without_a_batch(kind):
    module, x = MODULES[kind](), torch.randn(M, D, **DOUBLE)
    for start in (3, torch.tensor(3)):
        assert torch.equal(module(x, start), module(x[:, None], start)[:, 0])


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_rotary_module_rotates_from_its_start(start):
    x = torch.randn(B, H, M, D, **DOUBLE)
    found = RotaryPositions(D, 100.0, interleaved=True, dims=6)(x, start)
    assert torch.equal(found, rotary(x, rows(start).expand(B, M), 100.0, interleaved=True, dims=6))


@pytest.mark.parametrize("kind", MODULES)
def test_modules_pass_vmap(kind):
    module, x, start = MODULES[kind](batch_first=True), torch.randn(B, M, D, **DOUBLE), STARTS["each"]
    assert torch.equal(torch.func.vmap(module)(x, start), module(x, start))


@pytest.mark.parametrize("kind", MODULES)
def test_modules_keep_the_dtype_of_x(kind):
    x = torch.randn(M, D, dtype=torch.bfloat16)
    assert MODULES[kind]()(x).dtype == torch.bfloat16
    assert RotaryPositions(D)(x.reshape(1, 1, M, D)).dtype == torch.bfloat16


def test_learned_positions_learn_and_are_saved():
    module = LearnedPositions(40, D)
    module(torch.randn(M, B, D), torch.tensor([0, 0, 3])).sum().backward()
    expected = torch.zeros(40)
    for start in (0, 0, 3):
        expected[start : start + M] += 1
    assert torch.equal(module.weight.grad, expected[:, None].expand(40, D))
    assert list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize("start", [36, -1, torch.tensor([0, 36, 0]), torch.tensor(-1)], ids=str)
def test_learned_positions_end(start):
    with pytest.raises(InvalidInput, match=r"must lie in 0 … 39, got .* larger max_length"):
        LearnedPositions(40, D)(torch.randn(M, B, D), start)


def test_learned_positions_past_the_end_are_nan_where_they_cannot_be_known():
    module = LearnedPositions(40, D)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = run(torch.zeros(M, B, D), torch.tensor([36, 35, -2]))
    valid = torch.tensor([[True] * 4 + [False], [True] * 5, [False] * 2 + [True] * 3]).T
    assert torch.equal(found.isnan(), ~valid[..., None].expand(M, B, D))
    assert torch.equal(found[:, 1], module.weight[35:])


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ALL = MODULES | {"rotary": lambda: RotaryPositions(D)}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ALL)
def test_one_compile_serves_every_start_in_a_tensor(kind):
    counter, module = CompileCounterWithBackend("aot_eager"), ALL[kind]()
    run = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn((B, H, 1, D) if kind == "rotary" else (1, B, D), **DOUBLE)
    for step in range(6):
        start = torch.tensor([0, 1, 9]) + step
        assert torch.equal(run(x, start), module(x, start))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ALL)
def test_a_start_as_int_compiles_for_0_for_1_and_for_all_others(kind):
    counter, module = CompileCounterWithBackend("aot_eager"), ALL[kind]()
    run = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn((B, H, 1, D) if kind == "rotary" else (1, B, D), **DOUBLE)
    for start in range(8):
        assert torch.equal(run(x, start), module(x, start))
    assert counter.frame_count <= 3


# --- errors --------------------------------------------------------------------------------------------------------

X = torch.zeros(B, H, M, D)
WRONG = {
    "no tensor": (lambda: rotary([1.0], torch.arange(1)), "x must be a Tensor, got list"),
    "integers": (lambda: rotary(X.long(), torch.arange(M)), "floating point, got torch.int64"),
    "float8": (lambda: rotary(X.to(torch.float8_e4m3fn), torch.arange(M)), "got torch.float8_e4m3fn; float32"),
    "sparse": (lambda: rotary(X.to_sparse(), torch.arange(M)), "x must be a dense Tensor, got a sparse_coo one"),
    "sparse x": (lambda: LearnedPositions(9, D)(X[0].to_sparse()), "x must be a dense Tensor, got a sparse_coo one"),
    "sparse start": (
        lambda: RotaryPositions(D)(X, torch.ones(B).long().to_sparse()),
        "start must be a dense Tensor, got a sparse_coo one",
    ),
    "list of positions": (lambda: rotary(X, [0, 1]), "must be a Tensor, got list; torch.arange"),
    "bool positions": (lambda: rotary(X, torch.ones(M) > 0), "integers or floating point, got torch.bool"),
    "too few positions": (lambda: rotary(X, torch.arange(M - 1)), r"must be \[5\] or \[3, 5\] .* got \[4\]"),
    "positions of heads": (lambda: rotary(X, torch.zeros(H, M)), r"must be \[5\] or \[3, 5\] .* got \[2, 5\]"),
    "another device": (lambda: rotary(X, torch.zeros(M, device="meta")), "on x's device cpu, got meta"),
    "odd dims": (lambda: rotary(X, torch.arange(M), dims=3), "even and positive, got 3"),
    "odd width": (lambda: rotary(X[..., :5], torch.arange(M)), "even and positive, got 5"),
    "too many dims": (lambda: rotary(X, torch.arange(M), dims=10), "at most the last dimension of x, 8, got 10"),
    "base": (lambda: rotary(X, torch.arange(M), base=0), "base must be positive, got 0"),
    "odd dim": (lambda: sinusoidal_positions(torch.arange(M), 5), "dim must be even and positive, got 5"),
    "no heads": (lambda: alibi_slopes(0), "positive integer, got 0"),
    "width of x": (lambda: SinusoidalPositions(6)(X[0]), r"the last of 6, got \[2, 5, 8\]"),
    "rank of x": (lambda: LearnedPositions(9, D)(X), r"2 or 3 dimensions, .* got \[3, 2, 5, 8\]"),
    "x is a list": (lambda: LearnedPositions(9, D)([1]), "x must be a Tensor, got list"),
    "rank of x, rotary": (lambda: RotaryPositions(D)(X[0]), r"4 dimensions, .* got \[2, 5, 8\]"),
    "start of no batch": (lambda: RotaryPositions(D)(X, torch.arange(H)), r"int64 \[\] or \[3\] on cpu, got \[2\]"),
    "float start": (lambda: RotaryPositions(D)(X, torch.zeros(B)), "int32 or int64 .* got .*float32"),
    "start as float": (lambda: RotaryPositions(D)(X, 1.5), "start must be an int or a Tensor .* got 1.5"),
    "start elsewhere": (lambda: RotaryPositions(D)(X, torch.zeros(B, device="meta").long()), "got .* on meta"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
