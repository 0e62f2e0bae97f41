"""Gradients through time: how they vanish, when they explode, and which layers keep them."""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.reporting.plot_kit import name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Case, Row, Verdict, all_of, order_of, select, spread, values
from benchmarks.study.models import RECURRENT, causal_mask
from seqcore.diagnostics import gradient_flow, step_jacobians
from seqcore.nn import RNN, MultiheadAttention
from seqcore.nn.init import forget_gate_bias_, orthogonal_recurrent_

TITLE = "Gradients through time"
QUESTION = (
    "The loss stands at the end of a sequence. How much of its gradient arrives at the state of each earlier step, "
    "before any training, and what decides that?"
)
ALONE = False
HEADS = 2
# As many lags of a curve are kept.
POINTS = 40
LONG = "lstm_long"
LAYERS = {
    "sigmoid": "RNN, sigmoid",
    "rnn": "RNN, tanh",
    "gru": "GRU",
    "lstm": "LSTM",
    LONG: "LSTM, bias ln(T)",
    "attention": "attention",
}
DEFAULTS = ("rnn", "gru", "lstm")
LOOKS = {"sigmoid": ("#E69F00", drawing.DASHED), LONG: ("#0072B2", drawing.DASHED)}


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


class SigmoidRNN(nn.Module):
    """h_t = s(W_ih x_t + W_hh h_{t-1} + b), in a loop of its own: no module of torch.nn has this nonlinearity."""

    def __init__(self, I: int, H: int):
        super().__init__()
        self.cell = SigmoidCell(I, H)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.cell.recurrent.in_features)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


class SigmoidCell(nn.Module):
    """One step of it, with the initial weights of ``torch.nn.RNN``."""

    def __init__(self, I: int, H: int):
        super().__init__()
        self.input, self.recurrent = nn.Linear(I, H), nn.Linear(H, H)
        for weight in self.parameters():
            nn.init.uniform_(weight, -1 / math.sqrt(H), 1 / math.sqrt(H))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.sigmoid(self.input(x) + self.recurrent(h))


def how(sizes: Sizes) -> str:
    return (
        f"`seqcore.diagnostics.gradient_flow`: layers of {sizes.H} units with torch's default initial weights (and an "
        f"LSTM whose forget-gate bias is ln(T)), {sizes.B} random sequences of {sizes.T:,} steps with unit variance, "
        "the loss is the sum of the last output, everything in float64; the norm of ∂L/∂h_t (of a layer of attention, "
        "of ∂L/∂x_t: a position's state is its input) for every t, and its factor a step, fitted. The same of RNNs "
        "whose recurrent matrix is orthogonal times a gain, so that its spectral radius is the gain, over "
        f"{sizes.gain_T:,} steps. {sizes.seeds} seeds. `step_jacobians`, {sizes.jacobian_H} units: J_t = ∂h_t/∂h_(t-1) "
        f"(of an LSTM, of h and c together), its singular values, and those of products of up to {sizes.jacobian_T} in "
        "a row. The slope of the sigmoid: differentiated at a million places."
    )


