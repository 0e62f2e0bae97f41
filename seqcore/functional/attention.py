"""Attention over queries, keys and values.

Shapes: B batch, H query heads, H_kv key heads, M queries, N keys, D head dim, DV value head dim. What each option
means stands as one formula in ``seqcore/reference/attention.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, devices
from ..autograd import attention as autograd
from ..capabilities import Request, transforms_active
from ..reference import packed as reference
from .arguments import check_flags
from .attention_checks import Problem, check_attention
from .autocast import autocasting, cast, target_dtype
from .sharded import sharded


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
        attn_mask: broadcasts to [*, M, N]; bool (True may attend), or added to the scores, in the query's dtype or
            float32, which stays float32 under autocast too. torch's ``CausalBias`` is taken for the ``causal`` that it
            stands for.
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
    check_flags("scaled_dot_product_attention", is_causal=is_causal)
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
    return_weights: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`scaled_dot_product_attention` with everything else: any options together, on the backend that has them.

    Args:
        query, key, value, attn_mask, scale, enable_gqa, backend: as there. ``attn_mask`` goes with ``causal``.
        causal: None, "top_left" (query m sees keys n <= m) or "lower_right" (n <= m + N - M).
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded. Query m
            stands at key m with "top_left", at key m + N - M otherwise, M and N being the sequence's own lengths.
        softcap: c > 0 replaces the scaled score s by c tanh(s / c), c in 2^-126 … 2^126 and at least 2^-126 |scale|; 0
            is off.
        alibi_slopes: [H]; subtracts slope * distance from the score, distance counted from where the query stands.
        sinks: [H] logits of one more key a head, of value zero; takes gradients.
        query_lengths, key_lengths: [B] int32 or int64, B the first of the leading dimensions; queries past theirs give
            zeros, keys past theirs are not seen.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 or int64, where sequences laid end to end begin and the last one ends;
            query is then [H, M, D], key [H_kv, N, D] and value [H_kv, N, DV].
        dropout_p: probability of dropping a weight.
        dropout_seed: makes the dropout repeatable; drawn from torch's generator by default. Not for "aten".
        return_lse: also return the natural log-sum-exp of the scores, [*, H, M] float32 or better, differentiable.
        return_weights: also return the weights in out's dtype: "average", [*, M, N], their mean over heads, made
            without a matrix of each head; or "per_head", [*, H, M, N], in plain PyTorch. Not with cu_seqlens.

    The kernels compute in base 2, where float32 ends at 2.35e38: a score or a scale beyond is infinite there. Finite
    numbers beyond in masks, slopes and sinks count as 0.69 times themselves, finfo.min as -2.36e38, in lse as well.

    What is not finite stays behind lengths, and within its sequence of cu_seqlens: no other result and no other
    gradient hangs on it (on "reference" where cu_seqlens can be read: on a CPU, not traced). Masks, causality and
    windows promise less, for 0 times NaN is NaN: a key hidden by a bool mask, by causality or by a window reaches no
    out and no lse of those who do not see it, but may reach gradients; a value hidden so, or a key hidden by an
    additive -inf, may reach all. Give padding as lengths.

    Returns:
        out [*, H, M, DV], zeros for queries that may see no key; then what was asked for: lse, -inf for those, or their
        sink; weights. Behind lengths all three are constants: gradients that arrive there are not looked at.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes, devices or combinations.
        UnsupportedInput: if the backend was named and cannot serve the request.
    """
    problem = check_attention(
        query, key, value, attn_mask, causal, scale, window, softcap, alibi_slopes, sinks, query_lengths, key_lengths,
        cu_seqlens_q, cu_seqlens_k, dropout_p, dropout_seed, enable_gqa, return_lse, return_weights,
    )  # fmt: skip
    request = _request(problem, return_lse, return_weights)
    if request.sharded and return_weights == "per_head":
        raise backends.UnsupportedInput(
            "attention: return_weights='per_head' is plain PyTorch over tensors of its own, which do not mix with "
            "DTensors; pass 'average', or DTensor.full_tensor() of each"
        )
    chosen = backends.choose(request, backend)
    if chosen == "aten":
        if query.shape[:-2] != problem.lead and not (query.numel() and key.numel() and value.numel()):
            # Of nothing torch makes an out of the query's leading dimensions, not of the broadcast ones.
            query = query.expand(*problem.lead, *query.shape[-2:])
        return F.scaled_dot_product_attention(
            query, key, value, problem.mask, dropout_p, problem.causal is not None, scale=problem.scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    if problem.options["dropout_p"] and problem.options["dropout_seed"] is None:
        if request.sharded:
            raise backends.InvalidInput(
                "attention: dropout on DTensors needs dropout_seed=, the same on all processes, got None"
            )
        problem.options["dropout_seed"] = torch.randint(2**62, (1,), device=query.device)
    out, lse, weights = (_triton if chosen == "triton" else _reference)(problem, return_weights)
    found = (out, *((lse,) if return_lse else ()), *((weights.to(out.dtype),) if return_weights else ()))
    return found if len(found) > 1 else out


def check_operator(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, sinks: Tensor | None,
    enable_gqa: bool,
) -> float:
    """Raise as :func:`attention` does, for who calls the operators directly; the scale they are to be given.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: if the operators cannot serve the request.
    """
    absent = dict.fromkeys((
        "attn_mask", "causal", "window", "alibi_slopes", "query_lengths", "key_lengths", "cu_seqlens_q", "cu_seqlens_k",
        "dropout_seed", "return_weights",
    ))  # fmt: skip
    problem = check_attention(
        query, key, value, scale=scale, softcap=softcap, sinks=sinks, enable_gqa=enable_gqa, dropout_p=0.0,
        return_lse=True, **absent,
    )  # fmt: skip
    backends.check_operator(_request(problem, return_lse=True, return_weights=None))
    return problem.scale


def _request(problem: Problem, return_lse: bool, return_weights: str | None) -> Request:
    mask, slopes, dtype = problem.mask, problem.options["alibi_slopes"], target_dtype(problem.query)
    features = {
        "causal top_left": problem.causal == "top_left",
        "causal lower_right": problem.causal == "lower_right",
        "mask": mask is not None,
        "mask with causal": mask is not None and problem.causal is not None,
        "scale that is not positive": problem.scale <= 0,
        "mask of another dtype than queries": mask is not None and _misread(mask, dtype),
        "mask with gradient": mask is not None and mask.requires_grad and torch.is_grad_enabled(),
        "grouped heads": problem.grouped,
        "log-sum-exp": return_lse,
        "weights": return_weights is not None,
        "alibi_slopes with gradient": slopes is not None and slopes.requires_grad and torch.is_grad_enabled(),
        "dropout": problem.options["dropout_p"] > 0,
        "dropout_seed": problem.seeded,
        **{name: problem.options[name] is not None for name in ("window", "alibi_slopes", "sinks")},
        **{name: problem.options[name] is not None for name in ("query_lengths", "key_lengths", "cu_seqlens_q")},
        "softcap": problem.options["softcap"] > 0,
    }
    return Request(
        family="attention",
        operation="attention",
        device=devices.describe(problem.query.device),
        dtype=dtype,
        features=tuple(name for name, present in features.items() if present),
        head_dim=max(problem.query.shape[-1], problem.value.shape[-1]),
        transformed=transforms_active(),
        sharded=sharded(problem.query, problem.key, problem.value, mask, slopes, problem.options["sinks"]),
    )


def _misread(mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's attention misreads ``mask`` beside queries that are computed in ``dtype``, or raises.

    Autocast narrows a mask as it does queries, each by itself, and no float64; torch's kernels have read float32 as if
    it were half (pytorch issue 191612).
    """
    if mask.dtype in (torch.bool, dtype):
        return False
    return autocasting(mask.device.type) or (mask.is_cuda and dtype.itemsize == 2)


def _reference(problem: Problem, return_weights: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    query, key, value = cast(problem.query, problem.key, problem.value)
    if problem.lead:
        # Rows of weights are one query's of one head, even where only values differ between heads or sequences.
        query = query.expand(*problem.lead, *query.shape[-2:])
    else:
        query, key, value = query[None], key[None], value[None]
    out, lse, weights, _ = reference.attention(
        query, key, value, attn_mask=problem.mask, causal=problem.causal, scale=problem.scale, **problem.options
    )
    weights = weights.mean(-3, keepdim=not problem.lead) if return_weights == "average" else weights
    return (out, lse, weights) if problem.lead else (out[0], lse[0], weights[0])


def _triton(problem: Problem, return_weights: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring everything to [B, H, …] by broadcasting, which costs no memory, and back."""
    query, key, value = cast(problem.query, problem.key, problem.value)
    lead, options = problem.lead, problem.options
    q = _four_dimensional(query, lead)
    k, v = (_four_dimensional(t, (*lead[:-1], t.shape[-3]) if problem.grouped else lead) for t in (key, value))
    left, right = options["window"] or (None, None)
    packed = options["cu_seqlens_q"] is not None
    settings = autograd.Settings(
        packed, problem.causal or "none", left, right, problem.scale, options["softcap"], options["dropout_p"]
    )
    if packed:
        lengths = options["cu_seqlens_q"], options["cu_seqlens_k"]
    else:
        lengths = _lengths(options["query_lengths"], lead), _lengths(options["key_lengths"], lead)
    slopes, sinks, seed = options["alibi_slopes"], options["sinks"], options["dropout_seed"]
    tensors = (q, k, v, _mask(problem.mask, lead), slopes, sinks, *lengths, seed)
    out, lse, rows = autograd.attention(settings, *tensors)
    weights = None
    if return_weights == "average":
        weights = autograd.average_weights(settings, rows, *tensors)
        weights = weights.reshape(*lead[:-1], *weights.shape[1:])
    elif return_weights == "per_head":
        weights = _reference(problem, return_weights)[2]
    return out.reshape(*lead, *out.shape[2:]), lse.reshape(*lead, *lse.shape[2:]), weights


def _four_dimensional(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    return tensor.flatten(0, len(lead) - 2) if len(lead) > 2 else tensor[(None,) * (2 - len(lead))]


def _mask(mask: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """The mask in four dimensions, of size 1 where it broadcasts: an expanded one would get a gradient as large."""
    if mask is None:
        return None
    mask = mask[(None,) * (max(len(lead), 2) + 2 - mask.dim())]
    if len(lead) <= 2:
        return mask
    batch = lead[:-1] if math.prod(mask.shape[:-3]) > 1 else mask.shape[:-3]
    return mask.expand(*batch, *mask.shape[-3:]).flatten(0, len(batch) - 1)


def _lengths(lengths: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """Lengths of the first of the leading dimensions as lengths of all that are batch."""
    return lengths if lengths is None or len(lead) <= 2 else lengths.repeat_interleave(math.prod(lead[1:-1]))
