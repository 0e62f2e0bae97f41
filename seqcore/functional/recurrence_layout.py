"""Whether what says how a batch's rows lie in time holds together: a PackedSequence, ``lengths`` and ``reset``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..errors import InvalidInput
from ..reference.sizes import readable
from .arguments import check_strided

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_packed(name: str, packed: PackedSequence) -> None:
    """Whether a PackedSequence holds together, which one made by hand may not.

    Raises:
        InvalidInput: if it does not.
    """
    rows, sizes = packed.data.shape[0], packed.batch_sizes
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or sizes.dim() != 1 or sizes.device.type != "cpu":
        raise _unpackable(name, f"batch_sizes must be [T] int64 on the CPU, got {_shown(sizes)}")
    sizes = sizes.tolist()
    if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1 or sum(sizes) != rows:
        raise _unpackable(
            name,
            f"batch_sizes must not increase, be at least 1 and sum up to its {rows} rows of data, got "
            f"{sizes if len(sizes) < 10 else [*sizes[:9], '…']} (sum {sum(sizes)})",
        )
    for which in ("sorted_indices", "unsorted_indices"):
        order = getattr(packed, which)
        if order is None:
            continue
        if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != (sizes[0],):
            raise _unpackable(name, f"{which} must be [{sizes[0]}] int64, one a sequence, got {_shown(order)}")
        if readable(order) and sorted(order.tolist()) != list(range(sizes[0])):
            raise _unpackable(name, f"{which} must be a permutation of 0 … {sizes[0] - 1}, got {order.tolist()}")


def _unpackable(name: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"{name}: a PackedSequence's {why}; make one with torch.nn.utils.rnn.pack_padded_sequence"
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def packed_batch(packed: PackedSequence, hx) -> int:
    """The number of sequences, if possible without looking at values, which a traced graph could not do."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices.shape[0]
    state = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    if torch.compiler.is_compiling() and isinstance(state, Tensor) and state.dim() == 3:
        # The operator compares it with batch_sizes when it runs.
        return state.shape[1]
    return int(packed.batch_sizes[0])


def check_lengths(name: str, lengths: Any, x: Tensor) -> Tensor | None:
    """``lengths`` of x [T, B, …] as int64 on its device.

    Raises:
        InvalidInput: unless they are [B] integers in 0 … T.
    """
    if lengths is None:
        return None
    time, batch = x.shape[:2]
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor(lengths)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidInput(
                f"{name}: lengths must be integers, got {lengths!r}; pass an int64 Tensor [{batch}]"
            ) from error
        if not lengths.numel():
            lengths = lengths.long()  # an empty list says nothing of its kind
    check_strided(name, "lengths", lengths)
    if lengths.device.type != "cpu" and lengths.device != x.device:
        raise InvalidInput(f"{name}: lengths must be on the CPU or the input's device {x.device}, got {lengths.device}")
    if lengths.dtype not in _INTEGERS:
        raise InvalidInput(f"{name}: lengths must be integers, got {lengths.dtype}; pass lengths.long()")
    if tuple(lengths.shape) != (batch,):
        raise InvalidInput(f"{name}: lengths must be [{batch}], one a sequence, got {list(lengths.shape)}")
    # Values that are not looked at may be anything: too long means T, and negative means 0.
    if readable(lengths) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > time:
            raise InvalidInput(f"{name}: lengths must lie in 0 … {time}, got {low} … {high}; clamp them")
    # Rows are counted in them, and there may be more rows than a narrow integer holds.
    return lengths.to(x.device, torch.int64)


def check_reset(name: str, reset: Any, x: Tensor, batch_first: bool) -> Tensor | None:
    """``reset`` of x [T, B, …], [T, B]; given as [B, T] if ``batch_first``.

    Raises:
        InvalidInput: unless it is such a bool Tensor on the device of x.
    """
    if reset is None:
        return None
    if not isinstance(reset, Tensor):
        raise InvalidInput(f"{name}: reset must be a bool Tensor, got {type(reset).__name__}; pass torch.tensor(reset)")
    check_strided(name, "reset", reset)
    expected = tuple(x.shape[:2])
    if batch_first:
        expected = expected[::-1]
    if reset.dtype != torch.bool or tuple(reset.shape) != expected:
        raise InvalidInput(
            f"{name}: reset must be bool of shape {list(expected)}, got {reset.dtype} {list(reset.shape)}; for another "
            "dtype pass reset.bool()"
        )
    if reset.device != x.device:
        raise InvalidInput(
            f"{name}: reset must be on the input's device {x.device}, got {reset.device}; move it with .to(device)"
        )
    return reset.transpose(0, 1) if batch_first else reset
