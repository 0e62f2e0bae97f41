"""A recurrent layer as a differentiable function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import recurrence as ops
from ..reference import recurrence as reference


class Settings(NamedTuple):
    """What a layer is, besides its tensors."""

    cell: str
    directions: int
    bias: bool


class RecurrenceFunction(torch.autograd.Function):
    """(settings, x, h0, c0, batch_sizes, lengths, reset, *weights) -> y, h_n, c_n; see ``ops.recurrence``.

    With ``create_graph=True`` the gradient is computed by the differentiable reference, so that it can be
    differentiated again.
    """

    @staticmethod
    def forward(settings, save, x, h0, c0, batch_sizes, lengths, reset, *weights):
        return ops.forward(
            settings.cell, x, h0, c0, weights, settings.directions, settings.bias, batch_sizes, lengths, reset, save
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        settings, _, x, h0, c0, batch_sizes, lengths, reset, *weights = inputs
        y, _, _, saved, cells = output
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, cells)
        ctx.save_for_backward(x, h0, c0, batch_sizes, lengths, reset, y, saved, cells, *weights)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _dsaved, _dcells):
        settings = ctx.settings
        x, h0, c0, batch_sizes, lengths, reset, y, saved, cells, *weights = ctx.saved_tensors
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (8 + len(weights))
        if torch.is_grad_enabled():
            dx, dh0, dc0, dweights = _differentiable_backward(
                settings, x, h0, c0, batch_sizes, lengths, reset, weights, (dy, dh_n, dc_n), ctx.needs_input_grad
            )
        else:
            dx, dh0, dc0, dweights = ops.backward(
                settings.cell, x, h0, c0, weights, settings.directions, settings.bias, batch_sizes, lengths, reset,
                y, saved, cells, dy, dh_n, dc_n, ctx.needs_input_grad[2],
            )  # fmt: skip
            dx = dx if ctx.needs_input_grad[2] else None
            dc0 = None if c0 is None else dc0
        return None, None, dx, dh0, dc0, None, None, None, *dweights


def _differentiable_backward(settings, x, h0, c0, batch_sizes, lengths, reset, weights, grads, needs):
    steps = reference.padded_steps(*x.shape[:2]) if batch_sizes is None else reference.packed_steps(batch_sizes)
    grouped = reference.group(weights, settings.directions, settings.bias)
    y, h_n, c_n = reference.layer(settings.cell, x, h0, c0, grouped, steps, lengths, reset)
    pairs = [
        (out, grad) for out, grad in zip((y, h_n, c_n), grads, strict=True) if out is not None and grad is not None
    ]
    inputs = [x, h0, c0, *weights]
    wanted = [i for i, need in enumerate((*needs[2:5], *needs[8:])) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs], [inputs[i] for i in wanted], [grad for _, grad in pairs],
        create_graph=True, allow_unused=True,
    )  # fmt: skip
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients[0], gradients[1], gradients[2], gradients[3:]


def layer(
    settings: Settings,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    weights: Sequence[reference.Weights],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer through the operators, differentiable: y, h_n and c_n, as ``reference.recurrence.layer``."""
    flat = [w for direction in weights for w in direction if w is not None]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *flat))
    # Where no gradient is wanted Dynamo takes a Function of so many arguments to have no setup_context, and fails.
    run = RecurrenceFunction.apply if save else RecurrenceFunction.forward
    y, h_n, c_n, _, _ = run(settings, save, x, h0, c0, batch_sizes, lengths, reset, *flat)
    return y, h_n, None if c0 is None else c_n