def cases(sizes: Sizes) -> list[Case]:
    seeds = range(sizes.seeds)
    found = [{"part": "flow", "layer": layer, "seed": seed} for layer in LAYERS for seed in seeds]
    for nonlinearity in ("tanh", "relu"):
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
    kept = sorted({round((len(norms) - 1) * i / (POINTS - 1)) for i in range(POINTS)})
    return {
        "rate": flow.rate,
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


def _rates(rows: list[Row], **wanted) -> list[float]:
    return [row["rate"] for row in select(rows, **wanted)]


def _rate(rows: list[Row], **wanted) -> str:
    return spread(_rates(rows, **wanted)).text("{:.3g}".format)


def verdicts(rows: list[Row]) -> list[Verdict]:
    return [_vanish(rows), _sigmoid(rows), _gates(rows), _bias(rows), _explode(rows), _jacobian(rows), _attention(rows)]


def _vanish(rows: list[Row]) -> Verdict:
    found = select(rows, part="flow")
    vanishing = [layer for layer in DEFAULTS if all(r["verdict"] == "vanishing" for r in select(found, layer=layer))]
    each = "; ".join(f"{LAYERS[layer]} {_rate(found, layer=layer)}" for layer in DEFAULTS)
    return Verdict(
        "Gradients through a recurrence vanish: ∂L/∂h_t shrinks with every step back.",
        True if len(vanishing) == len(DEFAULTS) else None if vanishing else False,
        f"With torch's initial weights the norm changes by these factors a step: {each}. "
        f"Vanishing with every seed: {', '.join(LAYERS[layer] for layer in vanishing) or 'none'}.",
    )


def _sigmoid(rows: list[Row]) -> Verdict:
    slope = select(rows, part="slope")[0]["largest"]
    own, tanh = (spread(_rates(rows, part="flow", layer=layer)) for layer in ("sigmoid", "rnn"))
    faster = order_of(tanh, own)
    holds = None if faster is None else faster and slope <= 0.25
    return Verdict(
        "A sigmoid's slope is at most 0.25, so through sigmoids gradients vanish faster.",
        holds,
        f"The largest slope found is {slope:.6g}. A factor of {own} a step with sigmoids, of {tanh} with tanh and "
        "weights drawn alike.",
    )


def _gates(rows: list[Row]) -> Verdict:
    rate = {layer: spread(_rates(rows, part="flow", layer=layer)) for layer in DEFAULTS}
    better = [order_of(rate[layer], rate["rnn"]) for layer in ("gru", "lstm")]
    gated = [row for layer in ("gru", "lstm") for row in select(rows, layer=layer, part="flow")]
    cured = all(row["verdict"] != "vanishing" for row in gated)
    left = ", ".join(f"{rate[layer].median ** 100:.1e} in the {LAYERS[layer]}" for layer in DEFAULTS)
    return Verdict(
        "Gates cure vanishing: GRU and LSTM keep gradients alive from the start.",
        False if not cured else all_of(better),
        f"Of the gradient's norm 100 steps leave {left}.",
    )


def _bias(rows: list[Row]) -> Verdict:
    found = select(rows, part="flow", layer=LONG)
    alive = [row["verdict"] != "vanishing" for row in found]
    holds = all(alive) if all(alive) or not any(alive) else None
    return Verdict(
        "An LSTM whose forget gate begins open keeps gradients alive.",
        holds,
        f"With a forget-gate bias of ln(T): a factor of {spread(_rates(found))} a step; "
        f"{sum(alive)} of {len(alive)} seeds do not vanish.",
    )


def _explode(rows: list[Row]) -> Verdict:
    found = select(rows, part="gain")
    beyond = sorted(gain for gain in values(found, "gain") if gain > 1)
    explode = [gain for gain in beyond if all(rate > 1 for rate in _rates(found, gain=gain))]
    shrink = [gain for gain in beyond if all(rate < 1 for rate in _rates(found, gain=gain))]
    each = "; ".join(
        f"{gain:g}: {_rate(found, gain=gain, layer='tanh')} (tanh), {_rate(found, gain=gain, layer='relu')} (relu)"
        for gain in beyond
    )
    why = " The slope of the nonlinearity belongs into the product as well." if shrink else ""
    return Verdict(
        "Gradients explode as soon as the recurrent matrix has a spectral radius above 1.",
        False if shrink else True if explode == beyond and beyond else None,
        f"Factor a step by spectral radius: {each}. Exploding with every seed: "
        f"{', '.join(f'{gain:g}' for gain in explode) or 'none'}; shrinking all the same: "
        f"{', '.join(f'{gain:g}' for gain in shrink) or 'none'}.{why}",
    )


def _jacobian(rows: list[Row]) -> Verdict:
    found = select(rows, part="jacobian")
    apart = [abs(math.log(row["growth"]) - math.log(row["rate"])) / abs(math.log(row["rate"])) for row in found]
    each = "; ".join(
        f"{LAYERS[layer]}: largest singular value of one step {spread(r['largest'] for r in of)}, of the product "
        f"{spread(r['growth'] for r in of)} a step, gradient {spread(r['rate'] for r in of)}"
        for layer in values(found, "layer")
        for of in [select(found, layer=layer)]
    )
    return Verdict(
        "What becomes of a gradient is decided by the product of the step Jacobians.",
        max(apart) < 0.1,
        f"Its growth and the gradient's, as rates of decay, differ by at most {max(apart):.0%}. {each}.",
    )


def _attention(rows: list[Row]) -> Verdict:
    found = select(rows, part="flow", layer="attention")
    steady = [row["verdict"] == "steady" for row in found]
    return Verdict(
        "Attention has a path of length one to every position, so its gradient does not depend on the distance.",
        all(steady) if all(steady) or not any(steady) else None,
        f"A factor of {_rate(found)} a step over {max(found[0]['lags']):,} steps.",
    )


def draw(rows: list[Row]) -> tuple[Figure, str]:
    figure, ((flow, gain), (product, spectrum)) = panels(2, 2, 3.6)
    _draw_flow(flow, select(rows, part="flow"))
    _draw_gain(gain, select(rows, part="gain"))
    _draw_products(product, select(rows, part="jacobian"))
    _draw_singular(spectrum, select(rows, part="jacobian"))
    return figure, (
        "Top left: log10 of the norm of ∂L/∂h_t, beside that at the last step, over the lag (steps back from the "
        "loss); lines end where the norm is zero in float64. Top right: the factor by which it changes a step back, "
        "for RNNs over the spectral radius of their recurrent matrix; above the dotted line gradients explode. Bottom "
        "left: log10 of the largest singular value of products of step Jacobians over how many are multiplied. Bottom "
        "right: the largest and the smallest singular value of a single step's, the median over steps. Medians over "
        "seeds; bands and points show all seeds."
    )


def _draw_flow(ax, rows: list[Row]) -> None:
    ends = []
    for layer, name in LAYERS.items():
        color, dash = LOOKS.get(layer) or (drawing.style(layer)[0], drawing.SOLID)
        points: dict[int, list[float]] = {}
        for row in select(rows, layer=layer):
            for lag, norm in zip(row["lags"], row["log10_norms"], strict=True):
                if norm is not None and row["log10_norms"][0] is not None:
                    points.setdefault(lag, []).append(norm - row["log10_norms"][0])
        drawing.line(ax, sorted(points.items()), color, linestyle=dash)
        ends.append((spread(points[max(points)]).median, name, color))
    ax.set(xlabel="lag (steps back)", ylabel="log10 |∂L/∂h_t| / |∂L/∂h_T|", title="Gradient over lag")
    name_ends(ax, ends)


def _draw_gain(ax, rows: list[Row]) -> None:
    ends = []
    for layer, color in (("tanh", "#E69F00"), ("relu", "#56B4E9")):
        gains = sorted(values(select(rows, layer=layer), "gain"))
        points = [(gain, _rates(rows, layer=layer, gain=gain)) for gain in gains]
        drawing.line(ax, points, color, "o")
        ends.append((spread(points[-1][1]).median, f"RNN, {layer}", color))
    drawing.level(ax, 1.0, "unchanged")
    ax.set(xlabel="spectral radius of W_hh", ylabel="factor a step back", title="When gradients explode")
    name_ends(ax, ends)


def _draw_products(ax, rows: list[Row]) -> None:
    ends = []
    for layer in DEFAULTS:
        found, (color, _) = select(rows, layer=layer), drawing.style(layer)
        points = list(zip(found[0]["lags"], zip(*(row["log10_largest"] for row in found), strict=True), strict=True))
        drawing.line(ax, points, color)
        ends.append((spread(points[-1][1]).median, LAYERS[layer], color))
    ax.set(xlabel="Jacobians multiplied", ylabel="log10 of the largest", title="Products of step Jacobians")
    name_ends(ax, ends)


def _draw_singular(ax, rows: list[Row]) -> None:
    for place, layer in enumerate(DEFAULTS):
        found, (color, mark) = select(rows, layer=layer), drawing.style(layer)
        for key in ("largest", "smallest"):
            drawing.repeats(ax, place, [row[key] for row in found], color, mark)
    drawing.level(ax, 1.0, "length kept")
    ax.set_xticks(range(len(DEFAULTS)), [LAYERS[layer] for layer in DEFAULTS])
    ax.set(ylabel="singular value", title="One step's Jacobian: largest and smallest", xlim=(-0.6, len(DEFAULTS) - 0.4))


def table(rows: list[Row]) -> str:
    lines = []
    for layer, name in LAYERS.items():
        found = select(rows, part="flow", layer=layer)
        rate = spread(_rates(found))
        said = ", ".join(values(found, "verdict"))
        lines.append([name, str(rate), f"{rate.median**100:.1e}", said])
    return markdown(["layer, as initialised", "factor a step", "left after 100 steps", "verdict"], lines)
