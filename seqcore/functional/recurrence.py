"""RNN, GRU and LSTM over whole sequences, and single steps of them.

Definitions: https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers; what ``lengths`` and ``reset`` mean stands
in ``seqcore/reference/recurrence.py``. Shapes: T time, B batch, I input, H hidden, P projection (H if there is none),
L layers, D directions, G gates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import backends, devices
from ..autograd import recurrence as autograd
from ..capabilities import Request, transforms_active
from ..cells import BUILT_IN, ZONEOUT, Cell, find
from ..kernels.recurrence.plan import Shape
from ..reference import recurrence as reference
from ..reference.recurrence import hidden_size
from .autocast import cast, target_dtype
from .dropout import between_layers
from .recurrence_checks import check_cell, check_sequence
from .recurrence_problem import Options, Problem
from .sharded import sharded
from .zoneout import Zoneout, kept

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
    reset_hx: State | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    locked: bool = False,
    zoneout: Zoneout = 0.0,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman recurrence: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu of the same.

    Args:
        input: [T, B, I], [B, T, I] if ``batch_first``, [T, I] unbatched, or a PackedSequence; float32, float16,
            bfloat16 (any float dtype for the reference).
        hx: [L*D, B, H] ([L*D, H] unbatched) or None for zeros.
        weights: for each layer and direction w_ih [H, I or D*H], w_hh [H, H] and, if ``bias``, b_ih [H], b_hh [H].
            w_hh may also be block-diagonal, [1, N, H/N, H/N]: N independent recurrences of H/N units each.
        nonlinearity: "tanh" or "relu".
        dropout: probability, between layers, applied if ``training``.
        lengths: [B] integers; past its length a sequence's state is carried through and y is zero.
        reset: [T, B] bool ([B, T] if ``batch_first``); True replaces the state entering that step by zeros,
            or by ``reset_hx``, shaped like ``hx`` and as differentiable.
        grad_clip: bound on each element of the gradients of the gates' pre-activations, at every step, before they
            travel on (Graves, "Generating Sequences With Recurrent Neural Networks", 2013, section 2.1).
        recompute: keep only y (and c) for backward, and make the gates again there with one more product. The
            reference keeps what autograd keeps, all the same.
        locked: draw one mask of ``dropout`` per sequence and feature, for all time steps; see :func:`locked_dropout`.
            Without ``dropout`` or a second layer nothing is dropped, and it changes nothing.
        zoneout: probability of each unit to keep the state it entered a step with, drawn anew for every step and
            sequence if ``training``; else the expectation, h_t = zoneout h_{t-1} + (1 - zoneout) h~_t. Not with a
            projection. At each step h is rounded to the input's dtype, as always: in 16 bits, what is left of a step
            by a zoneout near 1 may be too little to move it. Source: Krueger et al., "Zoneout: Regularizing RNNs by
            Randomly Preserving Hidden Activations" (2017).
        backend: see ``seqcore.use_backend``.

    Returns:
        y [T, B, D*H] in the input's layout, and h_n shaped like ``hx``.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: if the backend was named and cannot serve the request.
    """
    cell = _rnn_cell_name(nonlinearity)
    options = Options(
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, reset, reset_hx, grad_clip, recompute,
        locked=locked, zoneout=zoneout,
    )  # fmt: skip
    return _sequence(cell, input, hx, weights, options, backend)


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
    reset_hx: State | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    locked: bool = False,
    zoneout: Zoneout = 0.0,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Gated recurrent unit, resetting after the product as torch does: h_t = (1 - z) n + z h_{t-1}.

    r and z are sigmoids of W_i x_t + b_i + W_h h_{t-1} + b_h; n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)).
    Weights are stacked in the order r, z, n: w_ih [3H, I], w_hh [3H, H], biases [3H]. All else as :func:`rnn`.
    Source: Cho et al. (2014), in the variant of ``torch.nn.GRU``.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, reset, reset_hx, grad_clip, recompute,
        locked=locked, zoneout=zoneout,
    )  # fmt: skip
    return _sequence("gru", input, hx, weights, options, backend)


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
    reset_hx: State | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    return_cells: bool = False,
    locked: bool = False,
    zoneout: Zoneout = 0.0,
    backend: str | None = None,
):
    """Long short-term memory: c_t = f c_{t-1} + i g, h_t = W_hr (o tanh c_t), W_hr absent without projection.

    Weights are stacked in the order i, f, g, o: w_ih [4H, I], w_hh [4H, P], biases [4H], and w_hr [P, H] last if
    the output is projected. ``hx`` is (h_0 [L*D, B, P], c_0 [L*D, B, H]); returned are y and (h_n, c_n), and, if
    ``return_cells``, the last layer's c of every step, [T, B, D*H] in the input's layout and as differentiable as y.
    ``c`` is kept in float32 over the sequence. ``zoneout`` is of both states, or a pair, of h and of c; h~ = o tanh(c~)
    is made of the c that a step computes, whether the unit then keeps the old one or not. All else as :func:`rnn`.
    Source: Hochreiter & Schmidhuber (1997), Sak et al. (2014) for the projection, in the form of ``torch.nn.LSTM``.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, reset, reset_hx, grad_clip,
        recompute, return_cells, locked, zoneout,
    )  # fmt: skip
    return _sequence("lstm", input, hx, weights, options, backend)


def recurrence(
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    cell: Cell | str,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_hx: State | None = None,
    grad_clip: float | None = None,
    recompute: bool = False,
    return_cells: bool = False,
    locked: bool = False,
    zoneout: Zoneout = 0.0,
    backend: str | None = None,
):
    """Any cell over a sequence: a ``seqcore.Cell`` of your own, or "rnn_tanh", "rnn_relu", "gru" or "lstm".

    With G the cell's gates, weights are w_ih [G*H, I or D*H], w_hh [G*H, H] and, if ``bias``, b_ih and b_hh [G*H].
    ``hx`` is h_0 [L*D, B, H], or (h_0, c_0) for cells with c; returned are y and the last state, and every step's c
    if ``return_cells``. All else as :func:`rnn` and :func:`lstm`; ``zoneout`` is for those four by name.
    """
    options = Options(
        num_layers, bias, batch_first, dropout, training, bidirectional, lengths, reset, reset_hx, grad_clip,
        recompute, return_cells, locked, zoneout,
    )  # fmt: skip
    return _sequence(find(cell).name, input, hx, weights, options, backend)


def _rnn_cell_name(nonlinearity: str) -> str:
    if not isinstance(nonlinearity, str) or nonlinearity not in ("tanh", "relu"):
        raise backends.InvalidInput(f"unknown nonlinearity: got {nonlinearity!r}, allowed are 'tanh' and 'relu'")
    return f"rnn_{nonlinearity}"


def _sequence(cell: str, input, hx, weights, options: Options, backend: str | None):
    problem = check_sequence(cell, input, hx, weights, options)
    chosen = backends.choose(_request(problem, options), backend)
    between = between_layers(problem, options)
    tensors = problem.x, problem.h0, problem.c0, problem.weights
    if chosen == "aten" and (between is None or not options.locked):
        y, h_n, c_n, cells = _aten(problem, *tensors, options.dropout, options.training)
    else:
        y, h_n, c_n, cells = reference.stack(_layer_function(problem, options, chosen), *tensors, between)
    return problem.finish(y, h_n, c_n, cells if options.return_cells else None)


def _request(problem: Problem, options: Options, one_step: bool = False) -> Request:
    cell = find(problem.cell)
    features = {
        "packed input": problem.batch_sizes is not None,
        "lengths": problem.lengths is not None,
        "reset": problem.reset is not None,
        "proj_size": problem.weights[0][0].w_hr is not None,
        "blocks": problem.blocks > 1,
        "grad_clip": options.grad_clip is not None,
        "recompute": options.recompute,
        "return_cells": options.return_cells,
        "zoneout": bool(problem.zoneout),
        "a cell of one's own": cell not in BUILT_IN,
        "a cell without reference_backward": cell.reference_backward is None,
    }
    return Request(
        family="recurrence",
        operation=problem.cell,
        device=devices.describe(problem.x.device),
        dtype=target_dtype(problem.x),
        features=tuple(name for name, present in features.items() if present),
        shape=None if torch.compiler.is_compiling() else _shape(problem),
        transformed=transforms_active(),
        sharded=sharded(problem.x, problem.h0, problem.c0, problem.lengths, problem.reset, *problem.weights[0][0]),
        autocast=not one_step and target_dtype(problem.x) != problem.x.dtype,
    )


def _shape(problem: Problem) -> Shape:
    gates, directions = find(problem.cell).gates, len(problem.weights[0])
    units = hidden_size(problem.weights[0][0].w_hh, gates) // problem.blocks
    itemsize = target_dtype(problem.x).itemsize
    batch = problem.h0.shape[1] if problem.batch_sizes is not None else problem.x.shape[1]
    return Shape(gates, units, problem.blocks, batch, directions, itemsize, backward=False)


def _layer_function(problem: Problem, options: Options, chosen: str) -> reference.Layer:
    """One layer of ``problem`` by itself, following autocast as torch's operators do."""
    if chosen == "aten":
        return lambda x, h0, c0, weights: _aten(problem, x, h0, c0, [weights], 0.0, options.training)
    cell = ZONEOUT[problem.cell].name if problem.zoneout else problem.cell
    batch_sizes, lengths, reset = problem.batch_sizes, problem.lengths, problem.reset

    def layer(x, h0, c0, weights):
        x, h0, c0 = cast(x, h0, c0)
        weights = [reference.Weights(*cast(*direction)) for direction in weights]
        extra = None
        if problem.zoneout:
            extra = kept(problem.zoneout, x, h0.shape[-1], len(weights), options.training)
        if chosen == "triton":
            settings = autograd.Settings(
                cell, len(weights), problem.bias, options.grad_clip, options.recompute, options.return_cells
            )
            return autograd.layer(settings, x, h0, c0, batch_sizes, lengths, reset, weights, extra)
        steps = reference.padded_steps(*x.shape[:2]) if batch_sizes is None else reference.packed_steps(batch_sizes)
        return reference.layer(cell, x, h0, c0, weights, steps, lengths, reset, options.grad_clip, extra)

    return layer


