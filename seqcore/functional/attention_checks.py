"""What attention may be given. Everything is checked here, before any launch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..reference.sizes import readable
from .arguments import FLOATS, LARGEST, check_flags, check_floating, check_strided, is_number, is_probability, is_size
from .autocast import autocasting, target_dtype

NAME = "attention"
# The largest divisor, and one over the least, that a GPU's quick division takes; kernels divide the scale by a softcap.
LARGEST_DIVISOR = 2.0**126


@dataclass
class Problem:
    """A checked request; ``lead`` is the broadcast (*batch, H), ``options`` what only some backends have."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: str | None
    scale: float
    lead: tuple[int, ...]
    grouped: bool
    seeded: bool
    options: dict[str, Any]


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: str | None,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    enable_gqa: bool,
    return_lse: bool,
    return_weights: str | None,
) -> Problem:
    """The ``Problem`` that these arguments of ``functional.attention`` pose.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes, devices or combinations.
    """
    check_flags(NAME, enable_gqa=enable_gqa, return_lse=return_lse)
    _check_tensors(query, key, value)
    lead, grouped = _check_heads(query, key, value, enable_gqa)
    M, N = query.shape[-2], key.shape[-2]
    if causal not in (None, "top_left", "lower_right"):
        raise InvalidInput(f"{NAME}: causal must be None, 'top_left' or 'lower_right', got {causal!r}")
    if scale is not None and not (is_number(scale) and abs(scale) <= LARGEST):
        raise InvalidInput(f"{NAME}: scale must be a number that float32 holds, or None, got {scale!r}")
    if not is_probability(dropout_p):
        raise InvalidInput(f"{NAME}: dropout_p must be a number in 0 … 1, got {dropout_p!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not _is_softcap(softcap, scale):
        raise InvalidInput(
            f"{NAME}: softcap must be 0 for none, or in 2^-126 … 2^126 and at least 2^-126 |scale|, got {softcap!r} "
            f"with scale {scale!r}"
        )
    if return_weights not in (None, "average", "per_head"):
        raise InvalidInput(f"{NAME}: return_weights must be None, 'average' or 'per_head', got {return_weights!r}")
    if is_causal_bias(attn_mask):
        positional = (causal, window, alibi_slopes, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k)
        if any(given is not None for given in positional):
            raise InvalidInput(
                f"{NAME}: attn_mask of torch's CausalBias goes with no causal, window, alibi_slopes, lengths and "
                "cu_seqlens, got one that does; pass causal= instead"
            )
        attn_mask, causal = None, _causality(attn_mask, M, N)
    _check_mask(attn_mask, query, (*lead, M, N))
    # torch's operator wants both dimensions spelt out.
    attn_mask = None if attn_mask is None else torch.atleast_2d(attn_mask)
    _check_window(window)
    heads = lead[-1] if lead else 1
    for name, vector in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if vector is not None:
            _check_vector(name, vector, heads, query, floating=True)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        if return_weights is not None:
            raise InvalidInput(
                f"{NAME}: return_weights={return_weights!r} does not go with cu_seqlens; pass padded input and lengths"
            )
        _check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, query_lengths, key_lengths)
    for name, vector, most in (("query_lengths", query_lengths, M), ("key_lengths", key_lengths, N)):
        if vector is not None:
            if len(lead) < 2:
                raise InvalidInput(f"{NAME}: {name} need query [B, H, M, D], got {list(query.shape)}")
            _check_vector(name, vector, lead[0], query, floating=False)
            _check_values(name, vector, 0, most)
    dropout_seed = _seed(dropout_seed, query)
    if causal == "lower_right" and M == N and not packed and query_lengths is None and key_lengths is None:
        causal = "top_left"
    return Problem(
        query, key, value, attn_mask, causal, scale, lead, grouped, seeded=dropout_seed is not None,
        options={
            "window": window, "softcap": float(softcap), "alibi_slopes": alibi_slopes, "sinks": sinks,
            "query_lengths": query_lengths, "key_lengths": key_lengths, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
        },
    )  # fmt: skip


