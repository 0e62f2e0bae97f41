"""What each launch has to do, floating-point operations and bytes, from the arguments it is launched with.

A profiler that asks Triton for a launch's metadata gets ``flops16`` or ``flops32``, by the width of the operands, and
``bytes``: Proton's names. The formulas are those of ``work.py``; every tensor that a launch must read or write counts
once, however often its programs fetch it. Lengths that only device memory knows are not looked up: a padded sequence
counts as if it filled its room, and packed ones as if all were equally long.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from .work import PAIR_PRODUCTS, banded_pairs, recurrence_flops, recurrent_flops

Arguments = dict[str, Any]
Metrics = dict[str, int]


def _metrics(flops: float, traffic: float, operand: Any) -> Metrics:
    return {f"flops{8 * operand.element_size()}": int(flops), "bytes": int(traffic)}


def _nbytes(tensor: Any) -> int:
    """Of a tensor, a ``Matrix`` around one, or nothing."""
    tensor = getattr(tensor, "ptr", tensor)
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _sequence(grid: tuple[int, ...], a: Arguments, a_token: int, a_sequence: int, bias: bool) -> Metrics:
    """T steps of a recurrence: per unit, ``a_token`` elements of every row and ``a_sequence`` of every sequence."""
    H = a["BLOCKS"] * a["UNITS"]
    directions = grid[0] // (a["SLICES"] * a["groups"] * a["BLOCKS"])
    # Of all sequences, those of this launch.
    rows = min(a["groups"] * a["BLOCK_B"], a["B"] - a["first_group"] * a["BLOCK_B"])
    tokens = a["R"] * rows // a["B"]
    shape = {"T": a["T"], "B": rows, "H": H, "blocks": a["BLOCKS"], "directions": directions, "tokens": tokens}
    weights = a["GATES"] * (a["UNITS"] + bias)
    elements = directions * H * (tokens * a_token + rows * a_sequence + weights)
    return _metrics(a["T"] * recurrent_flops(a["GATES"], shape), elements * a["w_hh_ptr"].element_size(), a["w_hh_ptr"])


def _recurrence_forward(grid: tuple[int, ...], a: Arguments) -> Metrics:
    """Reads x_gates and what stands behind them, weights and the initial state; writes y, the final state and what is
    kept for backward."""
    a_token = a["GATES"] + a["EXTRA"] + 1 + a["SAVE_CELLS"] + a["SAVE"] * a["SAVED"]
    return _sequence(grid, a, a_token, 2 * (1 + a["HAS_C"]), a["BIAS"])


def _recurrence_backward(grid: tuple[int, ...], a: Arguments) -> Metrics:
    """Reads what forward kept and the gradients from outside; writes those of the gates and of the initial state."""
    # A cell that saves its output saves nothing else.
    saved = 0 if a["saved_ptr"].data_ptr() == a["y_ptr"].data_ptr() else a["SAVED"]
    outside = a["HAS_DY"] + a["HAS_DCELLS"]
    a_token = saved + 1 + a["HAS_C"] + outside + a["GATES"] * (1 + a["APART"])
    return _sequence(grid, a, a_token, 2 * (1 + a["HAS_C"]) + a["HAS_DH_N"] + a["HAS_DC_N"], False)


def _recurrence_step(grid: tuple[int, ...], a: Arguments) -> Metrics:
    B, inputs, H, has_c = a["B"], a["INPUTS"], a["BLOCKS"] * a["UNITS"], a["HAS_C"]
    flops = recurrence_flops(a["GATES"], {"T": 1, "B": B, "I": inputs, "H": H, "blocks": a["BLOCKS"]}, "forward")
    # x and the state; y, h_n, c_n, and what is kept.
    rows = inputs + H * (3 + 2 * has_c + a["SAVE_CELLS"] + a["SAVE"] * a["SAVED"])
    elements = B * rows + a["GATES"] * H * (inputs + a["UNITS"] + 2 * a["BIAS"])
    return _metrics(flops, elements * a["x_ptr"].element_size(), a["x_ptr"])


def _pointwise(grid: tuple[int, ...], a: Arguments) -> Metrics:
    """Both pre-activations and the entering state, and what they save: no product."""
    elements = a["R"] * a["H"] * (2 * a["GATES"] + a["EXTRA"] + 1 + a["HAS_C"] + a["SAVED"])
    return _metrics(0, elements * a["h_ptr"].element_size(), a["h_ptr"])


def _pairs(a: Arguments) -> int:
    """Visible pairs of one head, over all sequences."""
    q, features, M, N = a["q"].ptr, a["features"], a["M"], a["N"]
    sequences = q.shape[0]
    if a["sequences"].packed is not None:
        sequences = a["sequences"].q_ptr.numel() - 1
        M, N = M // sequences, N // sequences
    diagonal = N - M if features.lower_right is not None else 0
    return sequences * banded_pairs(M, N, features.left, features.right, diagonal)


def _attention(kernel: str, *touched: str) -> Callable[[tuple[int, ...], Arguments], Metrics]:
    """Of a kernel that makes products for all visible pairs of all heads, and reads or writes the tensors named."""
    of_key, of_value = PAIR_PRODUCTS[kernel]

    def metrics(grid: tuple[int, ...], a: Arguments) -> Metrics:
        q = a["q"].ptr
        columns = of_key * a["D"] + (of_value * a["DV"] if of_value else 0)
        traffic = sum(_nbytes(a[name]) for name in touched) + _nbytes(a["features"].mask_ptr)
        return _metrics(2 * columns * _pairs(a) * q.shape[1], traffic, q)

    return metrics


def _moving(operand: str, *touched: str) -> Callable[[tuple[int, ...], Arguments], Metrics]:
    """Of a kernel that makes no product."""

    def metrics(grid: tuple[int, ...], a: Arguments) -> Metrics:
        return _metrics(0, sum(map(_nbytes, (a[name] for name in touched))), getattr(a[operand], "ptr", a[operand]))

    return metrics


_ROWS = ("lse_ptr", "row_max_ptr", "row_scale_ptr")
_PARTS = ("part_ptr", "part_max_ptr", "part_sum_ptr")
_BACKWARD = ("q", "k", "v", "dout", "statistics_ptr")

# By module below this package, and kernel.
LAUNCH_WORK: dict[tuple[str, str], Callable[[tuple[int, ...], Arguments], Metrics]] = {
    ("recurrence.forward", "recurrence_forward_kernel"): _recurrence_forward,
    ("recurrence.backward", "recurrence_backward_kernel"): _recurrence_backward,
    ("recurrence.step", "recurrence_step_kernel"): _recurrence_step,
    ("recurrence.pointwise", "pointwise_kernel"): _pointwise,
    ("attention.backward", "attention_backward_delta_kernel"): _moving(
        "out", "out", "dout", "dlse_ptr", "row_max_ptr", "row_scale_ptr", "statistics_ptr"
    ),
    ("attention.decode", "attention_combine_kernel"): _moving("out_ptr", *_PARTS, "out_ptr", *_ROWS),
} | {
    (f"attention.{module}", kernel): _attention(kernel, *touched)
    for module, kernel, touched in (
        ("forward", "attention_forward_kernel", ("q", "k", "v", "out", *_ROWS)),
        ("decode", "attention_decode_kernel", ("q", "k", "v", *_PARTS)),
        ("weights", "attention_weights_kernel", ("q", "k", "row_max_ptr", "row_scale_ptr", "weights_ptr")),
        ("backward", "attention_backward_dkdv_kernel", (*_BACKWARD, "dk", "dv")),
        ("backward", "attention_backward_dq_kernel", (*_BACKWARD, "dq")),
        ("bias", "attention_backward_bias_kernel", (*_BACKWARD, "dbias_ptr")),
    )
}


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Within the block, launches tell a profiler what they have to do.

    Only there: Triton gathers a launch's arguments for its metadata even if nobody asks for it, which would cost every
    launch microseconds.
    """
    kernels = {
        getattr(importlib.import_module(f"{__package__}.{module}"), name): work
        for (module, name), work in LAUNCH_WORK.items()
    }
    before = {kernel: kernel.launch_metadata for kernel in kernels}
    for kernel, work in kernels.items():
        kernel.launch_metadata = lambda grid, metadata, arguments, work=work: work(grid, arguments)
    try:
        yield
    finally:
        for kernel, metadata in before.items():
            kernel.launch_metadata = metadata
