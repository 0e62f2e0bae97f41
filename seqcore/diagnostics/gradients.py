"""The gradient of a loss with respect to every state on its way through time."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..functional.arguments import check_decades
from .flow import Flow, GradientFlow
from .magnitude import DECADES
from .recording import Recorder, following, time_dim


def gradient_flow(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    watch: Iterable[str] | Mapping[str, int] = (),
    decades: float = DECADES,
    **kwargs: Any,
) -> GradientFlow:
    """Run ``model`` once and find the norm of ∂L/∂h_t for every t: the total derivative, through all later steps.

    Followed are, by the name of the module in the model and

    - ``h``, and ``c`` of an LSTM: the states of every RNN, GRU and LSTM of ``seqcore.nn`` and ``torch.nn``; with
      ``.0``, ``.1``, … for its layers if it has several, and ``.reverse``: "h", "c", "h.1.reverse", "encoder.rnn.h.0".
      While this runs they go through the sequence step by step, with their own weights, backend and options. h_t and
      c_t are one state together: ∂L/∂c_t is what flows back through c alone, h_t being held.
    - ``input``: the query input of every MultiheadAttention, all of it in self-attention; and the model's own first
      input, if that is floating point and its dimension of time known, from the model's ``batch_first`` or because
      it is given as it is to a recurrence or attention.
    - ``h``, ``c``, ``s2``, …: the outputs of every Cell, and of every module in ``watch``, the t-th call being step t.
      A watched module that is called once has put out a sequence.

    A recurrence or Cell goes on with the sequence whose last state it is given, or one computed from that; given none,
    or another one, as zeros or a detached state, it starts another, "h#2". So does attention to more than one position.
    All calls of a watched module are one sequence. Nothing of the model is changed: not its mode, nor any ``.grad``,
    nor buffers; random numbers are drawn as in any forward.

    Args:
        model: a module; in any dtype, on any device.
        *inputs, **kwargs: what it is called with. Padded, not packed; ``lengths=`` and ``reset=`` as the modules take
            them. Where a sequence has ended it does not count.
        loss: from the model's output to a scalar. By default, for a recurrence or attention by itself, the sum of
            the output at the last valid step of every sequence; in the reverse direction the last step is t = 0.
        watch: names of submodules, or a mapping of them to the dimension of time in what they put out if called once,
            which else is 1 if the module has ``batch_first=True``, and 0. Tuples, lists and dicts they put out are
            looked into. Recurrences, Cells and attention are followed as above, named here or not.
        decades: what the ends of a sequence may be apart and still be called "steady".

    Returns:
        A mapping of names to ``Flow``: ``norms`` [T], ``rate``, ``ratio``, ``verdict``, ``sentence``.

    Raises:
        InvalidInput: for a PackedSequence, a loss that is missing, no scalar or without a graph, an unknown name or
            dimension in ``watch``, or if there is nothing to follow; modules raise their own for the rest.

    Source: Bengio, Simard & Frasconi (1994); Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent
    neural networks" (2013).
    """
    model, loss = _checked(model, loss, inputs, kwargs)
    check_decades("gradient_flow", decades)
    watch = _named(watch)
    recorder = Recorder()
    with following(model, watch, recorder), _uncompiled(), torch.inference_mode(False), torch.enable_grad():
        value = loss(model(*_seen(model, inputs, recorder), **kwargs))
        recorder.finish()
        # The hooks stay meanwhile, because activation checkpointing runs the model once more.
        return _flows(recorder, value, decades)


def _checked(
    model: nn.Module, loss: Callable[[Any], Tensor] | None, inputs: tuple, kwargs: dict
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"gradient_flow: model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if loss is None:
        if isinstance(model, nn.RNNBase):
            loss = lambda output: _last_states(model, output)
        elif isinstance(model, nn.MultiheadAttention):
            loss = lambda output: _last_attended(model, output[0], kwargs.get("key_padding_mask"))
        else:
            raise InvalidInput(
                f"gradient_flow: {type(model).__name__} needs loss=, a function to a scalar, got None; only "
                "a recurrence or attention module by itself has a default, its last step's output"
            )
    if not callable(loss):
        raise InvalidInput(
            f"gradient_flow: loss must be a function from the model's output to a scalar, got {type(loss).__name__}"
        )
    return model, loss


def _named(watch: Iterable[str] | Mapping[str, int]) -> dict[str, int | None]:
    """The submodules to watch, and the dimension of time of each, None where it is not given."""
    if isinstance(watch, Mapping):
        return dict(watch)
    iterable = isinstance(watch, Iterable) and not isinstance(watch, Tensor)
    names = [watch] if isinstance(watch, str) else list(watch) if iterable else [None]
    if not all(isinstance(name, str) for name in names):
        raise InvalidInput(
            f"gradient_flow: watch must name submodules by their dotted names, got {watch!r}; pass a list of str"
        )
    return dict.fromkeys(names)


def _last_states(module: nn.RNNBase, output: tuple) -> Tensor:
    """The sum of the last layer's h after the last step of each sequence and direction."""
    h_n = output[1][0] if module.mode == "LSTM" else output[1]
    return h_n[-2 if module.bidirectional else -1 :].sum()


def _last_attended(module: nn.MultiheadAttention, attended: Tensor, padding: Tensor | None) -> Tensor:
    """The sum of the last position's output; of the last one that is not padding, if the mask is one of queries."""
    attended = attended.movedim(time_dim(attended, module.batch_first), -2)  # [(B,) M, E]
    rows = attended.shape[:-1]
    if padding is None or padding.shape != rows:
        return attended[..., -1, :].sum()
    valid = ~padding if padding.dtype == torch.bool else padding > -torch.inf
    positions = torch.arange(rows[-1], device=padding.device)
    last = torch.where(valid, positions, -1).amax(-1, keepdim=True)
    return torch.where((positions == last)[..., None], attended, 0).sum()


def _seen(model: nn.Module, inputs: tuple, recorder: Recorder) -> tuple:
    """``inputs``, the first one to be followed if it is floating point; a lone attention module shows its own."""
    if not inputs or isinstance(model, nn.MultiheadAttention):
        return inputs
    x = inputs[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or not x.dim():
        return inputs
    handed = recorder.enter(x, getattr(model, "batch_first", None))
    return tuple(handed if value is x else value for value in inputs)


def _uncompiled() -> contextlib.AbstractContextManager:
    """Within, what torch.compile made runs as it was written, with the hooks."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds, and without which nothing was compiled
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _flows(recorder: Recorder, value: Tensor, decades: float) -> GradientFlow:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInput(f"gradient_flow: loss must give a floating-point scalar, got {got}; reduce it with .sum()")
    if not recorder.series:
        raise InvalidInput(
            "gradient_flow: found nothing to follow: no RNN, GRU, LSTM, Cell or MultiheadAttention was called, and the "
            "first input is not floating point, or of an unknown dimension of time; name a submodule in watch="
        )
    if not value.requires_grad:
        raise InvalidInput(
            "gradient_flow: the loss depends on no state through autograd, got one without grad_fn; look for detach() "
            "and torch.no_grad() in the model or the loss"
        )
    pieces = [piece for series in recorder.series.values() for piece in series.pieces]
    found = iter(torch.autograd.grad(value.reshape(()), [piece.tensor for piece in pieces], allow_unused=True))
    flows = {
        name: Flow(
            torch.cat([piece.norms(next(found)) for piece in series.pieces]), f"∂L/∂{series.letter}_t",
            series.reverse, decades, series.floor,
        )
        for name, series in recorder.series.items()
    }  # fmt: skip
    return GradientFlow(flows, float(value.detach()), recorder.skipped)