def _is_softcap(softcap: float, scale: float) -> bool:
    """Whether softcap is 0, or a number that kernels can divide the scale by without overflow."""
    if not is_number(softcap) or softcap == 0:
        return is_number(softcap)
    return max(1.0, abs(scale)) / LARGEST_DIVISOR <= softcap <= LARGEST_DIVISOR


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise InvalidInput(
                f"{NAME}: {name} must be a dense tensor, got a nested one; pass padded tensors and key_lengths, or "
                "sequences end to end and cu_seqlens"
            )
        check_floating(NAME, name, tensor)
        if tensor.dim() < 2:
            raise InvalidInput(f"{NAME}: {name} must be at least 2-D, [*, rows, head dim], got {list(tensor.shape)}")
    alike = {
        "device": query.device == key.device == value.device,
        "dtype": target_dtype(query) == target_dtype(key) == target_dtype(value),
    }
    for what, same in alike.items():
        if not same:
            shown = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in named.items())
            raise InvalidInput(f"{NAME}: query, key and value must have one {what}, got {shown}")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise InvalidInput(
            f"{NAME}: query and key need the same positive head dim, got {query.shape[-1]} and {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise InvalidInput(
            f"{NAME}: key and value need the same number of rows, got {key.shape[-2]} and {value.shape[-2]}"
        )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], bool]:
    """The broadcast leading dimensions, and whether groups of query heads share a key head."""
    grouped = enable_gqa and min(query.dim(), key.dim(), value.dim()) >= 3 and query.shape[-3] != key.shape[-3]
    if grouped:
        heads, heads_kv = query.shape[-3], key.shape[-3]
        if key.shape[-3] != value.shape[-3] or heads_kv == 0 or heads % heads_kv:
            raise InvalidInput(
                f"{NAME}: with enable_gqa the number of query heads must be a multiple of that of key heads, which "
                f"value shares, got {heads}, {heads_kv} and {value.shape[-3]} from {_shapes(query, key, value)}"
            )
    # Heads that are grouped do not broadcast; the dimensions before them do.
    drop = 3 if grouped else 2
    leads = [t.shape[:-drop] for t in (query, key, value)]
    try:
        lead = leads[0] if leads[0] == leads[1] == leads[2] else torch.broadcast_shapes(*leads)
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True lets groups of query heads share a key head"
        shapes = _shapes(query, key, value)
        raise InvalidInput(f"{NAME}: leading dimensions do not broadcast, got {shapes}{hint}") from None
    return (*lead, query.shape[-3]) if grouped else tuple(lead), grouped


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def is_causal_bias(mask: Any) -> bool:
    """Whether ``mask`` is torch's ``CausalBias``, whose elements nobody has written: what counts is its kind."""
    # Told by where its class is defined, which is not imported for this: it brings torch's compiler with it.
    return isinstance(mask, Tensor) and type(mask).__module__ == "torch.nn.attention.bias"


def _causality(bias: Any, M: int, N: int) -> str:
    """What a ``CausalBias`` is to ``causal``."""
    if (bias.seq_len_q, bias.seq_len_kv) != (M, N):
        raise InvalidInput(
            f"{NAME}: attn_mask of torch's CausalBias must be of {M} queries and {N} keys, got {bias.seq_len_q} and "
            f"{bias.seq_len_kv}"
        )
    return "top_left" if bias.variant.name == "UPPER_LEFT" else "lower_right"


