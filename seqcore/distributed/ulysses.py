"""Attention over a sequence that is divided among processes, by exchanging rows for heads.

Each process comes with a part of the rows of all heads, leaves with all rows of a part of the heads, attends, and
exchanges back: two all-to-alls of what the tensors weigh, whatever the length. Source: Jacobs et al., "DeepSpeed
Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models" (2023).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import functional
from ..errors import InvalidInput
from ..functional.arguments import is_number
from ..functional.attention_checks import is_causal_bias
from ..functional.autocast import cast
from .layout import Group, check_parts, group_of

_BY_HEAD = ("alibi_slopes", "sinks")


def ulysses_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: Group = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`seqcore.functional.attention` of one sequence, each of W processes having a contiguous part of it.

    Args:
        query: [B, H, M/W, D], this process's queries; W divides H.
        key, value: [B, H_kv, N/W, D] and [B, H_kv, N/W, DV]; W divides H_kv.
        group: a process group or one-dimensional DeviceMesh, the default group if None. All of its processes call with
            the same shapes, and all run backward, or wait for each other in vain.
        **options: those of ``functional.attention``, about the whole sequence and all heads, the same on every process:
            masks [*, M, N], lengths, windows, slopes and sinks [H]. The gradients of masks, slopes and sinks are this
            process's part, to be summed over all. Dropout is repeatable by ``dropout_seed``, but not one process's. Not
            ``return_weights`` and ``cu_seqlens``.

    Returns:
        [B, H, M/W, DV], and if ``return_lse`` [B, H, M/W]; as differentiable as ``functional.attention`` is.

    Raises:
        InvalidInput: for heads that W does not divide, and as there.
        UnsupportedInput: as there.
    """
    group = group_of(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    check_parts("ulysses_attention", query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[1] % ranks:
            raise InvalidInput(
                f"ulysses_attention: {ranks} processes must divide the heads of {name}, got {tensor.shape[1]}; use "
                "ring_attention, or repeat the heads of key and value"
            )
    for name in ("return_weights", "cu_seqlens_q", "cu_seqlens_k"):
        if options.get(name) is not None:
            raise InvalidInput(
                f"ulysses_attention: takes no {name}, got one; gather the sequence for functional.attention"
            )
    if is_number(options.get("dropout_p")) and options["dropout_p"] and options.get("dropout_seed") is None:
        options["dropout_seed"] = torch.randint(2**62, (1,), device=query.device)
    options |= _of_heads(options, query.shape[1], rank, ranks)
    found = functional.attention(*(_exchange(t, 1, 2, group) for t in cast(query, key, value)), **options)
    if not options.get("return_lse"):
        return _exchange(found, 2, 1, group)
    out, lse = found
    return _exchange(out, 2, 1, group), _exchange(lse, 2, 1, group)


def _of_heads(options: dict[str, Any], heads: int, rank: int, ranks: int) -> dict[str, Any]:
    """The options that differ between heads, for the heads of this process."""
    mine = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
    found = {}
    for name in _BY_HEAD:
        vector = options.get(name)
        if isinstance(vector, Tensor):
            if vector.shape != (heads,):
                raise InvalidInput(
                    f"ulysses_attention: {name} must be those of all heads, [{heads}], got {list(vector.shape)}"
                )
            found[name] = vector[mine]
    mask, seed = options.get("attn_mask"), options.get("dropout_seed")
    if isinstance(mask, Tensor) and not is_causal_bias(mask) and mask.dim() > 2 and mask.shape[-3] == heads > 1:
        found["attn_mask"] = mask[..., mine, :, :]
    # What is no seed functional.attention refuses.
    if type(seed) is int or (isinstance(seed, Tensor) and seed.dtype == torch.int64):
        # Dropout counts heads from 0 on each process; they must not all drop alike.
        found["dropout_seed"] = seed + rank
    return found


def _exchange(tensor: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
    """Give each process its part of dimension ``scatter``, and take from each its part of dimension ``gather``."""
    return _Exchange.apply(tensor, scatter, gather, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scatter, gather, group):
        ctx.back = gather, scatter, group
        parts = torch.stack(tensor.chunk(dist.get_world_size(group), scatter))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), gather)

    @staticmethod
    def backward(ctx, gradient):
        return _exchange(gradient, *ctx.back), None, None, None
