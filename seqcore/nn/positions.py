"""Modules that tell a sequence's positions to what follows; all take where each sequence starts.

``start`` is an int, or a Tensor of integers: [], or [B] with the start of each sequence, such as
:class:`KVCache`'s ``lengths``. A Tensor's values are not brought to the host, and no value of it compiles anew. Nothing
is kept between calls: a table would be one more thing to cast by ``.half()``, and to grow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..errors import InvalidInput
from ..functional.arguments import check_factory, check_flags, check_floating, check_sizes, check_strided, shown
from ..functional.positions import check_progression
from ..reference.sizes import is_among, readable

FARTHEST = 2**62


class _AddedPositions(nn.Module):
    """x + P[start], P[start + 1], …; what P is, subclasses say."""

    def __init__(self, dim: int, batch_first: bool) -> None:
        super().__init__()
        name = type(self).__name__
        check_sizes(name, dim=dim)
        check_flags(name, batch_first=batch_first)
        self.dim, self.batch_first = dim, batch_first

    def _encoding(self, positions: Tensor, start: int | Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """x plus the encoding of its positions, in the shape and dtype of x.

        Args:
            x: [T, B, dim], [B, T, dim] if ``batch_first``, [T, dim] unbatched; floating point.
            start: the position of the first row: an int, [] or, if batched, [B].

        Raises:
            InvalidInput: for wrong ranks, sizes, dtypes or devices.
        """
        name = type(self).__name__
        _check_x(name, x, (2, 3), self.dim)
        batched = x.dim() == 3
        length_dim = int(batched and self.batch_first)
        positions = _positions(name, start, x.shape[length_dim], x.shape[1 - length_dim] if batched else None, x.device)
        encoding = self._encoding(positions, start, x.dtype)
        if batched and not self.batch_first:
            encoding = encoding.unsqueeze(1) if encoding.dim() == 2 else encoding.transpose(0, 1)
        return x + encoding

    def extra_repr(self) -> str:
        return f"{self.dim}, batch_first={self.batch_first}"


class SinusoidalPositions(_AddedPositions):
    """x + P, P[p, 2i] = sin(p base^(-2i/dim)), P[p, 2i + 1] = cos(p base^(-2i/dim)); no parameters.

    Args:
        dim: width of x, even.
        base: of the geometric progression of wavelengths.
        batch_first: x is [B, T, dim] and not [T, B, dim].

    Source: Vaswani et al. (2017), 3.5.
    """

    def __init__(self, dim: int, base: float = 10000.0, batch_first: bool = False) -> None:
        check_progression("SinusoidalPositions", "dim", dim, base)
        super().__init__(dim, batch_first)
        self.base = base

    def _encoding(self, positions: Tensor, start: int | Tensor, dtype: torch.dtype) -> Tensor:
        return functional.sinusoidal_positions(positions, self.dim, self.base, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base}"


class LearnedPositions(_AddedPositions):
    """x + weight[p]: a row of parameters for each position.

    Args:
        max_length: how many positions there are.
        dim: width of x.
        batch_first: x is [B, T, dim] and not [T, B, dim].
        device, dtype: of the weight.

    ``weight`` is [max_length, dim], drawn from a normal distribution of deviation 0.02. A position that is not in it
    raises ``InvalidInput`` where it is known without waiting for the device: for an int ``start``, and in eager mode
    on a CPU. Elsewhere it gives NaN.

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning" (2017), 3.1; Devlin et al., "BERT" (2019), for
    the deviation.
    """

    def __init__(
        self,
        max_length: int,
        dim: int,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, batch_first)
        check_sizes("LearnedPositions", max_length=max_length)
        check_factory("LearnedPositions", device, dtype)
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def _encoding(self, positions: Tensor, start: int | Tensor, dtype: torch.dtype) -> Tensor:
        if positions.device != self.weight.device:
            raise InvalidInput(
                f"LearnedPositions: x must be on the weight's device {self.weight.device}, got {positions.device}"
            )
        if not isinstance(start, Tensor):
            self._check_range(start, start + positions.shape[-1])
            return F.embedding(positions, self.weight).to(dtype)
        if readable(start) and positions.numel():
            self._check_range(int(positions.min()), int(positions.max()) + 1)
        # An index out of range would stop a GPU for good; a wrong row would go unnoticed.
        known = positions.clamp(0, self.max_length - 1)
        outside = (positions != known)[..., None]
        return F.embedding(known, self.weight).to(dtype).masked_fill(outside, float("nan"))

    def _check_range(self, first: int, end: int) -> None:
        if first < 0 or end > self.max_length:
            raise InvalidInput(
                f"LearnedPositions: positions must lie in 0 … {self.max_length - 1}, got {first} … {end - 1}; "
                "pass a larger max_length, or shorter sequences"
            )

    def extra_repr(self) -> str:
        return f"{self.max_length}, {super().extra_repr()}"


class RotaryPositions(nn.Module):
    """Queries or keys rotated by their positions, pair by pair of features; see :func:`seqcore.functional.rotary`.

    Args:
        head_dim: D, the last dimension of x.
        base: of the geometric progression of wavelengths.
        interleaved: pairs are (2i, 2i + 1) and not (i, i + dims/2).
        dims: how many of the first features are rotated; all by default.

    Source: Su et al., "RoFormer" (2021), 3.2.
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, interleaved: bool = False, dims: int | None = None
    ) -> None:
        super().__init__()
        check_sizes("RotaryPositions", head_dim=head_dim)
        check_flags("RotaryPositions", interleaved=interleaved)
        check_progression("RotaryPositions", "dims, or head_dim without it,", head_dim if dims is None else dims, base)
        if dims is not None and dims > head_dim:
            raise InvalidInput(f"RotaryPositions: dims must be at most head_dim, {head_dim}, got {dims}")
        self.head_dim, self.base, self.interleaved, self.dims = head_dim, base, interleaved, dims

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """x rotated, in its shape and dtype.

        Args:
            x: [B, H, T, D], floating point.
            start: the position of the first row: an int, [] or [B].

        Raises:
            InvalidInput: for wrong ranks, sizes, dtypes or devices.
        """
        _check_x("RotaryPositions", x, (4,), self.head_dim)
        positions = _positions("RotaryPositions", start, x.shape[2], x.shape[0], x.device)
        return functional.rotary(x, positions, self.base, self.interleaved, self.dims)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}, dims={self.dims}"


