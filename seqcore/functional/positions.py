"""Encodings of positions: sinusoids, rotations of queries and keys, and ALiBi's slopes. Plain PyTorch."""

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..reference.recurrence import wide
from ..reference.sizes import is_among
from .arguments import (
    check_base,
    check_factory,
    check_flags,
    check_floating,
    check_sizes,
    check_strided,
    is_size,
    shown,
)


def sinusoidal_positions(
    positions: Tensor, dim: int, base: float = 10000.0, dtype: torch.dtype | None = None
) -> Tensor:
    """P[p, 2i] = sin(p base^(-2i/dim)), P[p, 2i + 1] = cos(p base^(-2i/dim)): the encoding of the first Transformer.

    Args:
        positions: [*], integers or floating point.
        dim: width of the encoding, even.
        base: of the geometric progression of wavelengths, from 2 pi to 2 pi base.
        dtype: of the result; torch's default dtype if None. Angles are float64 whatever it is.

    Returns:
        [*, dim].

    Raises:
        InvalidInput: for positions that are no numbers, an odd ``dim`` or a ``base`` that is not positive.

    Source: Vaswani et al., "Attention Is All You Need" (2017), 3.5.
    """
    _check_positions("sinusoidal_positions", positions)
    check_progression("sinusoidal_positions", "dim", dim, base)
    check_factory("sinusoidal_positions", None, dtype)
    angles = _angles(positions, dim, base)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(dtype or torch.get_default_dtype())


def rotary(
    x: Tensor, positions: Tensor, base: float = 10000.0, interleaved: bool = False, dims: int | None = None
) -> Tensor:
    """Rotate pairs of features by angles that grow with position: q and k so rotated meet as their distance says.

    (y_a, y_b) = (x_a cos t - x_b sin t, x_a sin t + x_b cos t),   t = position * base^(-2i/dims)

    where pair i is (a, b) = (i, i + dims/2), as in GPT-NeoX and Llama, or (2i, 2i + 1) if ``interleaved``, as in the
    paper and GPT-J.

    Args:
        x: [*, M, D], floating point.
        positions: [M], or [B, M] with B the first dimension of x; integers or floating point.
        base: of the geometric progression of wavelengths.
        interleaved: which features form a pair, see above.
        dims: how many of the first features are rotated, even; the others stay. All by default.

    Returns:
        [*, M, D] in the dtype of x; differentiable in x. Angles are float64, since float32 rounds one of 100,000 by up
        to 0.004; the rotation itself runs in float32, or float64 for float64.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), 3.2.
    """
    dims = _check_rotary(x, positions, base, interleaved, dims)
    angles = _angles(positions, dims, base)
    if positions.dim() == 2:
        angles = angles.reshape(positions.shape[0], *(1,) * (x.dim() - 3), *angles.shape[1:])
    acc = wide(x.dtype)
    cos, sin = angles.cos().to(acc), angles.sin().to(acc)
    rotated, rest = x[..., :dims].to(acc), x[..., dims:]
    a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotated.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def alibi_slopes(heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """slope_h = 2^(-8 h / H), h = 1 … H, for H heads, H a power of two; for ``attention(alibi_slopes=)``.

    For other H as the authors do: the slopes of the largest power of two P below H, then every other one of those of
    2 P, from the first, as many as are lacking.

    Args:
        heads: H, positive.
        device, dtype: of the result; torch's defaults if None.

    Returns:
        [H].

    Raises:
        InvalidInput: if ``heads`` is not a positive integer.

    Source: Press et al., "Train Short, Test Long" (2022), 3, and the ``get_slopes`` they published.
    """
    check_sizes("alibi_slopes", heads=heads)
    check_factory("alibi_slopes", device, dtype)
    power = 1 << (heads.bit_length() - 1)
    # Made on the device: a list would be copied there, which waits for it and cannot be captured in a CUDA graph.
    whole = torch.arange(1, power + 1, device=device, dtype=torch.float64)
    between = torch.arange(heads - power, device=device, dtype=torch.float64) + 0.5
    return torch.exp2(-8 / power * torch.cat((whole, between))).to(dtype or torch.get_default_dtype())


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """position * base^(-2i/width) for i < width/2: [*, width/2] in float64."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float64) / -width
    return positions.to(torch.float64)[..., None] * float(base) ** exponents


def _check_positions(name: str, positions: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise InvalidInput(
            f"{name}: positions must be a Tensor, got {type(positions).__name__}; torch.arange(M) numbers M rows"
        )
    check_strided(name, "positions", positions)
    if positions.dtype == torch.bool or positions.is_complex():
        raise InvalidInput(f"{name}: positions must be integers or floating point, got {positions.dtype}")


def check_progression(name: str, what: str, width: int, base: float) -> None:
    """Raise InvalidInput for what no pairs of features can have: an odd width, or wavelengths of no progression."""
    if not is_size(width) or width % 2:
        raise InvalidInput(f"{name}: {what} must be even and positive, got {shown(width)}; at most 2^31 - 1")
    check_base(name, base)


def _check_rotary(x: Tensor, positions: Tensor, base: float, interleaved: bool, dims: int | None) -> int:
    """How many features are rotated."""
    check_flags("rotary", interleaved=interleaved)
    check_floating("rotary", "x", x)
    if x.dim() < 2:
        raise InvalidInput(f"rotary: x must be [*, M, D], got {list(x.shape)}")
    _check_positions("rotary", positions)
    (M, D), lead = x.shape[-2:], x.shape[:-2]
    allowed = ((M,), (lead[0], M)) if lead else ((M,),)
    if not is_among(positions.shape, allowed):
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise InvalidInput(f"rotary: positions must be {shapes} for x {list(x.shape)}, got {list(positions.shape)}")
    if positions.device != x.device:
        raise InvalidInput(f"rotary: positions must be on x's device {x.device}, got {positions.device}")
    dims = D if dims is None else dims
    check_progression("rotary", "dims, or the last dimension of x without it,", dims, base)
    if dims > D:
        raise InvalidInput(f"rotary: dims must be at most the last dimension of x, {D}, got {dims}")
    return dims
