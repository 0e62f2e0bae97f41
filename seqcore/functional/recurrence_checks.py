"""What a recurrence may be given. Everything is checked here, before any launch, and brought into one form."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import find
from ..errors import InvalidInput
from ..reference.recurrence import Weights, group, hidden_size
from ..reference.sizes import is_zero
from .arguments import FLOATS, check_clip, check_flags, check_probability, check_strided
from .autocast import target_dtype
from .dropout import check_locked
from .recurrence_layout import check_lengths, check_packed, check_reset, packed_batch
from .recurrence_problem import Options, Problem
from .zoneout import probabilities


def check_sequence(
    cell: str,
    input: Tensor | PackedSequence,
    hx,
    weights: Sequence[Tensor],
    options: Options,
) -> Problem:
    """The ``Problem`` that these arguments of ``functional.lstm`` and its siblings pose.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
    """
    name = _shown(cell)
    _check_options(name, cell, options)
    batch_first, lengths, reset = options.batch_first, options.lengths, options.reset
    packed = input if isinstance(input, PackedSequence) else None
    x = input if packed is None else packed.data
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{name}: expected input to be a Tensor or a PackedSequence, got {type(x).__name__}")
    check_strided(name, "input", x)
    unbatched = False
    if packed is not None:
        if x.dim() != 2:
            raise InvalidInput(f"{name}: a PackedSequence's data must have 2 dimensions, got {x.dim()}")
        if not torch.compiler.is_compiling():
            check_packed(name, packed)
    else:
        if x.dim() not in (2, 3):
            raise InvalidInput(
                f"{name}: Expected input to be 2D or 3D, got {x.dim()}D instead; allowed are [T, B, I], "
                "[B, T, I] with batch_first=True, and [T, I]"
            )
        unbatched = x.dim() == 2
        if unbatched:
            x = x.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        if is_zero(x.shape[0]):
            raise InvalidInput(f"{name}: Expected sequence length to be larger than 0, got input {list(input.shape)}")
    directions = 2 if options.bidirectional else 1
    grouped = _check_weights(name, cell, x, weights, options.num_layers, options.bias, directions)
    hidden = hidden_size(grouped[0][0].w_hh, find(cell).gates)
    first = grouped[0][0]
    if is_zero(x.shape[-1]) or is_zero(first.w_hh.numel()):
        raise InvalidInput(
            f"{name}: input_size, hidden_size and proj_size must be greater than zero, got w_ih "
            f"{list(first.w_ih.shape)} and w_hh {list(first.w_hh.shape)}; give each at least one feature"
        )
    outputs = hidden if grouped[0][0].w_hr is None else grouped[0][0].w_hr.shape[0]
    zoneout = probabilities(name, find(cell), options.zoneout, projected=grouped[0][0].w_hr is not None)
    batch = x.shape[1] if packed is None else packed_batch(packed, hx)
    layers = options.num_layers * directions
    h0, c0 = _check_state(name, cell, x, hx, unbatched, packed, layers, batch, hidden, outputs)
    if packed is not None and (lengths is not None or reset is not None):
        raise InvalidInput(
            f"{name}: lengths= and reset= go with a padded batch, got a PackedSequence; "
            "pass the padded tensor (torch.nn.utils.rnn.pad_packed_sequence) instead"
        )
    if unbatched and (lengths is not None or reset is not None):
        raise InvalidInput(f"{name}: lengths= and reset= need a batched 3-D input, got 2-D; add a batch dimension")
    lengths = check_lengths(name, lengths, x)
    reset = check_reset(name, reset, x, batch_first)
    if options.reset_hx is not None:
        if reset is None:
            raise InvalidInput(f"{name}: reset_hx goes with reset=, which says where to put it in; got no reset")
        states = _check_state(name, cell, x, options.reset_hx, unbatched, packed, layers, batch, hidden, outputs)
        h0 = torch.cat([h0, states[0]], 1)
        c0 = None if c0 is None else torch.cat([c0, states[1]], 1)
    batch_sizes = None if packed is None else packed.batch_sizes
    return Problem(
        cell, x, h0, c0, grouped, options.bias, batch_sizes, lengths, reset, packed,
        batch_first and not unbatched, unbatched, zoneout,
    )  # fmt: skip


def check_cell(cell: str, input: Tensor, hx, weights: Weights) -> Problem:
    """The ``Problem`` of one step: a layer over a sequence of length 1.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
    """
    name = f"{_shown(cell)}Cell"
    if not isinstance(input, Tensor):
        raise InvalidInput(f"{name}: expected input to be a Tensor, got {type(input).__name__}")
    for kind, w in zip(("w_ih", "w_hh"), weights, strict=False):
        if not isinstance(w, Tensor):
            raise InvalidInput(f"{name}: weights must be Tensors, got {type(w).__name__} as {kind}")
    check_strided(name, "input", input)
    if input.dim() not in (1, 2):
        raise InvalidInput(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    unbatched = input.dim() == 1
    bias = weights.b_ih is not None
    if bias != (weights.b_hh is not None):
        raise InvalidInput(f"{name}: give both biases or neither, got only {'b_ih' if bias else 'b_hh'}")
    x = input[None, None] if unbatched else input[None]
    flat = [w for w in weights if w is not None]
    grouped = _check_weights(name, cell, x, flat, 1, bias, 1)
    size = (*input.shape[:-1], hidden_size(weights.w_hh, find(cell).gates))
    if hx is None:
        states = [x.new_zeros(size) for _ in find(cell).states]
    else:
        states = _states(name, cell, hx)
    for label, state in _labelled(states):
        if tuple(state.shape) != size:
            raise InvalidInput(f"{name}: Expected {label} size {size}, got {list(state.shape)}")
        _check_alike(name, "hx", label, x, state)
    h0, *c0 = (state[None, None] if unbatched else state[None] for state in states)
    return Problem(cell, x, h0, c0[0] if c0 else None, grouped, bias, unbatched=unbatched)


def _check_weights(
    name: str, cell: str, x: Tensor, weights: Sequence[Tensor], num_layers: int, bias: bool, directions: int
) -> list[list[Weights]]:
    if isinstance(weights, (Tensor, str, bytes)) or not isinstance(weights, Iterable):
        raise InvalidInput(f"{name}: weights must be a list of Tensors, got {type(weights).__name__}")
    weights = list(weights)
    for w in weights:
        if not isinstance(w, Tensor):
            raise InvalidInput(f"{name}: weights must be Tensors, got {type(w).__name__}")
    kinds = ["w_ih", "w_hh", *(("b_ih", "b_hh") if bias else ())]
    count = num_layers * directions * len(kinds)
    projected = cell == "lstm" and len(weights) == count + num_layers * directions
    if len(weights) != count and not projected:
        raise InvalidInput(
            f"{name}: expected {count} weights ({num_layers} layers x {directions} directions x {', '.join(kinds)}), "
            f"got {len(weights)}"
        )
    per_layer = len(weights) // num_layers
    grouped = [
        group(weights[layer * per_layer : (layer + 1) * per_layer], directions, bias) for layer in range(num_layers)
    ]
    gates, outputs, hidden = _check_recurrent(name, cell, weights[1], projected)
    if weights[0].dim() != 2:
        raise InvalidInput(f"{name}: w_ih must be [{gates}, input_size], got {list(weights[0].shape)}")
    inputs = weights[0].shape[1]
    if x.shape[-1] != inputs:
        raise InvalidInput(f"{name}: input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}")
    for layer, of_layer in enumerate(grouped):
        width = inputs if layer == 0 else directions * outputs
        shapes = Weights((gates, width), tuple(weights[1].shape), (gates,), (gates,), (outputs, hidden))
        for direction in of_layer:
            for kind, w, shape in zip(Weights._fields, direction, shapes, strict=True):
                if w is None:
                    continue
                if tuple(w.shape) != shape:
                    raise InvalidInput(f"{name}: layer {layer} needs {kind} {list(shape)}, got {list(w.shape)}")
                _check_alike(name, "weight", f"{kind} of layer {layer}", x, w)
    return grouped


def _check_recurrent(name: str, cell: str, w_hh: Tensor, projected: bool) -> tuple[int, int, int]:
    """G*H, the width of what is put out, and H, of a matrix [G*H, H or P] or of blocks [G, N, H/N, H/N]."""
    count, shape = find(cell).gates, list(w_hh.shape)
    if len(shape) == 4:
        if projected:
            raise InvalidInput(f"{name}: block-diagonal recurrent weights do not go with a projection; drop one")
        if shape[0] != count or shape[2] != shape[3] or is_zero(shape[1]):
            raise InvalidInput(f"{name}: w_hh in blocks must be [{count}, N, H/N, H/N], got {shape}; N is at least 1")
        return count * shape[1] * shape[2], shape[1] * shape[2], shape[1] * shape[2]
    if len(shape) != 2 or shape[0] % count:
        raise InvalidInput(
            f"{name}: w_hh must be [{count} * hidden_size, hidden or proj size], or in blocks "
            f"[{count}, N, H/N, H/N], got {shape}"
        )
    hidden = shape[0] // count
    if not projected and shape[1] != hidden:
        raise InvalidInput(f"{name}: w_hh must be [{shape[0]}, {hidden}], got {shape}")
    return shape[0], shape[1], hidden


def _shown(cell: str) -> str:
    """A cell's name as torch writes it, or as its author does."""
    return {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}.get(cell, cell)


