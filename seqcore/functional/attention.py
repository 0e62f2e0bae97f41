"""Attention over queries, keys and values.

Shapes: B batch, H query heads, H_kv key heads, M queries, N keys, D head dim, DV value head dim. What each option
means stands as one formula in ``seqcore/reference/attention.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..autograd import attention as autograd
from ..reference import attention as reference
from .attention_checks import Problem, check_attention
from .autocast import cast, target_dtype


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale Q K^T + mask) V: ``torch.nn.functional.scaled_dot_product_attention`` with a choice of backend.

    Args:
        query: [*, M, D], leading dimensions broadcasting with key's and value's; [*, H, M, D] with ``enable_gqa``.
        key, value: [*, N, D] and [*, N, DV]; with ``enable_gqa`` H may be a multiple of their H_kv.
        attn_mask: broadcasts to [*, M, N]; bool (True may attend) or float, added to the scores.
        dropout_p: probability, applied whenever it is not 0, as in torch.
        is_causal: query m sees keys n <= m (top-left aligned). Not together with ``attn_mask``, as in torch.
        scale: D ** -0.5 by default.
        backend: see ``seqcore.use_backend``.

    Returns:
        [*, M, DV] in the query's dtype.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: if the backend was named and cannot serve the request.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    if is_causal and attn_mask is not None:
        raise backends.InvalidInput(
            "scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True; "
            "seqcore.functional.attention(causal='top_left', attn_mask=...) takes both"
        )
    return attention(
        query, key, value, attn_mask=attn_mask, causal="top_left" if is_causal else None, scale=scale,
        dropout_p=dropout_p, enable_gqa=enable_gqa, backend=backend,
    )  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` with everything else: any options together, on the backend that has them.

    Args:
        query, key, value, attn_mask, scale, enable_gqa, backend: as there. ``attn_mask`` goes with ``causal``.
        causal: None, "top_left" (query m sees keys n <= m) or "lower_right" (n <= m + N - M).
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded.
        softcap: c > 0 replaces the scaled score s by c tanh(s / c); 0 is off.
        alibi_slopes: [H]; subtracts slope * distance from the score.
        sinks: [H] logits of one more key a head, of value zero; takes gradients.
        query_lengths, key_lengths: [B] integers; queries past theirs give zeros, keys past theirs are not seen.
        cu_seqlens_q, cu_seqlens_k: [S + 1] integers, where sequences laid end to end begin and the last one ends;
            query is then [H, M, D], key [H_kv, N, D] and value [H_kv, N, DV].
        dropout_p: probability of dropping a weight.
        dropout_seed: makes the dropout repeatable; drawn from torch's generator by default. Not for "aten".
        return_lse: also return the natural log-sum-exp of the scores, [*, H, M] float32 or better, differentiable.

    Returns:
        out [*, H, M, DV], zeros for queries that may see no key; with ``return_lse`` also lse, -inf for those.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes, devices or combinations.
        UnsupportedInput: if the backend was named and cannot serve the request.
    """
    problem = check_attention(
        query, key, value, attn_mask, causal, scale, window, softcap, alibi_slopes, sinks, query_lengths, key_lengths,
        cu_seqlens_q, cu_seqlens_k, dropout_p, dropout_seed, enable_gqa,
    )  # fmt: skip
    chosen = backends.choose(_request(problem, return_lse), backend)
    if chosen == "aten":
        return F.scaled_dot_product_attention(
            query, key, value, problem.mask, dropout_p, causal is not None, scale=problem.scale, enable_gqa=enable_gqa
        )
    if chosen == "triton":
        out, lse = _triton(problem)
    else:
        out, lse = _reference(problem)
    return (out, lse) if return_lse else out


def _request(problem: Problem, return_lse: bool) -> backends.Request:
    mask = problem.mask
    features = {
        "causal top_left": problem.causal == "top_left",
        "causal lower_right": problem.causal == "lower_right",
        "mask": mask is not None,
        "mask with causal": mask is not None and problem.causal is not None,
        "mask with gradient": mask is not None and mask.requires_grad and torch.is_grad_enabled(),
        "grouped heads": problem.grouped,
        "log-sum-exp": return_lse,
        "dropout": problem.options["dropout_p"] > 0,
        "dropout_seed": problem.seeded,
        **{name: problem.options[name] is not None for name in ("window", "alibi_slopes", "sinks")},
        **{name: problem.options[name] is not None for name in ("query_lengths", "key_lengths", "cu_seqlens_q")},
        "softcap": problem.options["softcap"] > 0,
    }
    return backends.Request(
        family="attention",
        operation="attention",
        device=backends.describe(problem.query.device),
        dtype=target_dtype(problem.query),
        features=tuple(name for name, present in features.items() if present),
        head_dim=max(problem.query.shape[-1], problem.value.shape[-1]),
        transformed=backends.transforms_active(),
    )


def _reference(problem: Problem) -> tuple[Tensor, Tensor]:
    query, key, value = cast(problem.query, problem.key, problem.value)
    options = problem.options
    if options["dropout_p"] and options["dropout_seed"] is None:
        options = {**options, "dropout_seed": torch.randint(2**62, (1,), device=query.device)}
    result = reference.attention(
        query, key, value, attn_mask=problem.mask, causal=problem.causal, scale=problem.scale, **options
    )
    return result.out, result.lse


def _triton(problem: Problem) -> tuple[Tensor, Tensor]:
    """Bring everything to [B, H, …] by broadcasting, which costs no memory, and back."""
    query, key, value = cast(problem.query, problem.key, problem.value)
    lead, mask = problem.lead, problem.mask
    q = _four_dimensional(query, lead)
    k, v = (_four_dimensional(t, (*lead[:-1], t.shape[-3]) if problem.grouped else lead) for t in (key, value))
    if mask is not None:
        mask = _four_dimensional(mask, lead, (q.shape[2], k.shape[2]))
    out, lse = autograd.attention(q, k, v, mask, problem.causal or "none", problem.scale)
    return out.reshape(*lead, *out.shape[2:]), lse.reshape(*lead, *lse.shape[2:])


def _four_dimensional(tensor: Tensor, lead: tuple[int, ...], last: tuple[int, ...] | None = None) -> Tensor:
    tensor = tensor.expand(*lead, *(tensor.shape[-2:] if last is None else last))
    if len(lead) > 2:
        return tensor.flatten(0, len(lead) - 2)
    return tensor[(None,) * (2 - len(lead))]