def _check_x(name: str, x: Tensor, ranks: tuple[int, ...], width: int) -> None:
    check_floating(name, "x", x)
    if x.dim() not in ranks or x.shape[-1] != width:
        dimensions = " or ".join(str(rank) for rank in ranks)
        raise InvalidInput(f"{name}: x must have {dimensions} dimensions, the last of {width}, got {list(x.shape)}")


def _positions(name: str, start: int | Tensor, length: int, batch: int | None, device: torch.device) -> Tensor:
    """start … start + length - 1: [T], or [B, T] from a start of each sequence."""
    steps = torch.arange(length, device=device)
    if isinstance(start, int | torch.SymInt) and not isinstance(start, bool):
        # A traced graph would be told of the bound.
        if not torch.compiler.is_compiling() and abs(start) > FARTHEST:
            raise InvalidInput(f"{name}: start must lie within 2^62 of 0, got {start}; positions are int64")
        return start + steps
    if not isinstance(start, Tensor):
        raise InvalidInput(
            f"{name}: start must be an int or a Tensor of integers {_starts(batch)}, got {shown(start)}"
        )
    check_strided(name, "start", start)
    fits = is_among(start.shape, ((),) if batch is None else ((), (batch,)))
    if not fits or start.dtype not in (torch.int32, torch.int64) or start.device != device:
        raise InvalidInput(
            f"{name}: start must be an int or a Tensor of int32 or int64 {_starts(batch)} on {device}, got "
            f"{list(start.shape)} {start.dtype} on {start.device}"
        )
    return start[..., None] + steps


def _starts(batch: int | None) -> str:
    """The shapes that a start may have, for messages alone: to write a size out fixes it in a compiled graph."""
    return "[]" if batch is None else f"[] or [{batch}]"
