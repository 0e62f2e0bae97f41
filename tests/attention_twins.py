"""Torch's attention as the yardstick: outputs, log-sum-exp and gradients, by name, from torch and from seqcore."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqcore.testing.budget import assert_within_budget

Results = dict[str, Tensor]


def qkv(
    *lead: int, heads_kv: int | None = None, M: int = 5, N: int = 7, D: int = 6, DV: int | None = None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [*lead, M, D], key [*lead, N, D] and value [*lead, N, DV], the last two of ``heads_kv`` heads."""
    lead_kv = lead if heads_kv is None else (*lead[:-1], heads_kv)
    shapes = ((*lead, M, D), (*lead_kv, N, D), (*lead_kv, N, D if DV is None else DV))
    return tuple(torch.randn(shape, **options) for shape in shapes)


def seen(M: int, N: int, rule: Callable[[int, int], bool]) -> Tensor:
    """The bool mask [M, N] of the pairs for which ``rule(m, n)`` holds."""
    return torch.tensor([[rule(m, n) for n in range(N)] for m in range(M)], dtype=torch.bool).reshape(M, N)


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Random weights for ``outputs``: eighths, which every dtype holds exactly; the same in each call."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(-8, 9, out.shape, generator=generator) / 8).to(out) for out in outputs]


def results(function: Callable, *inputs: Tensor, weigh: tuple[str, ...] = ("out", "lse"), **options) -> Results:
    """out, and lse if ``function`` returns it, and each input's gradient of a fixed weighing of those in ``weigh``."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, **options)
    outputs = dict(zip(("out", "lse"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    weighed = [outputs[name] for name in weigh if name in outputs]
    gradients = torch.autograd.grad(weighed, leaves, cotangents(weighed), materialize_grads=True)
    names = ("query", "key", "value", "attn_mask")
    return outputs | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=False)}


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: str | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention``, causality given as a mask, and the log-sum-exp it does not return."""
    M, N = query.shape[-2], key.shape[-2]
    mask = attn_mask
    if causal is not None:
        diagonal = N - M if causal == "lower_right" else 0
        visible = torch.ones(M, N, dtype=torch.bool, device=query.device).tril(diagonal)
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else torch.where(visible, mask, float("-inf"))
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)
    return out, _log_sum_exp(query, key, mask, scale, enable_gqa)


def _log_sum_exp(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.to(wide) @ key.to(wide).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(wide)
    empty = (scores == float("-inf")).all(-1)
    return torch.where(empty, float("-inf"), torch.where(empty[..., None], 0, scores).logsumexp(-1))


def assert_equal_in_float64(actual: Results, expected: Results) -> None:
    """Two orders of the same float64 arithmetic, which nothing more exact could judge: torch's own tolerances."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_within(actual: Results, exact: Results, eager: Results) -> None:
    """Hold everything in ``actual`` to the error budget."""
    assert actual.keys() == exact.keys() == eager.keys()
    for name, value in actual.items():
        assert_within_budget(value, exact[name], eager[name], name)


def assert_like_torch(
    function: Callable, *inputs: Tensor, weigh: tuple[str, ...] = ("out", "lse"), **options
) -> Results:
    """``function`` does what torch does with the same arguments, as exactly as torch does it in that precision."""
    actual = results(function, *inputs, weigh=weigh, **options)
    eager = results(torch_attention, *inputs, weigh=weigh, **options)
    inputs, options = [doubled(t) for t in inputs], {name: doubled(value) for name, value in options.items()}
    exact = results(torch_attention, *inputs, weigh=weigh, **options)
    for name, value in actual.items():
        assert_within_budget(value, exact[name], eager[name], name)
    return actual


def doubled(value):
    """A floating-point tensor in float64; anything else as it is."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
