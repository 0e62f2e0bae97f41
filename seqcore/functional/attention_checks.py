"""What attention may be given. Everything is checked here, before any launch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput

NAME = "attention"


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
) -> Problem:
    """The ``Problem`` that these arguments of ``functional.attention`` pose.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes, devices or combinations.
    """
    _check_tensors(query, key, value)
    lead, grouped = _check_heads(query, key, value, enable_gqa)
    M, N = query.shape[-2], key.shape[-2]
    if causal not in (None, "top_left", "lower_right"):
        raise InvalidInput(f"{NAME}: causal must be None, 'top_left' or 'lower_right', got {causal!r}")
    if scale is not None and not math.isfinite(scale):
        raise InvalidInput(f"{NAME}: scale must be finite, got {scale}")
    if not 0 <= dropout_p < 1:
        raise InvalidInput(f"{NAME}: dropout_p must be in [0, 1), got {dropout_p}")
    if softcap < 0:
        raise InvalidInput(f"{NAME}: softcap must be positive, or 0 for none, got {softcap}")
    _check_mask(attn_mask, query, (*lead, M, N))
    _check_window(window)
    heads = lead[-1] if lead else 1
    for name, vector in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if vector is not None:
            _check_vector(name, vector, heads, query, floating=True)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        _check_packed(query, cu_seqlens_q, cu_seqlens_k, query_lengths, key_lengths, M, N)
    for name, vector, most in (("query_lengths", query_lengths, M), ("key_lengths", key_lengths, N)):
        if vector is not None:
            if len(lead) < 2:
                raise InvalidInput(f"{NAME}: {name} need query [B, H, M, D], got {list(query.shape)}")
            _check_vector(name, vector, lead[0], query, floating=False)
            _check_values(name, vector, 0, most)
    if isinstance(dropout_seed, int):
        dropout_seed = torch.tensor([dropout_seed], device=query.device)
    if causal == "lower_right" and M == N and not packed and query_lengths is None and key_lengths is None:
        causal = "top_left"
    return Problem(
        query, key, value, attn_mask, causal, query.shape[-1] ** -0.5 if scale is None else float(scale), lead, grouped,
        seeded=dropout_seed is not None,
        options={
            "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
            "query_lengths": query_lengths, "key_lengths": key_lengths, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
        },
    )  # fmt: skip


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise InvalidInput(f"{NAME}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise InvalidInput(f"{NAME}: {name} must be at least 2-D, [*, rows, head dim], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise InvalidInput(f"{NAME}: {name} must be floating point, got {tensor.dtype}")
    shown = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in named.items())
    if not query.device == key.device == value.device:
        raise InvalidInput(f"{NAME}: query, key and value must be on one device, got {shown}")
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise InvalidInput(f"{NAME}: query, key and value must have one dtype, got {shown}")
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
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    grouped = enable_gqa and min(query.dim(), key.dim(), value.dim()) >= 3 and query.shape[-3] != key.shape[-3]
    if grouped:
        heads, heads_kv = query.shape[-3], key.shape[-3]
        if key.shape[-3] != value.shape[-3] or heads_kv == 0 or heads % heads_kv:
            raise InvalidInput(
                f"{NAME}: with enable_gqa the number of query heads must be a multiple of that of key heads, which "
                f"value shares, got {heads}, {heads_kv} and {value.shape[-3]} from {shapes}"
            )
    # Heads that are grouped do not broadcast; the dimensions before them do.
    drop = 3 if grouped else 2
    try:
        lead = torch.broadcast_shapes(*(t.shape[:-drop] for t in (query, key, value)))
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True lets groups of query heads share a key head"
        raise InvalidInput(f"{NAME}: leading dimensions do not broadcast: {shapes}{hint}") from None
    return (*lead, query.shape[-3]) if grouped else tuple(lead), grouped


def _check_mask(mask: Tensor | None, query: Tensor, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    allowed = (torch.bool, query.dtype, torch.float32)
    if mask.dtype not in allowed and not (mask.is_floating_point() and torch.is_autocast_enabled(query.device.type)):
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
    if len(window) != 2 or any(side is not None and (not isinstance(side, int) or side < 0) for side in window):
        raise InvalidInput(f"{NAME}: window must be (left, right), each None or an integer >= 0, got {window}")


def _check_vector(name: str, vector: Tensor, size: int, query: Tensor, floating: bool) -> None:
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (size,):
        got = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise InvalidInput(f"{NAME}: {name} must be a Tensor of shape [{size}], got {got}")
    if vector.is_floating_point() != floating or vector.dtype == torch.bool:
        raise InvalidInput(
            f"{NAME}: {name} must be {'floating point' if floating else 'integers'}, got {vector.dtype}"
        )
    if vector.device != query.device:
        raise InvalidInput(f"{NAME}: {name} must be on the query's device {query.device}, got {vector.device}")


def _check_values(name: str, vector: Tensor, least: int, most: int) -> None:
    """Values on a GPU are not looked at, which would wait for it."""
    if vector.device.type == "cpu" and not torch.compiler.is_compiling() and vector.numel():
        low, high = int(vector.min()), int(vector.max())
        if low < least or high > most:
            raise InvalidInput(f"{NAME}: {name} must lie in {least} … {most}, got {low} … {high}")


def _check_packed(query, cu_seqlens_q, cu_seqlens_k, query_lengths, key_lengths, M: int, N: int) -> None:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise InvalidInput(f"{NAME}: cu_seqlens_q and cu_seqlens_k go together, got only one of them")
    if query_lengths is not None or key_lengths is not None:
        raise InvalidInput(f"{NAME}: cu_seqlens and lengths exclude each other; cu_seqlens say where sequences end")
    if query.dim() != 3:
        raise InvalidInput(f"{NAME}: with cu_seqlens query must be [H, M, D], got {list(query.shape)}")
    sizes = cu_seqlens_q.shape[0], cu_seqlens_k.shape[0]
    if cu_seqlens_q.dim() != 1 or cu_seqlens_k.dim() != 1 or sizes[0] != sizes[1] or sizes[0] < 2:
        raise InvalidInput(f"{NAME}: cu_seqlens must be [S + 1] both, got {sizes[0]} and {sizes[1]} entries")
    for name, vector, end in (("cu_seqlens_q", cu_seqlens_q, M), ("cu_seqlens_k", cu_seqlens_k, N)):
        _check_vector(name, vector, sizes[0], query, floating=False)
        _check_values(name, vector, 0, end)
        if vector.device.type == "cpu" and not torch.compiler.is_compiling():
            if int(vector[0]) != 0 or int(vector[-1]) != end or bool((vector[1:] < vector[:-1]).any()):
                raise InvalidInput(f"{NAME}: {name} must rise from 0 to {end}, got {vector.tolist()}")