def _check_options(name: str, cell: str, options: Options) -> None:
    flags = ("bias", "batch_first", "training", "bidirectional", "recompute", "return_cells")
    check_flags(name, **{flag: getattr(options, flag) for flag in flags})
    check_probability(name, options.dropout)
    check_locked(name, options.locked)
    check_clip(name, options.grad_clip)
    if not isinstance(options.num_layers, Integral) or options.num_layers < 1:
        raise InvalidInput(
            f"{name}: num_layers must be greater than zero, got {options.num_layers!r}; pass as many as weights are for"
        )
    if options.return_cells and not find(cell).has_c:
        raise InvalidInput(f"{name}: return_cells=True needs a cell with c, as the LSTM has; {name} keeps only h")


def _check_alike(name: str, role: str, what: str, x: Tensor, other: Tensor) -> None:
    if other.device != x.device:
        raise InvalidInput(
            f"{name}: input and {role} must be on one device, got input on {x.device} and {what} on {other.device}; "
            "move one with .to(device)"
        )
    check_strided(name, what, other)
    if other.dtype not in FLOATS or x.dtype not in FLOATS:
        raise InvalidInput(
            f"{name}: needs floating point, got input {x.dtype} and {what} {other.dtype}; allowed are "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}, made with .to(dtype)"
        )
    # Autocast brings all dtypes together but float64, which it leaves as it is.
    if other.dtype != x.dtype and target_dtype(other) != target_dtype(x):
        raise InvalidInput(
            f"{name}: input dtype ({x.dtype}) does not match {role} dtype ({other.dtype}, {what}). "
            f"Convert input: input.to({other.dtype}), or convert the other: .to({x.dtype})"
        )


