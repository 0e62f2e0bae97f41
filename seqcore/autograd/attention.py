"""Attention as a differentiable function."""

import torch
from torch import Tensor

from ..ops import attention as ops
from ..reference import attention as reference


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, mask, causal, scale) -> out, lse, rows; see ``ops.attention``. The mask gets no gradient.

    With ``create_graph=True`` the gradient is computed by the differentiable reference, so that it can be
    differentiated again.
    """

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        return ops.forward(q, k, v, mask, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.causal, ctx.scale = inputs
        out, _, rows = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(q, k, v, mask, out, rows)

    @staticmethod
    def backward(ctx, dout, dlse, _drows):
        q, k, v, mask, out, rows = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None, None
        if torch.is_grad_enabled():
            gradients = _differentiable_backward(ctx, dout, dlse, q, k, v, mask)
        else:
            gradients = ops.backward(dout, dlse, q, k, v, mask, out, rows, ctx.causal, ctx.scale)
        return *gradients, None, None, None


def _differentiable_backward(ctx, dout, dlse, q, k, v, mask):
    causal = None if ctx.causal == "none" else ctx.causal
    result = reference.attention(q, k, v, attn_mask=mask, causal=causal, scale=ctx.scale)
    # lse does not depend on v, and requires no gradient if v alone does.
    pairs = [(y, dy) for y, dy in ((result.out, dout), (result.lse, dlse)) if dy is not None and y.requires_grad]
    if not pairs:
        return None, None, None
    wanted = [t for t, need in zip((q, k, v), ctx.needs_input_grad, strict=False) if need]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [dy for _, dy in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in ctx.needs_input_grad[:3]]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float) -> tuple[Tensor, Tensor]:
    """Apply ``AttentionFunction``: out [B, H, M, DV] and the natural log-sum-exp [B, H, M]."""
    out, lse, _ = AttentionFunction.apply(q, k, v, mask, causal, scale)
    return out, lse
