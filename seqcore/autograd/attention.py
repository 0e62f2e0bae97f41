"""Attention as a differentiable function."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import attention as ops
from ..reference import attention as reference
from ..reference import packed as packed_reference
from .batching import vmapped


class Settings(NamedTuple):
    """What attention is, besides its tensors; in the order the operators take it."""

    packed: bool
    causal: str
    left: int | None
    right: int | None
    scale: float
    softcap: float
    dropout_p: float


class AttentionFunction(torch.autograd.Function):
    """(settings, q, k, v, mask, slopes, sinks, q_lengths, k_lengths, seed) -> out, lse, rows; see ``ops.attention``.

    Differentiable in q, k, v, an additive mask and sinks. With ``create_graph=True`` the gradient is computed by the
    differentiable reference, so that it can be differentiated again; and where many gradients are asked for at once
    (``is_grads_batched``), which are vmapped.
    """

    @staticmethod
    def forward(settings, q, k, v, mask, slopes, sinks, q_lengths, k_lengths, seed):
        # Spelt out: Dynamo mistakes what a * stands for when no input requires a gradient.
        return ops.forward(q, k, v, mask, slopes, sinks, q_lengths, k_lengths, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, *tensors = inputs
        out, _, rows = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(out, rows, *tensors)

    @staticmethod
    def backward(ctx, dout, dlse, _drows):
        out, rows, *tensors = ctx.saved_tensors
        # Of q, k, v, mask and sinks; slopes stand before the sinks.
        wanted = [ctx.needs_input_grad[i] for i in (1, 2, 3, 4, 6)]
        if (dout is None and dlse is None) or not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or vmapped(dout, dlse):
            found = _differentiable_backward(ctx.settings, dout, dlse, wanted, tensors)
        else:
            found = ops.backward(dout, dlse, out, rows, wanted, *tensors, *ctx.settings)
        dq, dk, dv, dmask, dsinks = (t if want else None for t, want in zip(found, wanted, strict=True))
        return None, dq, dk, dv, dmask, None, dsinks, None, None, None


def _differentiable_backward(settings, dout, dlse, wanted, tensors):
    q, k, v, mask, _, sinks, *_ = tensors
    with torch.enable_grad():
        result = packed_reference.attention(q, k, v, **ops.named(*tensors[3:], *settings))
    # lse does not depend on v, and requires no gradient if v alone does.
    pairs = [(y, dy) for y, dy in ((result.out, dout), (result.lse, dlse)) if dy is not None and y.requires_grad]
    if not pairs:
        return (None,) * len(wanted)
    return _gradients(pairs, (q, k, v, mask, sinks), wanted)


class AverageWeightsFunction(torch.autograd.Function):
    """(settings, rows, q, k, v, mask, …) -> the weights averaged over heads, [B, M, N]; see ``ops.attention``.

    Differentiable as ``AttentionFunction`` is, but for v, of which there is nothing in the weights.
    """

    @staticmethod
    def forward(settings, rows, q, k, v, mask, slopes, sinks, q_lengths, k_lengths, seed):
        return ops.weights(rows, q, k, v, mask, slopes, sinks, q_lengths, k_lengths, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dweights):
        q, k, v, *rest = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[2], ctx.needs_input_grad[3], False, *(ctx.needs_input_grad[i] for i in (5, 7))]
        if torch.is_grad_enabled() or vmapped(dweights):
            with torch.enable_grad():
                weights = reference.average_weights(q, k, **ops.named(*rest, *ctx.settings))
            found = _gradients([(weights, dweights)], (q, k, v, rest[0], rest[2]), wanted)
        else:
            found = ops.weights_backward(dweights, wanted, q, k, v, *rest, *ctx.settings)
        dq, dk, _, dmask, dsinks = (t if want else None for t, want in zip(found, wanted, strict=True))
        return None, None, dq, dk, None, dmask, None, dsinks, None, None, None


def _gradients(pairs, inputs, wanted):
    """Gradients of each input that is wanted, for (output, its gradient) in pairs; with a graph if it is asked for."""
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want]
    outputs, cotangents = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, leaves, cotangents, create_graph=again, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def attention(settings: Settings, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Apply ``AttentionFunction``: out [B, H, M, DV], the natural log-sum-exp [B, H, M], and the kernels' rows."""
    if not _differentiated(tensors):
        # Applying a Function costs as much on the host as a step of decoding does on a GPU.
        return ops.forward(*tensors, *settings)
    return AttentionFunction.apply(settings, *tensors)


def average_weights(settings: Settings, rows: Tensor, *tensors: Tensor | None) -> Tensor:
    """Apply ``AverageWeightsFunction`` to the rows that ``attention`` returned: [B, M, N]."""
    if not _differentiated(tensors):
        return ops.weights(rows, *tensors, *settings)
    return AverageWeightsFunction.apply(settings, rows, *tensors)


def _differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
