"""What every attention kernel is given: matrices, features, sequences, sizes, compile-time constants and tiles."""

from typing import Any

import torch
from torch import Tensor

from ..capabilities import MAX_HEAD_DIM
from ..devices import describe
from ..errors import UnsupportedInput

# Bytes of keys and values that programs under way may share without crowding the second-level cache.
SHARED_BYTES = 16 << 20
# What numbers of 32 bits end before: programs of a launch, and what kernels number in the width that comes.
FAR = 1 << 31


class Arguments:
    """One call's tensors and options, as in ``ops.attention``, in the form that kernels take them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None,
        q_lengths: Tensor | None, k_lengths: Tensor | None, seed: Tensor | None, packed: bool, causal: str,
        left: int | None, right: int | None, scale: float, softcap: float, dropout_p: float,
    ) -> None:  # fmt: skip
        import triton

        from ..kernels import tuning
        from ..kernels.attention import layout, scores

        (batch, heads, M, D), (self.heads_kv, N, DV) = q.shape, v.shape[1:]
        if max(D, DV) > MAX_HEAD_DIM:
            raise UnsupportedInput(f"head dims must be at most {MAX_HEAD_DIM}, got {D} and {DV}")
        self.device, self.packed, self.dtype = describe(q.device), packed, q.dtype
        self.row_bytes = (D + DV) * q.itemsize
        self._tuning, self._matrix, self._constant = tuning, layout.Matrix, triton.language.constexpr
        self.tensors = tuple(map(with_columns, (q, k, v)))
        self.q, self.k, self.v = map(self.matrix, self.tensors)
        self.sizes = (q_lengths.numel() - 1 if packed else batch, heads, M, N)
        lengths = (None if t is None else t.contiguous() for t in (q_lengths, k_lengths))
        self.sequences = layout.Sequences(*lengths, 1 if packed else None)
        right = 0 if causal != "none" else right
        # Where all bounds are far away a number of 32 bits would overflow beside them.
        left, right = (None if side is None else min(side, M + N) for side in (left, right))
        ragged = q_lengths is not None or k_lengths is not None
        shifted = causal != "top_left" and (ragged or M != N)
        self.features = scores.Features(
            scale=float(scale),
            positive=1 if scale > 0 else None,
            softcap=float(softcap) if softcap else None,
            left=left,
            right=right,
            lower_right=1 if shifted else None,
            **self._mask(mask, batch, heads, M, N),
            slopes_ptr=None if slopes is None else slopes.float().contiguous(),
            sinks_ptr=None if sinks is None else sinks.float().contiguous(),
            seed_ptr=seed if dropout_p else None,
            dropout=float(dropout_p) if dropout_p else None,
            kept_scale=1 / ((1 - dropout_p) or 1) if dropout_p else None,
        )
        self.constants = {
            "GROUP": heads // max(self.heads_kv, 1),
            "D": D,
            "DV": DV,
            "BLOCK_D": tuning.power_of_two(D),
            "BLOCK_DV": tuning.power_of_two(DV),
            "PRECISION": _precision(q.dtype, self.device.arch),
        }

    @staticmethod
    def _mask(mask: Tensor | None, *shape: int) -> dict[str, Any]:
        if mask is None:
            return {}
        names = (f"stride_mask_{dimension}" for dimension in "bhmn")
        return {"mask_ptr": mask, **dict(zip(names, mask.expand(shape).stride(), strict=True))}

    def matrix(self, tensor: Tensor):
        """A tensor [B, H, rows, columns] with contiguous columns, as kernels take it."""
        strides = [0 if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False)]
        unit = 16 // tensor.itemsize
        # Kernels multiply a row's stride by the unit in the width of the stride: 32 bits, where it fits those.
        unit = 1 if any(step % unit for step in strides) or strides[2] >= FAR else unit
        return self._matrix(tensor, *(step // unit for step in strides), self._constant(unit))

    def blank(self, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """Room for a result. Packed sequences may leave rows to nobody, which then keep ``fill``."""
        if self.packed:
            return torch.full(shape, fill, dtype=dtype, device=self.tensors[0].device)
        return torch.empty(shape, dtype=dtype, device=self.tensors[0].device)

    def tiles(self, operation: str):
        """Tile sizes for ``operation`` here, as the tables have them."""
        head_dim = max(self.constants["D"], self.constants["DV"])
        masked = self.features.mask_ptr is not None
        return self._tuning.attention_tiles(operation, head_dim, torch.finfo(self.dtype).bits, self.device, masked)

    def count(self, block: int, over_keys: bool = False, heads: int | None = None, batches: int = 1) -> int:
        """How many tiles ``locate`` knows, over ``heads`` (H, or H_kv over keys) and a ``batches``-th of the batch."""
        sequences, all_heads, M, N = self.sizes
        length = N if over_keys else M
        heads = (self.heads_kv if over_keys else all_heads) if heads is None else heads
        if self.packed:
            return heads * (length // block + sequences)
        return heads * (sequences // batches) * -(-length // block)

    def section(self, over_keys: bool = False) -> int:
        """How many heads are worked on at a time: all of causal attention's that the cache holds, else one."""
        if self.features.right is None:
            return 1
        batch, heads, M, N = self.sizes
        group = self.constants["GROUP"]
        shared = M * group if over_keys else N
        fitting = max(1, SHARED_BYTES // max(1, shared * self.row_bytes)) * (1 if over_keys else group)
        # Never more than there are: section * blocks must stay within 32 bits.
        return max(1, min(fitting, batch * (self.heads_kv if over_keys else heads)))

    def splits(self, tiles) -> int:
        """Among how many programs to split the keys of a few queries; 0 is for the plain kernel."""
        batch, _, M, N = self.sizes
        group = self.constants["GROUP"]
        # The kernel that puts parts together numbers all rows in 32 bits.
        if self.packed or not N or group * M > tiles.rows or batch * self.heads_kv * group * M >= FAR:
            return 0
        return self._tuning.decode_splits(self.device, batch * self.heads_kv, group * M, group, -(-N // tiles.columns))

    def descriptors(self, tiles) -> tuple:
        """Of k and v, for the hardware that copies tiles by itself; (None, None) where tiles or alignment forbid it."""
        widths = (self.constants["BLOCK_D"], self.constants["BLOCK_DV"])
        keys = tuple(zip(self.tensors[1:], widths, strict=True))
        if not tiles.descriptors or not all(_describable(tensor, width) for tensor, width in keys):
            return None, None
        from triton.tools.tensor_descriptor import TensorDescriptor

        return tuple(
            TensorDescriptor(tensor, list(tensor.shape), _strides(tensor), [1, 1, tiles.columns, width])
            for tensor, width in keys
        )


def blocks(tiles) -> dict[str, int]:
    """A launch's keywords for its tiles."""
    return {
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages
    }  # fmt: skip


def grid(programs: int) -> tuple[int]:
    """A launch's grid.

    Raises:
        UnsupportedInput: if no launch can have as many programs.
    """
    if programs >= FAR:
        raise UnsupportedInput(f"attention: a launch has fewer than 2^31 tiles, got {programs}; divide the batch")
    return (programs,)


def with_columns(tensor: Tensor) -> Tensor:
    """With contiguous columns, as the kernels assume."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _describable(tensor: Tensor, width: int) -> bool:
    """Whether a descriptor can copy rows of ``width`` columns: all of them, everything aligned to 16 bytes."""
    steps = _strides(tensor)[:3]
    aligned = tensor.data_ptr() % 16 == 0 and all(step > 0 and step * tensor.itemsize % 16 == 0 for step in steps)
    return aligned and tensor.numel() > 0 and tensor.shape[3] == width


def _strides(tensor: Tensor) -> list[int]:
    """Strides that a descriptor takes: what steps along a dimension of size 1, which may be anything, is made legal."""
    widest = tensor.shape[2] * tensor.shape[3]
    return [widest if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False)] + [1]


def _precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 products are made, after torch's own switch for matrix products."""
    if dtype != torch.float32 or not arch.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
