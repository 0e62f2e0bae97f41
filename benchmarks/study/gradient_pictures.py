"""The picture and the tables of gradients through time, and what both and the verdicts read from rows."""

from matplotlib.figure import Figure

from benchmarks.reporting.plot_kit import name_ends, panels
from benchmarks.reporting.tables import table as markdown
from benchmarks.study import drawing
from benchmarks.study.experiment import Row, Spread, select, spread, values

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
JACOBIAN_KEYS = ("largest", "smallest", "growth", "rate")
NONLINEARITIES = {"tanh": "#E69F00", "relu": "#56B4E9"}
# A line that ends before this share of the axis has its name at its own end.
EARLY = 0.8
LOOKS = {"sigmoid": ("#CC79A7", drawing.SOLID), LONG: ("#0072B2", drawing.DASHED)}
# The lag that stands for a long way back.
FAR = 100


def rates(rows: list[Row], **wanted) -> Spread:
    return spread(row["rate"] for row in select(rows, **wanted))


def far(rows: list[Row]) -> int:
    """That lag, or the last where there are fewer."""
    return min(FAR, rows[0]["lags"][-1])


def change(row: Row, first: int, second: int) -> float:
    """The norm at the second lag over that at the first; 0 where nothing of it is left."""
    at = dict(zip(row["lags"], row["log10_norms"], strict=True))
    return 0.0 if at[second] is None or at[first] is None else 10 ** (at[second] - at[first])


def left(rows: list[Row]) -> str:
    """What is left of the norm there."""
    return spread(change(row, 0, far(rows)) for row in rows).text("{:.1e}".format)


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
        end = max(points), spread(points[max(points)]).median
        if end[0] < EARLY * rows[0]["lags"][-1]:
            ax.annotate(name, end, (6, 0), textcoords="offset points", color=color, fontweight="bold", va="center")
        else:
            ends.append((end[1], name, color))
    ax.set(xlabel="lag (steps back)", ylabel="log10 |∂L/∂h_t| / |∂L/∂h_T|", title="Gradient over lag")
    name_ends(ax, ends)


def _draw_gain(ax, rows: list[Row]) -> None:
    ends = []
    for layer, color in NONLINEARITIES.items():
        gains = sorted(values(select(rows, layer=layer), "gain"))
        points = [(gain, rates(rows, layer=layer, gain=gain).values) for gain in gains]
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
    flow, jacobian = (select(rows, part=part) for part in ("flow", "jacobian"))
    return "\n\n".join(
        [
            _flow_table("layer, as initialised", [(LAYERS[layer], select(flow, layer=layer)) for layer in LAYERS]),
            _flow_table(
                "RNN by spectral radius",
                [
                    (f"{layer}, {gain:g}", select(rows, part="gain", layer=layer, gain=gain))
                    for layer in NONLINEARITIES
                    for gain in sorted(values(select(rows, part="gain", layer=layer), "gain"))
                ],
            ),
            markdown(
                ["step Jacobians", "largest singular value", "smallest", "product, factor a step", "gradient's"],
                [
                    [LAYERS[layer]]
                    + [str(spread(row[key] for row in select(jacobian, layer=layer))) for key in JACOBIAN_KEYS]
                    for layer in DEFAULTS
                ],
            ),
        ]
    )


def _flow_table(first: str, lines: list[tuple[str, list[Row]]]) -> str:
    return markdown(
        [first, "factor a step", f"left after {far(lines[0][1])} steps", "verdict"],
        [[name, str(rates(found)), left(found), ", ".join(values(found, "verdict"))] for name, found in lines],
    )
