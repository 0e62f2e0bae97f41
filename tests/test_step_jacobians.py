"""Jacobians of single steps are those of torch.autograd.functional; products of thousands keep their decades."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import seqcore
from seqcore import InvalidInput
from seqcore.diagnostics import StepJacobians, gradient_flow, jacobians, step_jacobians
from seqcore.testing.budget import assert_within_budget

from .comparisons import assert_equal_in_float64
from .recurrence_twins import CELLS, SINGLE, ours, problem, tensors

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DOUBLE = {"dtype": torch.float64}
WHOSE = ["torch's", "aten", "reference"]


def one_by_one(step, x, state):
    """[T, B, S, S]: jacobian() of each step of each sequence; ``step`` takes x [I] and the joined state [S]."""
    found = []
    for x_t in x:
        pairs = list(zip(x_t, state, strict=True))
        found.append(torch.stack([jacobian(lambda s, x_b=x_b: step(x_b, s), s) for x_b, s in pairs]))
        state = torch.stack([step(*pair) for pair in pairs]).detach()
    return torch.stack(found)


def on_joined(step, widths):
    """``step``, from x and h or (h, c) of one sequence to the next, as a function of h and c joined."""

    def joined(x, s):
        parts = s.split(widths)
        return torch.cat(tensors(step(x, parts[0] if len(parts) == 1 else parts)))

    return joined


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("whose", WHOSE)
def test_in_inference_mode(whose, T):
    twin, x, hx = problem("lstm", T=T, B=3, H=5, **DOUBLE)
    module = twin if whose == "torch's" else ours(twin, whose)
    step = lambda x_t, s: torch.tanh(s + x_t.sum(1, keepdim=True))
    expected = step_jacobians(module, x, hx), step_jacobians(module, x), step_jacobians(step, x, hx[0][0])
    with torch.inference_mode():
        x, hx = x.clone(), tuple(s.clone() for s in hx)
        found = step_jacobians(module, x, hx), step_jacobians(module, x), step_jacobians(step, x, hx[0][0])
        assert str(found[0]) == str(expected[0])
    for ours_, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours_.matrices, theirs.matrices)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("cell", CELLS)
def test_of_layers(cell, whose, batch_first):
    twin, x, hx = problem(cell, T=4, B=3, H=5, batch_first=batch_first, **DOUBLE)
    found = step_jacobians(twin if whose == "torch's" else ours(twin, whose), x, hx)

    def step(x, state):
        parts = tensors(state)
        hx = tuple(part[None] for part in parts) if len(parts) > 1 else parts[0][None]
        return tuple(part[0] for part in tensors(twin(x[None], hx)[1]))

    states = [s[0] for s in tensors(hx)]
    step = on_joined(step, [s.shape[1] for s in states])
    expected = one_by_one(step, x.transpose(0, 1) if batch_first else x, torch.cat(states, 1))
    assert_equal_in_float64({"J": found.matrices}, {"J": expected})
    if not batch_first:
        alone = step_jacobians(twin, x[:, 0])
        assert_equal_in_float64({"J": alone.matrices}, {"J": step_jacobians(twin, x[:, :1]).matrices})


@pytest.mark.parametrize("library", [nn, seqcore.nn])
@pytest.mark.parametrize("cell", SINGLE)
def test_of_cells(cell, library, monkeypatch):
    kind, options = SINGLE[cell]
    module, x = getattr(library, kind.__name__)(4, 3, **options, **DOUBLE), torch.randn(5, 2, 4, **DOUBLE)
    parts = 2 if cell == "lstm" else 1
    expected = one_by_one(on_joined(module, [3] * parts), x, torch.zeros(2, 3 * parts, **DOUBLE))
    assert_equal_in_float64({"J": step_jacobians(module, x).matrices}, {"J": expected})
    monkeypatch.setattr(jacobians, "ENTRIES", 7 * 3 * parts)
    assert_equal_in_float64({"J by 7 rows": step_jacobians(module, x).matrices}, {"J by 7 rows": expected})


def test_of_a_function_with_a_state_of_parts():
    w = torch.randn(3, 3, **DOUBLE)

    def step(x, state):
        h, c = state
        c = torch.tanh(c + 0.5 * h[:, :2])
        return torch.sin(h @ w) + x.mean((-1, -2))[:, None], c

    x, state = torch.randn(4, 2, 6, 7, **DOUBLE), (torch.randn(2, 3, **DOUBLE), torch.randn(2, 2, **DOUBLE))
    alone = lambda x, state: tuple(part[0] for part in step(x[None], tuple(part[None] for part in state)))
    expected = one_by_one(on_joined(alone, [3, 2]), x, torch.cat(state, 1))
    assert_equal_in_float64({"J": step_jacobians(step, x, state).matrices}, {"J": expected})


@pytest.mark.parametrize("zoneout", [0.3, (0.6, 0.2)])
def test_of_expected_zoneout(zoneout):
    module, x = seqcore.nn.LSTM(4, 3, zoneout=zoneout).double().eval(), torch.randn(5, 2, 4, **DOUBLE)

    def step(x_t, state):
        return tuple(part[0] for part in module(x_t[None], tuple(part[None] for part in state))[1])

    expected = step_jacobians(step, x, (torch.zeros(2, 3, **DOUBLE),) * 2)
    assert_equal_in_float64({"J": step_jacobians(module, x).matrices}, {"J": expected.matrices})


# --- what follows from them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain, verdict", [(0.5, "vanishing"), (1.0, "steady"), (2.0, "exploding")])
def test_known_jacobians(gain, verdict):
    turn = torch.linalg.qr(torch.randn(4, 4, **DOUBLE)).Q
    x = torch.randn(50, 2, 4, **DOUBLE)
    found = step_jacobians(lambda x_t, h: gain * h @ turn.T + x_t, x, x[0])
    lags = torch.arange(1, 51, **DOUBLE)[:, None, None].expand(50, 2, 4)
    expected = {
        "matrices": (gain * turn).expand(50, 2, 4, 4),
        "singular values": torch.full((50, 2, 4), gain, **DOUBLE),
        "spectral radius": torch.full((50, 2), gain, **DOUBLE),
        "products": lags * math.log10(gain),
    }
    actual = (found.matrices, found.singular_values, found.spectral_radius, found.products())
    assert_equal_in_float64(dict(zip(expected, actual, strict=True)), expected)
    assert found.growth == pytest.approx(gain)
    assert found.verdict == verdict
    assert f"by {gain:.3g} a step" in found.sentence and "50 steps" in found.sentence


def turned(T, factors):
    """J_t = Q_t diag(factors) Q_{t-1}^T, Q random and orthogonal: products of k have the singular values factors^k."""
    q = torch.linalg.qr(torch.randn(T + 1, len(factors), len(factors), **DOUBLE)).Q
    return (q[1:] * torch.tensor(factors, **DOUBLE) @ q[:-1].mT)[:, None]


@pytest.mark.parametrize("factors", [[3.0, 1.1, 1.0, 0.5, 0.01], [0.9, 0.89, 0.3, 0.299, 0.298]])
def test_products_of_thousands(factors):
    lags = [1, 2, 10, 100, 1000, 3000]
    found = StepJacobians(turned(3000, factors)).products(lags)[:, 0]
    expected = torch.tensor(lags, **DOUBLE)[:, None] * torch.tensor(factors, **DOUBLE).log10()
    assert (found - expected).abs().max() < 0.01, "what is said of nearly equal ones that are small"
    exact = lambda decades: {"largest": decades[:, 0], "first and last lags": decades[[0, 1, 5]]}
    assert_equal_in_float64(exact(found), exact(expected))


@pytest.mark.parametrize("ratio, decades", [(1.1, 0.05), (2.0, 1e-4)])
def test_products_of_values_far_below_the_largest(ratio, decades):
    expected = torch.cat([torch.zeros(1, **DOUBLE), -9 - math.log10(ratio) * torch.arange(63, **DOUBLE)])
    found = StepJacobians(turned(40, (10 ** (expected / 40)).tolist())).products([40])[0, 0]
    assert (found - expected).abs().max() < decades


def test_lags_are_integers_of_any_kind():
    found = StepJacobians(torch.randn(3, 1, 2, 2, **DOUBLE))
    assert torch.equal(found.products(torch.tensor([3, 1])), found.products()[[2, 0]])


def test_products_of_any_matrices():
    matrices = torch.randn(200, 3, 6, 6, **DOUBLE)
    found = StepJacobians(matrices).products()
    product, first = torch.eye(6, **DOUBLE), []
    for matrix in matrices.flip(0)[:3]:
        product = product @ matrix
        first.append(torch.linalg.svdvals(product).log10())
    determinants = torch.linalg.slogdet(matrices.flip(0)).logabsdet.cumsum(0) / math.log(10)
    assert_equal_in_float64(
        {"first": found[:3], "sums of logs": found.sum(-1)}, {"first": torch.stack(first), "sums of logs": determinants}
    )
    assert found.diff(dim=-1).max() <= 0


def test_singular_and_broken_jacobians():
    matrices = torch.randn(30, 2, 4, 4, **DOUBLE)
    matrices[:, 0, 1] = 0
    rank = StepJacobians(matrices)
    assert (rank.products()[:, 0, -1] < -15).all() and rank.products()[:, 0, :3].isfinite().all()
    matrices[3, 0] = 0
    dead = StepJacobians(matrices)
    assert dead.products()[-1, 0].isneginf().all() and dead.products()[-1, 1].isfinite().all()
    assert "is zero for 1 of 2 sequences" in dead.sentence and math.isfinite(dead.growth)
    matrices[3] = 0
    assert StepJacobians(matrices).verdict == "vanishing" and StepJacobians(matrices).growth == 0
    matrices[7, 1, 2, 2] = math.inf
    broken = StepJacobians(matrices)
    assert broken.verdict == "exploding" and "not finite at t = 7" in broken.sentence
    assert broken.singular_values[7, 1].isnan().all() and broken.spectral_radius[7, 0].isfinite()
    assert broken.products()[:, 1].isnan().all()


def test_results_are_compared_without_an_error():
    module, x = nn.GRU(4, 3), torch.randn(3, 2, 4)
    one, other = (gradient_flow(module, x) for _ in range(2))
    assert one == one and one != other and one["h"] != other["h"]
    assert step_jacobians(module, x) != step_jacobians(module, x)


def test_a_plot_of_the_products():
    pytest.importorskip("matplotlib", reason="plots are matplotlib's").use("Agg")
    import matplotlib.pyplot as plt

    found = StepJacobians(turned(1000, [0.9, 0.5, 0.1]))
    largest, middle, smallest = found.plot().lines
    assert largest.get_xdata()[-1] == 1000 and len(largest.get_xdata()) == jacobians.DRAWN
    assert largest.get_ydata()[-1] == pytest.approx(1000 * math.log10(0.9))
    assert middle.get_ydata()[-1] == pytest.approx(1000 * math.log10(0.5))
    assert smallest.get_ydata()[-1] == pytest.approx(-1000)
    plt.close("all")


@pytest.mark.kernels
def test_through_the_kernels(device):
    twin, x, hx = problem("gru", T=3, B=2, H=4, device=device)
    exact = step_jacobians(ours(twin, "reference").double(), x.double(), hx.double()).matrices
    eager, found = (step_jacobians(ours(twin, backend), x, hx).matrices for backend in ("reference", "triton"))
    assert_within_budget(found.float(), exact, eager.float())


class OwnForward(nn.RNN):
    def forward(self, input, hx=None):
        return tuple(0.5 * part for part in super().forward(input, hx))


def hooked(kind):
    module = nn.GRU(4, 3)
    getattr(module, f"register_forward_{kind}")(lambda module, *given: None)
    return module


X, H = torch.ones(2, 1, 4), torch.ones(1, 3)
ERRORS = {
    "two layers": (lambda: step_jacobians(nn.GRU(4, 3, 2), X), "one layer in one direction, .* got 2 layers"),
    "bidirectional": (lambda: step_jacobians(nn.GRU(4, 3, bidirectional=True), X), "got 1 layers, bidirectional"),
    "own forward": (lambda: step_jacobians(OwnForward(4, 3), X), "got OwnForward .* pass a function"),
    "pre-hook": (lambda: step_jacobians(hooked("pre_hook"), X), "hooks .* got GRU"),
    "hook": (lambda: step_jacobians(hooked("hook"), X), "hooks .* got GRU"),
    "zoneout drawn": (lambda: step_jacobians(seqcore.nn.GRU(4, 3, zoneout=0.1), X), r"got 0.1 in training; call eval"),
    "no step": (lambda: step_jacobians(3, X), "a recurrent module, a Cell or a function .* got int"),
    "no state": (lambda: step_jacobians(lambda x, h: h, X), "needs state="),
    "no sequence": (lambda: step_jacobians(nn.GRU(4, 3), X[0, 0]), r"x must be a Tensor \[T, B, …\] .* got \[4\]"),
    "no time": (lambda: step_jacobians(nn.GRU(4, 3, batch_first=True), X[:, :0]), r"one step, got \[2, 0, 4\]"),
    "state of another batch": (lambda: step_jacobians(lambda x, h: h, X, H[[0, 0]]), r"\[1, S\] .* \[2, 3\]"),
    "another state": (lambda: step_jacobians(lambda x, h: h[:, :2], X, H), r"here \[\[1, 3\]\], got \[\[1, 2\]\]"),
    "detached": (lambda: step_jacobians(lambda x, h: h.detach(), X, H), r"detach\(\) and torch.no_grad"),
    "wrong width": (lambda: step_jacobians(nn.GRU(5, 3), X), "Expected 5, got 4"),
    "lag": (lambda: StepJacobians(torch.ones(2, 1, 1, 1)).products([0, 1]), r"lie in 1 … 2, .* got \[0, 1\]"),
    "no integer": (lambda: StepJacobians(torch.ones(2, 1, 1, 1)).products([1.5]), r"integers in 1 … 2, got \[1.5\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    call, message = ERRORS[case]
    with pytest.raises(InvalidInput, match=message):
        call()
