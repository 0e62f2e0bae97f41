"""RNN, GRU and LSTM over whole sequences, and single steps of them.

Definitions: https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers; what ``lengths`` and ``reset`` mean stands
in ``seqcore/reference/recurrence.py``. Shapes: T time, B batch, I input, H hidden, P projection (H if there is none),
L layers, D directions, G gates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import backends
from ..autograd import recurrence as autograd
from ..reference import recurrence as reference
from .autocast import cast, target_dtype
from .recurrence_checks import Problem, check_cell, check_sequence

State = Tensor | tuple[Tensor, Tensor]
_ATEN = {"rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu, "gru": torch.gru, "lstm": torch.lstm}
_ATEN_CELL = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "gru": torch.gru_cell,
    "lstm": torch.lstm_cell,
}


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman recurrence: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu of the same.

    Args:
        input: [T, B, I], [B, T, I] if ``batch_first``, [T, I] unbatched, or a PackedSequence; float32, float16,
            bfloat16 (any float dtype for the reference).
        hx: [L*D, B, H] ([L*D, H] unbatched) or None for zeros.
        weights: for each layer and direction w_ih [H, I or D*H], w_hh [H, H] and, if ``bias``, b_ih [H], b_hh [H].
        nonlinearity: "tanh" or "relu".
        dropout: probability, between layers, applied if ``training``.
        lengths: [B] integers; past its length a sequence's state is carried through and y is zero.
        reset: [T, B] bool ([B, T] if ``batch_first``); True replaces the state entering that step by zeros.
        backend: see ``seqcore.use_backend``.

    Returns:
        y [T, B, D*H] in the input's layout, and h_n shaped like ``hx``.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: if the backend was named and cannot serve the request.
    """
    cell = _rnn_cell_name(nonlinearity)
    return _sequence(
        cell, input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional,
        lengths, reset, backend,
    )  # fmt: skip


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Gated recurrent unit, resetting after the product as torch does: h_t = (1 - z) n + z h_{t-1}.

    r and z are sigmoids of W_i x_t + b_i + W_h h_{t-1} + b_h; n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)).
    Weights are stacked in the order r, z, n: w_ih [3H, I], w_hh [3H, H], biases [3H]. All else as :func:`rnn`.
    Source: Cho et al. (2014), in the variant of ``torch.nn.GRU``.
    """
    return _sequence(
        "gru", input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional,
        lengths, reset, backend,
    )  # fmt: skip


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """Long short-term memory: c_t = f c_{t-1} + i g, h_t = W_hr (o tanh c_t), W_hr absent without projection.

    Weights are stacked in the order i, f, g, o: w_ih [4H, I], w_hh [4H, P], biases [4H], and w_hr [P, H] last if
    the output is projected. ``hx`` is (h_0 [L*D, B, P], c_0 [L*D, B, H]); returned are y and (h_n, c_n). ``c`` is
    kept in float32 over the sequence. All else as :func:`rnn`. Source: Hochreiter & Schmidhuber (1997), Sak et
    al. (2014) for the projection, in the form of ``torch.nn.LSTM``.
    """
    return _sequence(
        "lstm", input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional,
        lengths, reset, backend,
    )  # fmt: skip


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise backends.InvalidInput(f"unknown nonlinearity: got {nonlinearity!r}, allowed are 'tanh' and 'relu'")
    return f"rnn_{nonlinearity}"


def _sequence(
    cell, input, hx, weights, num_layers, bias, batch_first, dropout, training, bidirectional, lengths, reset, backend
):
    problem = check_sequence(cell, input, hx, weights, num_layers, bias, batch_first, bidirectional, lengths, reset)
    if not 0 <= dropout <= 1:
        raise backends.InvalidInput(f"dropout probability has to be between 0 and 1, but got {dropout}")
    chosen = backends.choose(_request(problem), backend)
    if chosen == "aten":
        y, h_n, c_n = _aten(problem, dropout, training)
    else:
        y, h_n, c_n = reference.stack(
            _layer_function(problem, chosen), problem.x, problem.h0, problem.c0, problem.weights,
            dropout=dropout, training=training,
        )  # fmt: skip
    return problem.finish(y, h_n, c_n)


def _request(problem: Problem) -> backends.Request:
    features = {
        "packed input": problem.batch_sizes is not None,
        "lengths": problem.lengths is not None,
        "reset": problem.reset is not None,
        "proj_size": problem.weights[0][0].w_hr is not None,
    }
    return backends.Request(
        family="recurrence",
        operation=problem.cell,
        device=backends.describe(problem.x.device),
        dtype=target_dtype(problem.x),
        features=tuple(name for name, present in features.items() if present),
        transformed=backends.transforms_active(),
    )


def _layer_function(problem: Problem, chosen: str) -> reference.Layer:
    """One layer of ``problem`` on our kernels or the reference, following autocast as torch's operators do."""
    cell, batch_sizes, lengths, reset = problem.cell, problem.batch_sizes, problem.lengths, problem.reset

    def layer(x, h0, c0, weights):
        x, h0, c0 = cast(x, h0, c0)
        weights = [reference.Weights(*cast(*direction)) for direction in weights]
        if chosen == "triton":
            settings = autograd.Settings(cell, len(weights), problem.bias)
            return autograd.layer(settings, x, h0, c0, batch_sizes, lengths, reset, weights)
        steps = reference.padded_steps(*x.shape[:2]) if batch_sizes is None else reference.packed_steps(batch_sizes)
        return reference.layer(cell, x, h0, c0, weights, steps, lengths, reset)

    return layer


