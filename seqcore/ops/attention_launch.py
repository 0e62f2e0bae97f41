"""Launches of the attention kernels: tensors in, tensors out; arguments as in ``ops.attention``."""

import math

import torch
from torch import Tensor

from .attention_arguments import Arguments, blocks, grid, with_columns

# Tiles of kernels that multiply nothing.
ROWS = 64
COMBINED_ROWS = 16


def forward(q: Tensor, k: Tensor, v: Tensor, *options) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and rows."""
    from ..kernels.attention.forward import attention_forward_kernel

    given = Arguments(q, k, v, *options)
    out = given.blank((*q.shape[:3], v.shape[3]), q.dtype)
    lse = given.blank(q.shape[:3], torch.float32, -math.inf)
    rows = given.blank((2, *q.shape[:3]), torch.float32)
    if not lse.numel():
        return out, lse, rows
    tiles = given.tiles("attention_decode")
    if splits := given.splits(tiles):
        _decode(given, splits, tiles, out, lse, rows)
        return out, lse, rows
    tiles = given.tiles("attention_forward")
    (count,) = grid(given.count(tiles.rows))
    programs = min(count, tiles.persistent * given.device.multiprocessors) if tiles.persistent else count
    attention_forward_kernel[(programs,)](
        given.q, given.k, given.v, given.matrix(out), lse, *rows, *given.descriptors(tiles),
        given.features, given.sequences, count, *given.sizes, given.section(), **given.constants,
        PERSISTENT=tiles.persistent > 0, SPECIALIZE=tiles.specialize, **blocks(tiles),
    )  # fmt: skip
    return out, lse, rows


def _decode(given: Arguments, splits: int, tiles, out: Tensor, lse: Tensor, rows: Tensor) -> None:
    from ..kernels.attention.decode import attention_combine_kernel, attention_decode_kernel

    batch, heads, M, N = given.sizes
    constants, count = given.constants, lse.numel()
    part = torch.empty(splits, count, constants["DV"], dtype=torch.float32, device=out.device)
    part_max, part_sum = torch.empty(2, splits, count, dtype=torch.float32, device=out.device)
    attention_decode_kernel[grid(batch * given.heads_kv * splits)](
        given.q, given.k, given.v, part, part_max, part_sum, given.features, given.sequences,
        given.heads_kv, M, N, splits, **constants, **blocks(tiles.fitting(constants["GROUP"] * M)),
    )  # fmt: skip
    attention_combine_kernel[grid(-(-count // COMBINED_ROWS))](
        part, part_max, part_sum, out, lse, *rows, given.features, count, heads, M, splits, DV=constants["DV"],
        BLOCK_DV=constants["BLOCK_DV"], BLOCK_M=COMBINED_ROWS, num_warps=4,
    )  # fmt: skip


def backward(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, rows: Tensor, wanted: list[bool], q: Tensor, k: Tensor,
    v: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, *options,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, mask and sinks; None for those that are not wanted."""
    from ..kernels.attention import backward as kernels

    given = Arguments(q, k, v, mask, slopes, sinks, *options)
    want_q, want_k, want_v, want_mask, want_sinks = wanted
    dout = torch.zeros_like(out) if dout is None else with_columns(dout)
    # row_max, row_scale and delta side by side.
    statistics = torch.empty(*rows.shape[1:], 4, dtype=torch.float32, device=q.device)
    heads, M = q.shape[1:3]
    if statistics.numel():
        kernels.attention_backward_delta_kernel[grid(q.shape[0] * heads * -(-M // ROWS))](
            given.matrix(out), given.matrix(dout), None if dlse is None else dlse.contiguous(), *rows,
            statistics, heads, M,
            DV=given.constants["DV"], BLOCK_DV=given.constants["BLOCK_DV"], BLOCK_M=ROWS, num_warps=4,
        )  # fmt: skip
    inputs = (given.q, given.k, given.v, given.matrix(dout), statistics)
    dq = _dq(given, inputs, q) if want_q else None
    dk, dv = _dkdv(given, inputs, k, v) if want_k or want_v else (None, None)
    dmask = _dmask(given, inputs, mask) if want_mask else None
    dsinks = _dsinks(given, sinks, statistics) if want_sinks else None
    return dq, dk, dv, dmask, dsinks


def _dq(given: Arguments, inputs: tuple, q: Tensor) -> Tensor:
    from ..kernels.attention.backward import attention_backward_dq_kernel

    dq, tiles = given.blank(q.shape, q.dtype), given.tiles("attention_backward_dq")
    if dq.numel():
        attention_backward_dq_kernel[grid(given.count(tiles.rows))](
            *inputs, given.matrix(dq), given.features, given.sequences, *given.sizes, given.section(),
            **given.constants, **blocks(tiles),
        )  # fmt: skip
    return dq


def _dkdv(given: Arguments, inputs: tuple, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.attention.backward import attention_backward_dkdv_kernel

    dk, dv = given.blank(k.shape, k.dtype), given.blank(v.shape, v.dtype)
    tiles, (batch, _, M, N) = given.tiles("attention_backward_dkdv"), given.sizes
    if dk.numel():
        attention_backward_dkdv_kernel[grid(given.count(tiles.columns, over_keys=True))](
            *inputs, given.matrix(dk), given.matrix(dv), given.features, given.sequences, batch,
            given.heads_kv, M, N, given.section(over_keys=True), **given.constants, **blocks(tiles),
        )  # fmt: skip
    return dk, dv


def _dmask(given: Arguments, inputs: tuple, mask: Tensor) -> Tensor:
    """Summed by the kernel along queries or keys, or along batch and heads; what else there is to sum, by torch."""
    from ..kernels.attention.bias import attention_backward_bias_kernel

    (batch, heads, M, N), packed = given.sizes, given.packed
    sum_n = mask.shape[3] < N
    sum_m = mask.shape[2] < M and not sum_n
    apart = sum_n or sum_m
    batches = 1 if packed or apart or mask.shape[0] > 1 else batch
    copies = 1 if apart or mask.shape[1] > 1 else heads
    shape = (1 if packed else batch // max(batches, 1), heads // max(copies, 1), 1 if sum_m else M, 1 if sum_n else N)
    found = given.blank(shape, torch.float32 if apart else mask.dtype)
    if not given.tensors[0].numel() or not given.tensors[1].numel():
        return torch.zeros_like(mask)
    tiles = given.tiles("attention_backward_bias")
    count = given.count(tiles.columns if sum_m else tiles.rows, sum_m, heads // copies, batches)
    attention_backward_bias_kernel[grid(count * (1 if apart else -(-N // tiles.columns)))](
        *inputs, found, given.features, given.sequences, *given.sizes, batches, copies, **given.constants,
        SUM_M=sum_m, SUM_N=sum_n, **blocks(tiles),
    )  # fmt: skip
    return found.sum_to_size(mask.shape).to(mask.dtype)


def _dsinks(given: Arguments, sinks: Tensor, statistics: Tensor) -> Tensor:
    from ..kernels.attention.scores import LARGEST

    row_max, row_scale, delta, _ = statistics.unbind(-1)
    # Rows of no packed sequence have neither sink nor scale.
    inside = row_scale != 0
    lengths = None if given.packed else given.sequences.q_ptr
    if lengths is not None:
        # Gradients that arrive in the padding, finite or not, are none of the sink's.
        inside = inside & (torch.arange(delta.shape[2], device=delta.device) < lengths[:, None, None])
    # exp(sink - lse), the sink's own part of each row; in base 2 as the kernels have it.
    logits = sinks.float()
    logits = torch.where(logits.abs() <= LARGEST.value, logits * math.log2(math.e), logits)
    part = torch.exp2(logits[:, None] - row_max) * row_scale
    return -torch.where(inside, part * delta, 0.0).sum((0, 2)).to(sinks.dtype)


def weights(rows: Tensor, q: Tensor, k: Tensor, v: Tensor, *options) -> Tensor:
    """Weights averaged over heads, [B, M, N] float32."""
    from ..kernels.attention.weights import attention_weights_kernel

    given = Arguments(q, k, v, *options)
    batch, _, M, N = given.sizes
    found = torch.empty(batch, M, N, dtype=torch.float32, device=q.device)
    if found.numel():
        tiles = given.tiles("attention_weights")
        constants = {name: given.constants[name] for name in ("GROUP", "D", "BLOCK_D", "PRECISION")}
        attention_weights_kernel[grid(batch * -(-M // tiles.rows) * -(-N // tiles.columns))](
            given.q, given.k, *rows, found, given.features, given.sequences, *given.sizes, **constants,
            **blocks(tiles),
        )  # fmt: skip
    return found
