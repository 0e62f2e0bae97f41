"""What a recurrence may be given. Everything is checked here, before any launch, and brought into one form."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import find
from ..errors import InvalidInput
from ..reference.recurrence import Weights, group, hidden_size
from ..reference.sizes import is_zero
from .autocast import target_dtype
from .dropout import check_locked
from .recurrence_problem import Options, Problem
from .values import readable
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
    unbatched = False
    if packed is not None:
        if x.dim() != 2:
            raise InvalidInput(f"{name}: a PackedSequence's data must have 2 dimensions, got {x.dim()}")
        if not torch.compiler.is_compiling():
            _check_batch_sizes(name, packed.batch_sizes, x.shape[0])
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
    outputs = hidden if grouped[0][0].w_hr is None else grouped[0][0].w_hr.shape[0]
    zoneout = probabilities(name, find(cell), options.zoneout, projected=grouped[0][0].w_hr is not None)
    batch = x.shape[1] if packed is None else _packed_batch(packed, hx)
    layers = options.num_layers * directions
    h0, c0 = _check_state(name, cell, x, hx, unbatched, packed, layers, batch, hidden, outputs)
    if packed is not None and (lengths is not None or reset is not None):
        raise InvalidInput(
            f"{name}: lengths= and reset= go with a padded batch, got a PackedSequence; "
            "pass the padded tensor (torch.nn.utils.rnn.pad_packed_sequence) instead"
        )
    if unbatched and (lengths is not None or reset is not None):
        raise InvalidInput(f"{name}: lengths= and reset= need a batched 3-D input, got 2-D; add a batch dimension")
    lengths = _check_lengths(name, lengths, x)
    reset = _check_reset(name, reset, x, batch_first)
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
    if num_layers < 1:
        raise InvalidInput(f"{name}: num_layers must be greater than zero, got {num_layers}")
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
        if shape[0] != count or shape[2] != shape[3]:
            raise InvalidInput(f"{name}: w_hh in blocks must be [{count}, N, H/N, H/N], got {shape}")
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
    if not 0 <= options.dropout <= 1:
        raise InvalidInput(f"dropout probability has to be between 0 and 1, but got {options.dropout}")
    check_locked(name, options.locked)
    clip = options.grad_clip
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise InvalidInput(f"{name}: grad_clip must be a positive number, got {clip!r}; leave it out not to clip")
    if options.return_cells and not find(cell).has_c:
        raise InvalidInput(f"{name}: return_cells=True needs a cell with c, as the LSTM has; {name} keeps only h")


def _check_alike(name: str, role: str, what: str, x: Tensor, other: Tensor) -> None:
    if other.device != x.device:
        raise InvalidInput(
            f"{name}: input and {role} must be on one device, got input on {x.device} and {what} on {other.device}; "
            "move one with .to(device)"
        )
    if not other.is_floating_point() or not x.is_floating_point():
        raise InvalidInput(f"{name}: needs floating point, got input {x.dtype} and {what} {other.dtype}")
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


def _check_batch_sizes(name: str, batch_sizes: Tensor, rows: int) -> None:
    """Whether a PackedSequence holds together, which one made by hand may not."""
    sizes = batch_sizes.tolist()
    if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != rows:
        raise InvalidInput(
            f"{name}: a PackedSequence's batch_sizes must not increase, be at least 1 and sum up to its {rows} rows of "
            f"data, got {sizes if len(sizes) < 10 else [*sizes[:9], '…']} (sum {sum(sizes)}); "
            "make one with torch.nn.utils.rnn.pack_padded_sequence"
        )


def _packed_batch(packed: PackedSequence, hx) -> int:
    """The number of sequences, if possible without looking at values, which a traced graph could not do."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    state = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    if torch.compiler.is_compiling() and isinstance(state, Tensor) and state.dim() == 3:
        # The operator compares it with batch_sizes when it runs.
        return state.shape[1]
    return int(packed.batch_sizes[0])


def _check_lengths(name: str, lengths: Tensor | None, x: Tensor) -> Tensor | None:
    if lengths is None:
        return None
    time, batch = x.shape[:2]
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"{name}: lengths must be integers, got {lengths!r}") from error
    if lengths.device.type != "cpu" and lengths.device != x.device:
        raise InvalidInput(f"{name}: lengths must be on the CPU or the input's device {x.device}, got {lengths.device}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise InvalidInput(f"{name}: lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise InvalidInput(f"{name}: lengths must be [{batch}], one a sequence, got {list(lengths.shape)}")
    # Values that are not looked at may be anything: too long means T, and negative means 0.
    if readable(lengths) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > time:
            raise InvalidInput(f"{name}: lengths must lie in 0 … {time}, got {low} … {high}")
    # Rows are counted in them, and there may be more rows than a narrow integer holds.
    return lengths.to(x.device, torch.int64)


def _check_reset(name: str, reset: Tensor | None, x: Tensor, batch_first: bool) -> Tensor | None:
    if reset is None:
        return None
    if not isinstance(reset, Tensor):
        raise InvalidInput(f"{name}: reset must be a bool Tensor, got {type(reset).__name__}")
    expected = tuple(x.shape[:2])
    if batch_first:
        expected = expected[::-1]
    if reset.dtype != torch.bool or tuple(reset.shape) != expected:
        raise InvalidInput(
            f"{name}: reset must be bool of shape {list(expected)}, got {reset.dtype} {list(reset.shape)}"
        )
    if reset.device != x.device:
        raise InvalidInput(f"{name}: reset must be on the input's device {x.device}, got {reset.device}")
    return reset.transpose(0, 1) if batch_first else reset