def _aten(problem: Problem, dropout: float, training: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    hx = problem.h0 if problem.c0 is None else (problem.h0, problem.c0)
    flat = [w for layer in problem.weights for direction in layer for w in direction if w is not None]
    options = (problem.bias, len(problem.weights), dropout, training, len(problem.weights[0]) == 2)
    function = _ATEN[problem.cell]
    if problem.batch_sizes is None:
        y, *state = function(problem.x, hx, flat, *options, False)
    else:
        y, *state = function(problem.x, problem.batch_sizes, hx, flat, *options)
    return y, state[0], state[1] if problem.c0 is not None else None


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`rnn`: input [B, I] or [I], hx [B, H] or [H] or None for zeros, to the next h."""
    return _cell(_rnn_cell_name(nonlinearity), input, hx, (w_ih, w_hh, b_ih, b_hh), backend)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`gru`: input [B, I] or [I], hx [B, H] or [H] or None for zeros, to the next h."""
    return _cell("gru", input, hx, (w_ih, w_hh, b_ih, b_hh), backend)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: input [B, I] or [I], hx two of [B, H] or [H] or None for zeros, to the next (h, c)."""
    return _cell("lstm", input, hx, (w_ih, w_hh, b_ih, b_hh), backend)


def _cell(cell, input, hx, weights, backend):
    """A cell is a sequence of one step, except for torch's own operators, which have their own."""
    problem = check_cell(cell, input, hx, reference.Weights(*weights))
    chosen = backends.choose(_request(problem), backend)
    if chosen == "aten":
        h = problem.h0[0] if problem.c0 is None else (problem.h0[0], problem.c0[0])
        new = _ATEN_CELL[cell](problem.x[0], h, *weights)
        h_n, c_n = (new, None) if problem.c0 is None else new
    else:
        layer = _layer_function(problem, chosen)
        _, h_n, c_n = layer(problem.x, problem.h0, problem.c0, problem.weights[0])
        h_n, c_n = h_n[0], None if c_n is None else c_n[0]
    if problem.unbatched:
        h_n, c_n = h_n[0], None if c_n is None else c_n[0]
    return h_n if c_n is None else (h_n, c_n)
