"""Singular values of products of thousands of matrices, in decades: their ratios are far beyond what a float holds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Singular values found all at once are rounding noise far below the largest; down to this part of it they have nine
# digits.
NOISE = 1e-7
# Each sweep makes what mixes two singular values smaller by the square of their ratio.
SWEEPS = 8
# No entry of a scaled row is larger than this, also where the diagonal entry it is scaled by is zero.
LARGEST = 36.0


class Graded(NamedTuple):
    """diag(exp(logs)) · right: a matrix with the singular values of a product; logs [N, S], right [N, S, S]."""

    logs: Tensor
    right: Tensor


def log10_singular_values(matrices: Tensor, lags: Sequence[int]) -> Tensor:
    """log10 of the singular values, largest first, of M_T M_{T-1} … M_{T-k+1} for each k in ``lags``.

    The transposed product gets its factors from the left, P_k^T = M_{T-k+1}^T P_{k-1}^T, and is held as Q diag(d) R
    with d in logarithms, by QR factorisations of columns sorted by size: nothing overflows, and small values do not
    drown in large ones.

    Singular values above 1e-7 of the largest are exact to rounding. Smaller ones are within 1e-4 decades where
    neighbours differ by a factor of two, and within 0.05 where by less. Where factors are singular, the
    smallest ones are zero (-inf) or what rounding made of it.

    Args:
        matrices: [T, B, S, S] float64, finite.
        lags: which k, from 1 to T.

    Returns:
        [len(lags), B, S] float64.

    Source: Dieci & Van Vleck, "Lyapunov spectral intervals: theory and computation" (2002), for re-orthogonalised
    products; Bai, Lee, Li & Xu, "Stable solutions of linear systems involving long chain of matrix multiplications"
    (2011), for scales held apart.
    """
    T, B, S, _ = matrices.shape
    eye = torch.eye(S, dtype=matrices.dtype, device=matrices.device).expand(B, S, S)
    q, product = eye, Graded(matrices.new_zeros(B, S), eye)
    products = {}
    for lag in range(1, max(lags, default=0) + 1):
        q, product = _extended(matrices[T - lag].mT @ q, product)
        if lag in lags:
            products[lag] = product
    if not products:
        return matrices.new_zeros(0, B, S)
    chosen = Graded(*(torch.cat(part) for part in zip(*(products[lag] for lag in lags), strict=True)))
    return _log_singular_values(chosen).unflatten(0, (len(lags), B)) / math.log(10)


def _extended(left: Tensor, product: Graded) -> tuple[Tensor, Graded]:
    """Q and the graded rest of ``left`` times ``product``."""
    order = (torch.linalg.vector_norm(left, dim=-2).log() + product.logs).argsort(-1, descending=True)
    q, r = torch.linalg.qr(left.gather(-1, order[..., None, :].expand_as(left)))
    logs, mixing = _scaled_rows(r, product.logs.gather(-1, order))
    return q, Graded(logs, mixing @ product.right.gather(-2, order[..., None].expand_as(product.right)))


def _scaled_rows(r: Tensor, logs: Tensor) -> Graded:
    """An upper triangular ``r`` times diag(exp(logs)), the scale of each row's diagonal entry taken out."""
    sizes = r.abs().log() + logs[..., None, :]
    scale = torch.maximum(sizes.diagonal(dim1=-2, dim2=-1), sizes.amax(-1) - LARGEST)
    rows = r.sign() * (sizes - torch.where(scale == -torch.inf, 0, scale)[..., None]).exp()
    return Graded(scale, rows)


def _log_singular_values(product: Graded) -> Tensor:
    """[N, S]: natural logarithms, largest first."""
    top = product.logs.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    at_once = torch.linalg.svdvals((product.logs - top).exp()[..., None] * product.right)
    for _ in range(SWEEPS):
        product = _swept(product)
    falling = product.logs.sort(-1, descending=True).values
    return torch.where(at_once > NOISE * at_once[..., :1], at_once.log() + top, falling)


def _swept(product: Graded) -> Graded:
    """Another matrix of the same singular values, nearer to diagonal: D R = D L Q^T, and L^T D is the next one."""
    order = (torch.linalg.vector_norm(product.right, dim=-1).log() + product.logs).argsort(-1, descending=True)
    right = product.right.gather(-2, order[..., None].expand_as(product.right))
    return _scaled_rows(torch.linalg.qr(right.mT).R, product.logs.gather(-1, order))