def _check_state(
    name: str,
    cell: str,
    x: Tensor,
    hx,
    unbatched: bool,
    packed: PackedSequence | None,
    layers: int,
    batch: int,
    hidden: int,
    outputs: int,
) -> tuple[Tensor, Tensor | None]:
    """h0 [L*D, B, P] and c0 [L*D, B, H] (None unless LSTM), zeros by default, in the packed order."""
    if hx is None:
        h0 = x.new_zeros(layers, batch, outputs)
        return h0, x.new_zeros(layers, batch, hidden) if find(cell).has_c else None
    states = _states(name, cell, hx)
    rank = 2 if unbatched else 3
    for index, (label, state) in enumerate(_labelled(states)):
        width = hidden if index else outputs
        if state.dim() != rank:
            raise InvalidInput(
                f"{name}: For {'unbatched 2-D' if unbatched else 'batched 3-D'} input, {label} should also be "
                f"{rank}-D but got {state.dim()}-D tensor"
            )
        states[index] = state.unsqueeze(1) if unbatched else state
        if tuple(states[index].shape) != (layers, batch, width):
            raise InvalidInput(
                f"{name}: Expected {label} size {(layers, batch, width)}, got {list(states[index].shape)}"
            )
        _check_alike(name, "hx", label, x, state)
    if packed is not None and packed.sorted_indices is not None:
        states = [state.index_select(1, packed.sorted_indices) for state in states]
    return states[0], states[1] if find(cell).has_c else None


def _states(name: str, cell: str, hx) -> list[Tensor]:
    """h, or h and c, of ``hx``."""
    if not find(cell).has_c:
        if not isinstance(hx, Tensor):
            raise InvalidInput(f"{name}: hx must be a Tensor, got {type(hx).__name__}")
        return [hx]
    if not isinstance(hx, (tuple, list)):
        raise InvalidInput(f"{name}: hx must be a pair (h_0, c_0) of Tensors, got {type(hx).__name__}")
    if len(hx) != 2 or not all(isinstance(state, Tensor) for state in hx):
        kinds = ", ".join(type(state).__name__ for state in hx)
        raise InvalidInput(f"{name}: hx must be a pair (h_0, c_0) of Tensors, got {type(hx).__name__} of ({kinds})")
    return list(hx)


def _labelled(states: list[Tensor]) -> list[tuple[str, Tensor]]:
    """``states`` under the names torch gives them in its messages."""
    if len(states) == 1:
        return [("hidden", states[0])]
    return [(f"hidden[{index}]", state) for index, state in enumerate(states)]
