"""``seqcore::attention_forward``, ``_backward``, ``_weights`` and ``_weights_backward``.

q is [B, H, M, D], k [B, H_kv, N, D], v [B, H_kv, N, DV]. Beside them stand, each or None: mask, bool (True may attend)
or additive, 4-D, of size 1 where it is broadcast; slopes and sinks [H]; q_lengths and k_lengths [B], or with
``packed``, both, [S + 1] where sequences begin and end in tensors of batch 1; seed, int64 of one element. ``causal``
is "none", "top_left" or "lower_right"; left and right count the keys of a window, None being open. Forward gives out,
lse, and for backward ``rows`` [2, B, H, M], from which P = exp(score - rows[0]) rows[1]: each row's largest score, in
the base it was computed in (the kernels' is 2), and one over its sum. Backward over a part of the keys takes rows[1]
times the part's share of the whole sum.
"""

import torch
from torch import Tensor

from ..reference import attention as reference
from ..reference import packed as packed_reference
from ..reference.attention_backward import average_weights_backward
from ..reference.recurrence import wide
from . import attention_launch as kernels
from .library import define, has_kernels

SIGNATURE = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? q_lengths, Tensor? k_lengths, "
    "Tensor? seed, bool packed, str causal, int? left, int? right, float scale, float softcap, float dropout_p"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *problem) -> tuple[Tensor, Tensor, Tensor]:
    if has_kernels(q):
        return kernels.forward(q, k, v, *problem)
    result = packed_reference.attention(q, k, v, **named(*problem))
    return result.out.contiguous(), result.lse.contiguous(), result.rows


def _backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, rows: Tensor, wanted: list[bool], q, k, v, *problem
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, mask and sinks; an empty tensor in place of each that is not ``wanted``."""
    if has_kernels(q):
        found = kernels.backward(dout, dlse, out, rows, wanted, q, k, v, *problem)
    else:
        found = packed_reference.backward(dout, dlse, q, k, v, out, rows, **named(*problem))
    return _wanted(found, wanted, q, k, v, *problem)


def _weights(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, *problem) -> Tensor:
    """The weights averaged over heads, [B, M, N] in the dtype of lse; ``rows`` as forward left them."""
    if has_kernels(q):
        return kernels.weights(rows, q, k, v, *problem)
    return reference.average_weights(q, k, **named(*problem))


def _weights_backward(
    dweights: Tensor, wanted: list[bool], q, k, v, *problem
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``_backward``, of the averaged weights: plain PyTorch, with one head's matrix at a time."""
    found = average_weights_backward(dweights, q, k, **named(*problem))
    return _wanted(found, wanted, q, k, v, *problem)


def _wanted(found, wanted, q, k, v, mask, slopes, sinks, *problem) -> tuple[Tensor, ...]:
    """Contiguous, as a compiled graph was promised."""
    inputs = (q, k, v, mask, sinks)
    return tuple(
        gradient.contiguous() if want else _empty(t, q) for gradient, want, t in zip(found, wanted, inputs, strict=True)
    )


def _empty(like: Tensor | None, q: Tensor) -> Tensor:
    return torch.empty(0, dtype=q.dtype if like is None else like.dtype, device=q.device)


def named(
    mask, slopes, sinks, q_lengths, k_lengths, seed, packed, causal, left, right, scale, softcap, dropout_p
) -> dict[str, object]:
    """All but q, k and v as the reference's keywords."""
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "query_lengths", "key_lengths")
    values = (q_lengths, k_lengths, None, None) if packed else (None, None, q_lengths, k_lengths)
    return {
        "attn_mask": mask, "causal": None if causal == "none" else causal, "scale": scale, "window": (left, right),
        "softcap": softcap, "alibi_slopes": slopes, "sinks": sinks, "dropout_p": dropout_p, "dropout_seed": seed,
        **dict(zip(lengths, values, strict=True)),
    }  # fmt: skip


def _forward_fake(q, k, v, *problem):
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=wide(q.dtype), device=q.device)
    return out, lse, lse.new_empty(2, *lse.shape)


def _backward_fake(dout, dlse, out, rows, wanted, q, k, v, mask, slopes, sinks, *problem):
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want else _empty(t, q)
        for t, want in zip((q, k, v, mask, sinks), wanted, strict=True)
    )


def _weights_backward_fake(dweights, wanted, q, *problem):
    return _backward_fake(None, None, None, None, wanted, q, *problem)


def _weights_fake(rows, q, k, v, *problem):
    return torch.empty(q.shape[0], q.shape[2], k.shape[2], dtype=wide(q.dtype), device=q.device)


define("attention_forward", f"({SIGNATURE}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
define(
    "attention_backward",
    f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor rows, bool[] wanted, {SIGNATURE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
define("attention_weights", f"(Tensor rows, {SIGNATURE}) -> Tensor", _weights, _weights_fake)
define(
    "attention_weights_backward",
    f"(Tensor dweights, bool[] wanted, {SIGNATURE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _weights_backward,
    _weights_backward_fake,
)
forward = torch.ops.seqcore.attention_forward
backward = torch.ops.seqcore.attention_backward
weights = torch.ops.seqcore.attention_weights
weights_backward = torch.ops.seqcore.attention_weights_backward
