"""``seqcore::attention_forward`` and ``_backward``: q [B, H, M, D], k [B, H_kv, N, D], v [B, H_kv, N, DV].

The mask, if any, is [B, H, M, N] (broadcast dimensions have stride 0) and bool (True may attend) or additive;
``causal`` is "none", "top_left" or "lower_right". Forward gives out, lse, and for backward ``rows`` [2, B, H, M]: each
row's largest score in base 2, and one over its sum of exp2(score - largest).
"""

import torch
from torch import Tensor

from ..backends import MAX_HEAD_DIM, describe
from ..errors import UnsupportedInput
from ..reference import attention as reference
from ..reference.recurrence import wide
from .library import define, interpreted

FORWARD_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, str causal, float scale) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor rows, str causal, "
    "float scale) -> (Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernels(q):
        result = reference.attention(q, k, v, attn_mask=mask, causal=_named(causal), scale=scale)
        return result.out.contiguous(), result.lse.contiguous(), _blank_rows(q)
    from ..kernels.attention.forward import attention_forward_kernel

    launch = _Launch(q, k, v, mask, causal, scale, "attention_forward")
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows = _blank_rows(q)
    if lse.numel():
        attention_forward_kernel[launch.grid_over_queries](
            launch.q, launch.k, launch.v, launch.mask, out, lse, *rows,
            *launch.strides, *out.stride()[:3], q.shape[1], *launch.sizes, **launch.constants,
        )  # fmt: skip
    return out, lse, rows


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    rows: Tensor,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernels(q):
        return reference.backward(dout, dlse, q, k, v, mask, out, _named(causal), scale)
    from ..kernels.attention import backward as kernels

    launch = _Launch(q, k, v, mask, causal, scale, "attention_backward")
    dout = torch.zeros_like(out) if dout is None else _rows(dout)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(rows[0])
    heads, heads_kv, constants = q.shape[1], k.shape[1], launch.constants
    arguments = (launch.q, launch.k, launch.v, launch.mask, dout, *rows, delta)
    strides = (*launch.strides, *dout.stride()[:3])
    if delta.numel():
        kernels.attention_backward_delta_kernel[launch.grid_over_queries](
            out, dout, delta if dlse is None else dlse.contiguous(), delta, *out.stride()[:3], *dout.stride()[:3],
            heads, q.shape[2], DV=constants["DV"], BLOCK_DV=constants["BLOCK_DV"], HAS_DLSE=dlse is not None,
            BLOCK_M=constants["BLOCK_M"],
        )  # fmt: skip
    if dk.numel():
        kernels.attention_backward_dkdv_kernel[launch.grid_over_keys](
            *arguments, dk, dv, *strides, heads_kv, *launch.sizes, **constants
        )
    if dq.numel():
        kernels.attention_backward_dq_kernel[launch.grid_over_queries](
            *arguments, dq, *strides, heads, *launch.sizes, **constants
        )
    return dq, dk, dv


def _has_kernels(q: Tensor) -> bool:
    return q.is_cuda or interpreted(q.dtype)


def _blank_rows(q: Tensor) -> Tensor:
    """Room for what the kernels keep of each row; the reference's backward has whole rows at hand and keeps nothing."""
    return torch.empty(2, *q.shape[:2], q.shape[2] if _has_kernels(q) else 0, dtype=torch.float32, device=q.device)


class _Launch:
    """What every attention kernel is given: pointers, strides, sizes, compile-time constants and grids."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float, operation: str
    ) -> None:
        from ..kernels import tuning

        (batch, heads, M, D), (heads_kv, N, DV) = q.shape, v.shape[1:]
        if max(D, DV) > MAX_HEAD_DIM:
            raise UnsupportedInput(f"head dims must be at most {MAX_HEAD_DIM}, got {D} and {DV}")
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        # Without a mask any pointer will do: the kernel is compiled not to use it.
        self.mask = q if mask is None else mask
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        self.strides = (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *mask_strides)
        self.sizes = (M, N, scale, N - M if causal == "lower_right" else 0)
        arch = describe(q.device).arch
        tiles = tuning.attention_tiles(operation, max(D, DV), torch.finfo(q.dtype).bits, arch)
        self.constants = {
            "GROUP": heads // max(heads_kv, 1),
            "D": D,
            "DV": DV,
            "BLOCK_D": tuning.power_of_two(D),
            "BLOCK_DV": tuning.power_of_two(DV),
            "CAUSAL": causal != "none",
            "MASK_KIND": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            "PRECISION": _precision(q.dtype, arch),
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.columns,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }
        self.grid_over_queries = (batch * heads * -(-M // tiles.rows),)
        self.grid_over_keys = (batch * heads_kv * -(-N // tiles.columns),)


def _precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 products are made, after torch's own switch for matrix products."""
    if dtype != torch.float32 or not arch.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _rows(tensor: Tensor) -> Tensor:
    """With contiguous columns, as the kernels assume."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _named(causal: str) -> str | None:
    return None if causal == "none" else causal


def _forward_fake(q, k, v, mask, causal, scale):
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=wide(q.dtype), device=q.device), _blank_rows(q)


def _backward_fake(dout, dlse, q, k, v, mask, out, rows, causal, scale):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


define("attention_forward", FORWARD_SCHEMA, _forward, _forward_fake)
define("attention_backward", BACKWARD_SCHEMA, _backward, _backward_fake)
forward = torch.ops.seqcore.attention_forward
backward = torch.ops.seqcore.attention_backward