def _aten(problem: Problem, x, h0, c0, weights, dropout: float, training: bool) -> reference.LayerResult:
    """The layers whose ``weights[layer][direction]`` these are, by torch's operator, which puts out no steps' c."""
    hx = h0 if c0 is None else (h0, c0)
    flat = [w for layer in weights for direction in layer for w in direction if w is not None]
    options = (problem.bias, len(weights), dropout, training, len(weights[0]) == 2)
    function = _ATEN[problem.cell]
    if problem.batch_sizes is None:
        y, *state = function(x, hx, flat, *options, False)
    else:
        y, *state = function(x, problem.batch_sizes, hx, flat, *options)
    return y, state[0], state[1] if c0 is not None else None, None


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
    options = Options(bias=problem.bias)
    chosen = backends.choose(_request(problem, options, one_step=True), backend)
    if chosen == "aten":
        h = problem.h0[0] if problem.c0 is None else (problem.h0[0], problem.c0[0])
        new = _ATEN_CELL[cell](problem.x[0], h, *weights)
        h_n, c_n = (new, None) if problem.c0 is None else new
    else:
        layer = _layer_function(problem, options, chosen)
        _, h_n, c_n, _ = layer(problem.x, problem.h0, problem.c0, problem.weights[0])
        h_n, c_n = h_n[0], None if c_n is None else c_n[0]
    if problem.unbatched:
        h_n, c_n = h_n[0], None if c_n is None else c_n[0]
    return h_n if c_n is None else (h_n, c_n)