def _check_mask(mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise InvalidInput(f"{NAME}: attn_mask must be a Tensor or None, got {type(mask).__name__}")
    check_strided(NAME, "attn_mask", mask)
    allowed = (torch.bool, query.dtype, torch.float32)
    if mask.dtype not in allowed and not (mask.dtype in FLOATS and autocasting(query.device.type)):
        raise InvalidInput(
            f"{NAME}: attn_mask must be bool, {query.dtype} like the query, or float32, got {mask.dtype}"
        )
    if mask.device != query.device:
        raise InvalidInput(f"{NAME}: attn_mask must be on the query's device {query.device}, got {mask.device}")
    if mask.dim() > len(shape) or any(
        have not in (1, want) for have, want in zip(reversed(mask.shape), reversed(shape), strict=False)
    ):
        raise InvalidInput(f"{NAME}: attn_mask must broadcast to {list(shape)}, got {list(mask.shape)}")


def _check_window(window: tuple[int | None, int | None] | None) -> None:
    if window is None:
        return
    sides = window if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or not all(side is None or is_size(side, least=0) for side in sides):
        raise InvalidInput(
            f"{NAME}: window must be (left, right), each None, which is unbounded, or an integer in 0 … 2^31 - 1, got "
            f"{window}"
        )


def _seed(seed: int | Tensor | None, query: Tensor) -> Tensor | None:
    """The seed as an int64 tensor of one element."""
    if seed is None:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63:
        return torch.tensor([seed], device=query.device)
    if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == query.device:
        return seed.reshape(1)
    got = f"{list(seed.shape)} {seed.dtype} on {seed.device}" if isinstance(seed, Tensor) else repr(seed)
    raise InvalidInput(
        f"{NAME}: dropout_seed must be an integer of 64 bits, or an int64 Tensor of one element on {query.device}, "
        f"got {got}"
    )


def _check_vector(name: str, vector: Tensor, size: int, query: Tensor, floating: bool) -> None:
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (size,):
        got = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise InvalidInput(f"{NAME}: {name} must be a Tensor of shape [{size}], got {got}")
    check_strided(NAME, name, vector)
    if vector.dtype not in (FLOATS if floating else (torch.int32, torch.int64)):
        raise InvalidInput(
            f"{NAME}: {name} must be {'floating point' if floating else 'int32 or int64'}, got {vector.dtype}"
        )
    if vector.device != query.device:
        raise InvalidInput(f"{NAME}: {name} must be on the query's device {query.device}, got {vector.device}")


def _check_values(name: str, vector: Tensor, least: int, most: int) -> None:
    if readable(vector) and vector.numel():
        low, high = int(vector.min()), int(vector.max())
        if low < least or high > most:
            raise InvalidInput(f"{NAME}: {name} must lie in {least} … {most}, got {low} … {high}")


def _check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, query_lengths, key_lengths) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise InvalidInput(f"{NAME}: cu_seqlens_q and cu_seqlens_k go together, got only one of them")
    if query_lengths is not None or key_lengths is not None:
        raise InvalidInput(f"{NAME}: cu_seqlens and lengths exclude each other; cu_seqlens say where sequences end")
    if not query.dim() == key.dim() == value.dim() == 3:
        raise InvalidInput(
            f"{NAME}: with cu_seqlens query, key and value must be [H, M, D], [H_kv, N, D] and [H_kv, N, DV], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    shapes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (cu_seqlens_q, cu_seqlens_k)]
    if len(shapes[0]) != 1 or shapes[0] != shapes[1] or shapes[0][0] < 2:
        raise InvalidInput(
            f"{NAME}: cu_seqlens_q and cu_seqlens_k must both be Tensors of shape [S + 1] for S >= 1 sequences, got "
            f"{shapes[0]} and {shapes[1]}"
        )
    M, N = query.shape[1], key.shape[1]
    for name, vector, end in (("cu_seqlens_q", cu_seqlens_q, M), ("cu_seqlens_k", cu_seqlens_k, N)):
        _check_vector(name, vector, shapes[0][0], query, floating=False)
        if readable(vector):
            if int(vector[0]) != 0 or int(vector[-1]) != end or bool((vector[1:] < vector[:-1]).any()):
                raise InvalidInput(f"{NAME}: {name} must rise from 0 to {end}, got {vector.tolist()}")
