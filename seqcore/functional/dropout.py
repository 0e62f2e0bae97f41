"""Dropout that is the same at every time step of a sequence, and what recurrent layers drop between them."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..errors import InvalidInput
from ..reference.sizes import is_zero
from .arguments import check_flags, check_probability, check_strided
from .recurrence_layout import check_packed
from .recurrence_problem import Options, Problem


def locked_dropout(
    input: Tensor | PackedSequence, p: float = 0.5, training: bool = True, batch_first: bool = False
) -> Tensor | PackedSequence:
    """Locked (variational) dropout: y_t = x_t m / (1 - p), with one mask m per sequence and feature for all steps t.

    Each call draws a new mask, from torch's generator. A PackedSequence gets the masks that the padded batch would.
    The name is Merity et al.'s; the mask that Gal & Ghahramani also put on h, within the recurrence, is left out.

    Args:
        input: [T, B, F], [B, T, F] if ``batch_first``, [T, F] unbatched, or a PackedSequence; any floating dtype.
        p: probability of a feature to be zeroed.
        training: False returns ``input``.
        batch_first: where the dimension of time is, in a padded batch.

    Returns:
        The same form, shape and dtype.

    Raises:
        InvalidInput: for a p outside 0 … 1, wrong ranks or dtypes.

    Source: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016);
    Merity et al., "Regularizing and Optimizing LSTM Language Models" (2018), AWD-LSTM.
    """
    check_probability("locked_dropout", p)
    check_flags("locked_dropout", training=training, batch_first=batch_first)
    packed = isinstance(input, PackedSequence)
    x = input.data if packed else input
    if not isinstance(x, Tensor):
        raise InvalidInput(f"locked_dropout: input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    check_strided("locked_dropout", "input", x)
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise InvalidInput(
            f"locked_dropout: needs floating point, got {x.dtype}; allowed are 16 bits and more, made with .to(dtype)"
        )
    ranks = (2,) if packed else (2, 3)
    if x.dim() not in ranks:
        raise InvalidInput(
            f"locked_dropout: input must be [T, B, F], [B, T, F] with batch_first=True, [T, F], or a PackedSequence of "
            f"rows [R, F], got {list(x.shape)}"
        )
    if packed and not torch.compiler.is_compiling():
        check_packed("locked_dropout", input)
    if not training or p == 0:
        return input
    if not packed:
        return drop_padded(x, p, time=1 if batch_first and x.dim() == 3 else 0)
    batch = int(input.batch_sizes[0]) if input.sorted_indices is None else input.sorted_indices.shape[0]
    rows = drop_packed(x, p, input.batch_sizes, batch, input.sorted_indices)
    return PackedSequence(rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices)


def check_locked(name: str, locked: bool) -> None:
    if not isinstance(locked, bool):
        raise InvalidInput(f"{name}: locked must be True or False, got {locked!r}; the probability is dropout=")


def drop_padded(x: Tensor, p: float, time: int = 0) -> Tensor:
    """``x`` times a mask that is drawn once along the dimension of ``time``."""
    if is_zero(x.shape[time]):
        return x
    # Out of x itself, so that a DTensor's mask is divided as its sequences are.
    return x * F.dropout(torch.ones_like(x.narrow(time, 0, 1)), p)


def drop_packed(x: Tensor, p: float, batch_sizes: Tensor, batch: int, order: Tensor | None) -> Tensor:
    """As ``drop_padded`` for packed rows x [R, F] of ``batch`` sequences, which packing put in ``order``, if given."""
    mask = F.dropout(x.new_ones(batch, x.shape[1]), p)
    if order is not None:
        mask = mask.index_select(0, order)
    # Row r is step t of sequence r - (rows before t). batch_sizes stands on the CPU, and nothing waits for a GPU.
    before = (batch_sizes.cumsum(0) - batch_sizes).repeat_interleave(batch_sizes, output_size=x.shape[0])
    sequence = torch.arange(x.shape[0], device=before.device) - before
    return x * mask.index_select(0, sequence.to(x.device, non_blocking=True))


def between_layers(problem: Problem, options: Options) -> Callable[[Tensor], Tensor] | None:
    """What is done to each layer's output but the last one's, if anything is."""
    if not options.training or not options.dropout or len(problem.weights) == 1:
        return None
    if not options.locked:
        return partial(F.dropout, p=options.dropout)
    if problem.packed is None:
        return partial(drop_padded, p=options.dropout)
    batch, order = problem.h0.shape[1], problem.packed.sorted_indices
    return partial(drop_packed, p=options.dropout, batch_sizes=problem.batch_sizes, batch=batch, order=order)
