"""Attention over sequences laid end to end, one by one where it can be seen where they end.

So nothing of one sequence can reach another: in one product over all of them a NaN would, times a weight of 0. And no
scores are made that nobody may see. Where ends cannot be looked at, in a traced graph or on a GPU, all are one product.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as dense
from .attention import NEGATIVE_INFINITY, Result
from .attention_backward import Gradients
from .attention_backward import backward as dense_backward
from .recurrence import wide
from .sizes import readable


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, **options,
) -> Result:  # fmt: skip
    """``reference.attention.attention``; weights are None where sequences are taken one by one."""
    if cu_seqlens_q is None or not (readable(cu_seqlens_q) and readable(cu_seqlens_k)):
        return dense.attention(
            query, key, value, attn_mask=attn_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options
        )
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    each = zip(_each(query, q), _each(key, k), _each(value, k), _masks(attn_mask, q, k), strict=True)
    found = [
        dense.attention(*tensors, attn_mask=mask, first_sequence=number, **options)
        for number, (*tensors, mask) in enumerate(each)
    ]
    out, lse, _, rows = zip(*found, strict=True)
    out, lse, rows = torch.cat(out, -2), torch.cat(lse, -1), torch.cat(rows, -1)
    # Rows that belong to no sequence.
    more = query.shape[-2] - lse.shape[-1]
    lse = F.pad(lse, (0, more), value=NEGATIVE_INFINITY)
    return Result(F.pad(out, (0, 0, 0, more)), lse, None, F.pad(rows, (0, more)))


def backward(
    dout: Tensor | None, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, rows: Tensor, *,
    attn_mask: Tensor | None, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **options,
) -> Gradients:  # fmt: skip
    """``reference.attention_backward.backward``."""
    if cu_seqlens_q is None or not (readable(cu_seqlens_q) and readable(cu_seqlens_k)):
        return dense_backward(
            dout, dlse, query, key, value, out, rows, attn_mask=attn_mask, sinks=sinks, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, **options,
        )  # fmt: skip
    acc = wide(query.dtype)
    # What several sequences share is summed in the precision it is computed in.
    mask = attn_mask.to(acc) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    total = Gradients(
        torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value),
        torch.zeros_like(mask) if mask is not None and mask.is_floating_point() else None,
        None if sinks is None else torch.zeros_like(sinks, dtype=acc),
    )  # fmt: skip
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    each = zip(
        _each(dout, q), _each(dlse, q, -1), _each(query, q), _each(key, k), _each(value, k), _each(out, q),
        _each(rows, q, -1), _masks(mask, q, k), strict=True,
    )  # fmt: skip
    totals = zip(_each(total.query, q), _each(total.key, k), _each(total.value, k), strict=True)
    dmasks = _masks(total.mask, q, k)
    for number, ((*tensors, own), into, dmask) in enumerate(zip(each, totals, dmasks, strict=True)):
        found = dense_backward(
            *tensors, attn_mask=own, sinks=None if sinks is None else sinks.to(acc), cu_seqlens_q=None,
            cu_seqlens_k=None, first_sequence=number, **options,
        )  # fmt: skip
        for gradient, part in zip(into, found[:3], strict=True):
            gradient.copy_(part)
        if dmask is not None:
            dmask += found.mask
        if sinks is not None:
            total.sinks.add_(found.sinks)
    dmask, dsinks = (
        None if t is None else t.to(like.dtype) for t, like in ((total.mask, attn_mask), (total.sinks, sinks))
    )
    return total._replace(mask=dmask, sinks=dsinks)


def _each(tensor: Tensor | None, ends: list[int], dim: int = -2) -> Sequence[Tensor | None]:
    """Every sequence's part, all at once: the gradient of each of many slices would be as large as the whole."""
    sizes = [end - begin for begin, end in pairwise(ends)]
    if tensor is None:
        return [None] * len(sizes)
    return tensor.split([*sizes, tensor.shape[dim] - ends[-1]], dim)[:-1]


def _masks(mask: Tensor | None, q: list[int], k: list[int]) -> list[Tensor | None]:
    """Every sequence's part of a mask, which may be broadcast over queries and keys."""
    if mask is None:
        return [None] * (len(q) - 1)
    by_queries = _each(mask, q) if mask.shape[-2] > 1 else [mask] * (len(q) - 1)
    columns = [slice(begin, end) if mask.shape[-1] > 1 else slice(None) for begin, end in pairwise(k)]
    return [rows[..., own] for rows, own in zip(by_queries, columns, strict=True)]
