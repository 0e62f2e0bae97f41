"""Gradients through time: how they vanish, when they explode, and which layers keep them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.study import gradient_pictures
from benchmarks.study.experiment import (
    Case,
    Row,
    Verdict,
    all_of,
    beyond,
    finite,
    order_of,
    select,
    spread,
    thinned,
    values,
)
from benchmarks.study.gradient_pictures import DEFAULTS, FAR, LAYERS, LONG, NONLINEARITIES, change, far, left, rates
from benchmarks.study.models import RECURRENT, causal_mask
from benchmarks.study.sigmoid import SigmoidRNN
from seqcore.diagnostics import gradient_flow, step_jacobians
from seqcore.diagnostics.magnitude import DECADES
from seqcore.nn import RNN, MultiheadAttention
from seqcore.nn.init import forget_gate_bias_, orthogonal_recurrent_

TITLE = "Gradients through time"
QUESTION = (
    "The loss stands at the end of a sequence. How much of its gradient arrives at the state of each earlier step, "
    "before any training, and what decides that?"
)
ALONE = False
HEADS = 2
# As many lags of a curve are kept, besides the one that stands for a long way back.
POINTS = 40
# From lag 1 to the last a gradient may change by this factor and still not depend on the distance.
EVEN = 10
# Logarithms of two factors a step that are nearer than this are the same.
SAME = 0.05


@dataclass(frozen=True)
class Sizes:
    T: int
    B: int
    H: int
    gains: tuple[float, ...]
    gain_T: int
    seeds: int
    # Of the step Jacobians, whose size is that of the state squared.
    jacobian_T: int
    jacobian_H: int


SIZES = {
    "tiny": Sizes(12, 2, 4, (0.5, 3.0), 12, 2, 4, 3),
    "cpu": Sizes(1000, 4, 64, (0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 3.0), 300, 3, 100, 32),
    "gpu": Sizes(4000, 16, 256, (0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 3.0), 1000, 5, 200, 64),
}


def how(sizes: Sizes) -> str:
    return (
        f"`seqcore.diagnostics.gradient_flow`: layers of {sizes.H} units with torch's default initial weights (and an "
        f"LSTM whose forget-gate bias is ln(T)), {sizes.B} random sequences of {sizes.T:,} steps with unit variance, "
        "the loss is the sum of the last output, everything in float64; the norm of ∂L/∂h_t (of a layer of attention, "
        "of ∂L/∂x_t: a position's state is its input) for every t, and its factor a step, fitted. A gradient "
        f"vanishes or explodes, here, if its norm at the first step is less than 1/{10**DECADES:,.0f} of that at the "
        f"last, or more than {10**DECADES:,.0f} times it. The same of RNNs whose recurrent matrix is orthogonal times "
        f"a gain, so that its spectral radius is the gain, over {sizes.gain_T:,} steps. {sizes.seeds} seeds. "
        f"`step_jacobians`, {sizes.jacobian_H} units: J_t = ∂h_t/∂h_(t-1) (of an LSTM, of h and c together), its "
        f"singular values, and those of products of up to {sizes.jacobian_T} in a row. The slope of the "
        "sigmoid: differentiated at a million places."
    )


def cases(sizes: Sizes) -> list[Case]:
    seeds = range(sizes.seeds)
    found = [{"part": "flow", "layer": layer, "seed": seed} for layer in LAYERS for seed in seeds]
    for nonlinearity in NONLINEARITIES:
        found += [
            {"part": "gain", "layer": nonlinearity, "gain": gain, "seed": seed}
            for gain in sizes.gains
            for seed in seeds
        ]
    found += [{"part": "jacobian", "layer": layer, "seed": seed} for layer in DEFAULTS for seed in seeds]
    return [*found, {"part": "slope", "layer": "sigmoid", "seed": 0}]


def measure(case: Case, sizes: Sizes, device: str) -> Row:
    torch.manual_seed(case["seed"])
    if case["part"] == "slope":
        x = torch.linspace(-20, 20, 1_000_001, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.sigmoid(x).sum(), x)
        return {"largest": slope.max().item()}
    T, H = (sizes.jacobian_T, sizes.jacobian_H) if case["part"] == "jacobian" else (sizes.T, sizes.H)
    # On every device the reference computes in float64.
    x = torch.randn(T, sizes.B, H, dtype=torch.float64, device=device)
    if case["part"] == "jacobian":
        return _jacobians(RECURRENT[case["layer"]](H, H, backend="reference").to(x), x[:, :1])
    if case["part"] == "gain":
        x = x[: sizes.gain_T]
        layer = RNN(H, H, nonlinearity=case["layer"], backend=_backend(device)).to(x)
        return _flow(gradient_flow(orthogonal_recurrent_(layer, case["gain"]), x)["h"])
    return _flow(_of_layer(case["layer"], H, x))


def _backend(device: str) -> str:
    # torch's operators are the faster ones in float64, which no kernel of ours takes.
    return "aten" if device == "cpu" else "reference"


def _of_layer(layer: str, H: int, x: Tensor):
    if layer == "sigmoid":
        return gradient_flow(SigmoidRNN(H, H).to(x), x, loss=Tensor.sum, watch=["cell"])["cell.h"]
    if layer == "attention":
        module = MultiheadAttention(H, HEADS, backend=_backend(x.device.type)).to(x)
        mask = causal_mask(len(x), x.device)
        return gradient_flow(module, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)["input"]
    module = RECURRENT["lstm" if layer == LONG else layer](H, H, backend=_backend(x.device.type)).to(x)
    if layer == LONG:
        forget_gate_bias_(module, math.log(len(x)))
    return gradient_flow(module, x)["h"]


def _flow(flow) -> Row:
    norms = flow.norms.flip(0).tolist()
    last = len(norms) - 1
    kept = sorted({*thinned(last, POINTS), min(1, last), min(FAR, last)})
    return {
        "rate": flow.rate,
        # Without the last step, which the loss is closest to.
        "rate_from_1": finite(replace(flow, norms=flow.norms[:-1]).rate),
        "verdict": flow.verdict,
        "lags": kept,
        "log10_norms": [math.log10(norms[lag]) if norms[lag] > 0 else None for lag in kept],
    }


def _jacobians(module: nn.Module, x: Tensor) -> Row:
    found = step_jacobians(module, x)
    products = found.products()[:, 0]
    return {
        "growth": found.growth,
        "largest": found.singular_values[:, 0].amax(-1).median().item(),
        "smallest": found.singular_values[:, 0].amin(-1).median().item(),
        "lags": list(range(1, len(products) + 1)),
        "log10_largest": products.amax(-1).tolist(),
        "rate": gradient_flow(module, x)["h"].rate,
    }


def _every(rows: list[Row], fate: str) -> bool | None:
    """True if every repeat is vanishing, exploding or steady, False if none is, else None."""
    return beyond(spread(row["verdict"] == fate for row in rows), 0)


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [_vanish(rows), _sigmoid(rows), _gates(rows), _bias(rows), _explode(rows), _jacobian(rows), _attention(rows)]


def _vanish(rows: list[Row]) -> Verdict:
    found = [row for layer in DEFAULTS for row in select(rows, part="flow", layer=layer)]
    vanishing = [layer for layer in DEFAULTS if _every(select(found, layer=layer), "vanishing")]
    each = "; ".join(f"{LAYERS[layer]} {rates(found, layer=layer)}" for layer in DEFAULTS)
    return Verdict(
        "Gradients through a recurrence vanish: ∂L/∂h_t shrinks with every step back.",
        _every(found, "vanishing"),
        f"With torch's initial weights the norm changes by these factors a step: {each}. "
        f"Vanishing with every seed: {', '.join(LAYERS[layer] for layer in vanishing) or 'none'}.",
    )


def _sigmoid(rows: list[Row]) -> Verdict:
    slope = select(rows, part="slope")[0]["largest"]
    own, tanh = (rates(rows, part="flow", layer=layer) for layer in ("sigmoid", "rnn"))
    faster = order_of(tanh, own)
    holds = None if faster is None else faster and slope <= 0.25
    return Verdict(
        "A sigmoid's slope is at most 0.25, so through sigmoids gradients vanish faster.",
        holds,
        f"The largest slope found is {slope:.6g}. A factor of {own} a step with sigmoids, of {tanh} with tanh and "
        "weights drawn alike.",
    )


def _gates(rows: list[Row]) -> Verdict:
    of = {layer: select(rows, part="flow", layer=layer) for layer in DEFAULTS}
    vanishing = [_every(of[layer], "vanishing") for layer in ("gru", "lstm")]
    better = all_of([order_of(rates(of[layer]), rates(of["rnn"])) for layer in ("gru", "lstm")])
    lefts = ", ".join(f"{left(found)} in the {LAYERS[layer]}" for layer, found in of.items())
    return Verdict(
        "Gates cure vanishing: GRU and LSTM keep gradients alive from the start.",
        False if True in vanishing else None if None in vanishing else better,
        f"Of the gradient's norm {far(of['rnn'])} steps leave {lefts}.",
    )


def _bias(rows: list[Row]) -> Verdict:
    found = select(rows, part="flow", layer=LONG)
    alive = [row["verdict"] != "vanishing" for row in found]
    return Verdict(
        "An LSTM whose forget gate begins open keeps gradients alive.",
        beyond(spread(alive), 0),
        f"With a forget-gate bias of ln(T): a factor of {rates(found)} a step, {left(found)} of the norm left after "
        f"{far(found)} steps; {sum(alive)} of {len(alive)} seeds do not vanish.",
    )


def _explode(rows: list[Row]) -> Verdict:
    answers, each = [], []
    for layer in NONLINEARITIES:
        found = [row for row in select(rows, part="gain", layer=layer) if row["gain"] > 1]
        of = {gain: select(found, gain=gain) for gain in sorted(values(found, "gain"))}
        fates = {fate: [gain for gain in of if _every(of[gain], fate)] for fate in ("exploding", "vanishing")}
        answers.append(False if fates["vanishing"] else True if of and fates["exploding"] == [*of] else None)
        factors = ", ".join(f"{rates(of[gain])} at {gain:g}" for gain in of)
        with_every = (f"{fate} with every seed at {_listed(gains)}" for fate, gains in fates.items())
        each.append(f"With {layer} the factor a step by spectral radius is {factors}; {', '.join(with_every)}.")
    why = " The slope of the nonlinearity belongs into the product as well." if False in answers else ""
    return Verdict(
        "Gradients explode as soon as the recurrent matrix has a spectral radius above 1.",
        all_of(answers),
        f"{' '.join(each)}{why}",
    )


def _listed(gains: list[float]) -> str:
    return ", ".join(f"{gain:g}" for gain in gains) or "none"


def _jacobian(rows: list[Row]) -> Verdict:
    found = select(rows, part="jacobian")
    apart = max(abs(math.log(row["growth"]) - math.log(row["rate"])) for row in found)
    each = "; ".join(
        f"{LAYERS[layer]}: largest singular value of one step {spread(r['largest'] for r in of)}, of the product "
        f"{spread(r['growth'] for r in of)} a step, gradient {rates(of)}"
        for layer in values(found, "layer")
        for of in [select(found, layer=layer)]
    )
    return Verdict(
        "By the chain rule what becomes of a gradient is decided by the product of the step Jacobians.",
        apart < SAME,
        f"The logarithms of its factor a step and of the gradient's differ by at most {apart:.2g}; below {SAME} they "
        f"count as the same. {each}.",
    )


def _attention(rows: list[Row]) -> Verdict:
    found = select(rows, part="flow", layer="attention")
    last = found[0]["lags"][-1]
    changes = spread(change(row, 1, last) for row in found)
    itself = spread(change(row, 1, 0) for row in found)
    a_step = spread(row["rate_from_1"] for row in found).text("{:.5g}".format)
    return Verdict(
        "Attention has a path of length one to every position, so its gradient does not depend on the distance.",
        beyond(spread(1 / EVEN <= each <= EVEN for each in changes.values), 0),
        f"From lag 1 to lag {last:,} the norm changes by a factor of {changes} in all, "
        f"{a_step} a step; up to {EVEN} either way counts as independent. Lag 0 stands apart with {itself} times the "
        "norm at lag 1: the last position is the one that asks.",
    )


draw, table = gradient_pictures.draw, gradient_pictures.table
