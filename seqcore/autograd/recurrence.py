"""A recurrent layer as a differentiable function."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cells
from ..ops import recurrence as ops
from ..reference import recurrence as reference
from .batching import vmapped


class Settings(NamedTuple):
    """What a layer is, besides its tensors.

    ``grad_clip`` bounds each element of the gates' gradients at every step; ``recompute`` keeps no gates for backward,
    which then makes them again; ``return_cells`` asks for every step's c.
    """

    cell: str
    directions: int
    bias: bool
    grad_clip: float | None = None
    recompute: bool = False
    return_cells: bool = False


class RecurrenceFunction(torch.autograd.Function):
    """(settings, save, x, h0, c0, batch_sizes, lengths, reset, extra, *weights) -> y, h_n, c_n and what ``ops`` keeps.

    With ``create_graph=True`` the gradient is computed by the differentiable reference, so that it can be
    differentiated again; and where many gradients are asked for at once (``is_grads_batched``), which are vmapped.
    """

    @staticmethod
    def forward(settings, save, x, h0, c0, batch_sizes, lengths, reset, extra, *weights):
        return ops.forward(
            settings.cell, x, h0, c0, weights, settings.directions, settings.bias, batch_sizes, lengths, reset,
            save and not settings.recompute, save or settings.return_cells, extra,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        settings, _, x, h0, c0, batch_sizes, lengths, reset, extra, *weights = inputs
        y, _, _, saved, all_c, hidden = output
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, hidden)
        ctx.save_for_backward(x, h0, c0, batch_sizes, lengths, reset, extra, y, saved, all_c, hidden, *weights)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _dsaved, dcells, _dhidden):
        settings = ctx.settings
        x, h0, c0, batch_sizes, lengths, reset, extra, y, saved, all_c, hidden, *weights = ctx.saved_tensors
        # In a compiled graph all results come with gradients, even a c that there is not or that nobody asked for.
        dc_n = None if c0 is None else dc_n
        dcells = dcells if settings.return_cells else None
        if dy is None and dh_n is None and dc_n is None and dcells is None:
            return (None,) * (9 + len(weights))
        if torch.is_grad_enabled() or vmapped(dy, dh_n, dc_n, dcells):
            dx, dh0, dc0, dweights = _differentiable_backward(
                settings, x, h0, c0, batch_sizes, lengths, reset, extra, weights, (dy, dh_n, dc_n, dcells),
                ctx.needs_input_grad,
            )  # fmt: skip
        else:
            dx, dh0, dc0, dweights = ops.backward(
                settings.cell, x, h0, c0, weights, settings.directions, settings.bias, batch_sizes, lengths, reset,
                y, saved, all_c, hidden, dy, dh_n, dc_n, dcells, settings.grad_clip, ctx.needs_input_grad[2], extra,
            )  # fmt: skip
            dx = dx if ctx.needs_input_grad[2] else None
            dc0 = None if c0 is None else dc0
        return None, None, dx, dh0, dc0, None, None, None, None, *dweights


def _differentiable_backward(settings, x, h0, c0, batch_sizes, lengths, reset, extra, weights, grads, needs):
    again = torch.is_grad_enabled()
    steps = reference.padded_steps(*x.shape[:2]) if batch_sizes is None else reference.packed_steps(batch_sizes)
    grouped = reference.group(weights, settings.directions, settings.bias)
    with torch.enable_grad():
        y, h_n, c_n, all_c = reference.layer(
            settings.cell, x, h0, c0, grouped, steps, lengths, reset, settings.grad_clip, extra
        )
    if all_c is not None:
        all_c = all_c.flatten(0, -2)
    pairs = [
        (out, grad)
        for out, grad in zip((y, h_n, c_n, all_c), grads, strict=True)
        if out is not None and grad is not None
    ]
    inputs = [x, h0, c0, *weights]
    wanted = [i for i, need in enumerate((*needs[2:5], *needs[9:])) if need]
    found = torch.autograd.grad(
        [out for out, _ in pairs], [inputs[i] for i in wanted], [grad for _, grad in pairs],
        create_graph=again, allow_unused=True,
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
    extra: Tensor | None = None,
) -> reference.LayerResult:
    """One layer through the operators, differentiable: as ``reference.recurrence.layer``.

    Every step's c comes back only if ``settings.return_cells``.
    """
    flat = [w for direction in weights for w in direction if w is not None]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *flat))
    # Where no gradient is wanted Dynamo takes a Function of so many arguments to have no setup_context, and fails.
    run = RecurrenceFunction.apply if save else RecurrenceFunction.forward
    y, h_n, c_n, _, all_c, _ = run(settings, save, x, h0, c0, batch_sizes, lengths, reset, extra, *flat)
    if not cells.find(settings.cell).has_c:
        return y, h_n, None, None
    return y, h_n, c_n, all_c.view(*y.shape[:-1], all_c.shape[-1]) if settings.return_cells else None
