"""Backpropagation through time, truncated: a long sequence in chunks, the state carried over and the graph cut."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .errors import InvalidInput
from .functional.arguments import check_strided
from .functional.recurrence import State
from .functional.recurrence_layout import check_lengths, check_reset
from .nn import GRU, LSTM, RNN


def truncated_bptt(
    module: nn.RNNBase,
    input: Tensor,
    steps: int,
    hx: State | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
) -> Iterator[tuple[Tensor, State]]:
    """Run ``module`` over ``input``, ``steps`` time steps a chunk; gradients stay within a chunk, states go on.

    A training loop takes a step of the optimizer for each chunk, and holds the graph of one chunk only::

        for (y, hx), target in zip(seqcore.truncated_bptt(lstm, x, 35), targets.split(35, dim=0)):  # 1 if batch_first
            optimizer.zero_grad()
            loss(y, target).backward()
            optimizer.step()

    Each chunk is a call of its own, so that masks of ``locked`` dropout are drawn anew for each.

    Args:
        module: an RNN, GRU or LSTM of ``seqcore.nn`` or ``torch.nn``, in one direction. Each chunk is run when it is
            asked for, with the parameters of that moment.
        input: [T, B, I], [B, T, I] if ``module.batch_first``, or [T, I] unbatched. Not what layers with gradients gave:
            the first chunk's backward would free the graph that all chunks stand on.
        steps: the length of a chunk; the last one may be shorter.
        hx: the state to begin with, shaped as the module takes it; None for zeros. Gradients reach it from the first
            chunk.
        lengths: [B] integers in 0 … T, for ``seqcore.nn``: past its length a sequence's state is carried, y is zero.
        reset: [T, B] bool ([B, T] if ``batch_first``), for ``seqcore.nn``; True starts that sequence anew at that step.

    Yields:
        For each chunk what the module returns, y and its last state: both with the chunk's graph. The next chunk
        starts from that state without its history.

    Raises:
        InvalidInput: for a module that is bidirectional or no recurrence, a PackedSequence, ``steps`` < 1, or masks
            that do not fit; the module raises its own for the rest.

    Source: Williams & Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
    Trajectories" (1990).
    """
    _check_module(module)
    _check_input(input, steps)
    time = 1 if module.batch_first and input.dim() == 3 else 0
    if not input.shape[time]:
        raise InvalidInput(f"truncated_bptt: needs at least one time step, got input {list(input.shape)}")
    if lengths is not None or reset is not None:
        lengths, reset = _checked_masks(module, input, lengths, reset)
    # Apart from the generator, so that what is wrong raises here and not at the first chunk.
    return _chunks(module, input, steps, time, hx, lengths, reset)


def _check_module(module: nn.RNNBase) -> None:
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.RNNBase):
        raise InvalidInput(
            f"truncated_bptt: module must be an RNN, GRU or LSTM of seqcore.nn or torch.nn, got "
            f"{type(module).__name__}; pass the recurrent layer, not the model around it"
        )
    if module.bidirectional:
        raise InvalidInput(
            "truncated_bptt: a bidirectional module begins at each sequence's end, too, so its sequences cannot be cut "
            "into chunks; use bidirectional=False, or run the whole at once"
        )


def _check_input(input: Tensor, steps: int) -> None:
    if isinstance(input, PackedSequence):
        raise InvalidInput(
            "truncated_bptt: input must be a padded Tensor, got a PackedSequence; pad it "
            "(torch.nn.utils.rnn.pad_packed_sequence) and pass the lengths as lengths="
        )
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise InvalidInput(
            f"truncated_bptt: input must be a Tensor [T, B, I], [B, T, I] with batch_first=True, or [T, I], got {got}"
        )
    check_strided("truncated_bptt", "input", input)
    if input.grad_fn is not None and torch.is_grad_enabled():
        raise InvalidInput(
            "truncated_bptt: input has a graph of its own, which the first chunk's backward would free; run what is "
            "below in chunks, too: for x in tokens.split(steps): y, hx = module(embedding(x), hx), and detach hx "
            "before the next; or pass input.detach()"
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InvalidInput(f"truncated_bptt: steps must be an integer of at least 1, got {steps!r}")


def _checked_masks(
    module: nn.RNNBase, input: Tensor, lengths: Tensor | Sequence[int] | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``lengths`` as int64, and ``reset``: of whole sequences, which the module, given a chunk, could not check."""
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, (RNN, GRU, LSTM)):
        raise InvalidInput(
            f"truncated_bptt: lengths= and reset= need a module of seqcore.nn, got {type(module)}; "
            "seqcore.replace(model) makes it one, with the same weights"
        )
    if input.dim() != 3:
        raise InvalidInput("truncated_bptt: lengths= and reset= need a batched 3-D input, got 2-D; add a dimension")
    x = input.transpose(0, 1) if module.batch_first else input
    check_reset("truncated_bptt", reset, x, module.batch_first)
    return check_lengths("truncated_bptt", lengths, x), reset


def _chunks(
    module: nn.RNNBase,
    input: Tensor,
    steps: int,
    time: int,
    hx: State | None,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> Iterator[tuple[Tensor, State]]:
    for start in range(0, input.shape[time], steps):
        here = slice(start, start + steps)
        x = input[:, here] if time else input[here]
        options: dict[str, Any] = {}
        if lengths is not None:
            options["lengths"] = (lengths - start).clamp(0, x.shape[time])
        if reset is not None:
            options["reset"] = reset[:, here] if time else reset[here]
        y, hx = module(x, hx, **options)
        yield y, hx
        hx = hx.detach() if isinstance(hx, Tensor) else tuple(state.detach() for state in hx)
        # Else this frame would keep the chunk's graph while the next one is made.
        del y
