"""Yardsticks, torch's attention and the reference: outputs, log-sum-exp and gradients, by name, of whatever attends."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqcore import functional
from seqcore.autograd.attention import Settings
from seqcore.testing.budget import assert_within_budget

from .comparisons import Results, cotangents

OUTPUTS = ("out", "lse", "weights")
INPUTS = ("query", "key", "value", "attn_mask")


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


def results(function: Callable, *inputs: Tensor, weigh: tuple[str, ...] = OUTPUTS, **options) -> Results:
    """What ``function`` returns of ``OUTPUTS``, and the gradients of a fixed weighing of those in ``weigh``.

    Of each input, and of each option that requires one.
    """
    learned = {name: t for name, t in options.items() if isinstance(t, Tensor) and t.requires_grad}
    leaves = dict(zip(INPUTS, inputs, strict=False)) | learned
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    options = options | {name: leaves[name] for name in learned}
    outputs = function(*[leaves[name] for name in INPUTS[: len(inputs)]], **options)
    outputs = dict(zip(OUTPUTS, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    weighed = [outputs[name] for name in weigh if name in outputs]
    gradients = torch.autograd.grad(weighed, list(leaves.values()), cotangents(weighed), materialize_grads=True)
    return outputs | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def kernels(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options):
    """seqcore's attention by its kernels; with the log-sum-exp."""
    return functional.attention(query, key, value, attn_mask=attn_mask, return_lse=True, backend="triton", **options)


def reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options):
    """seqcore's attention in plain PyTorch; with the log-sum-exp."""
    return functional.attention(query, key, value, attn_mask=attn_mask, return_lse=True, backend="reference", **options)


def attending(backend: str) -> Callable:
    """seqcore's attention by a backend, with the log-sum-exp where that does not force another one upon "auto"."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options):
        options |= {"attn_mask": attn_mask, "backend": backend, "return_lse": backend == "reference"}
        return functional.attention(query, key, value, **options)

    return attend


def amplified(function: Callable, factor: float, *inputs: Tensor, **options) -> tuple[Tensor, ...]:
    """Gradients of query, key and value where ``factor`` comes in for each element of ``function``'s out."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, **options)[0]
    return torch.autograd.grad(out, leaves, torch.full_like(out, factor))


def features(B: int, H: int, M: int, N: int, **options) -> dict[str, dict[str, Any]]:
    """Options by name: each of attention's features, and all together; tensors are made with ``options``."""
    slopes = torch.linspace(-0.1, 0.5, H, **options)
    sinks = torch.linspace(-1, 2, H, **options).requires_grad_()
    lengths = {
        "query_lengths": torch.linspace(M, M // 2, B).long(), "key_lengths": torch.linspace(N // 2, N, B).long()
    }  # fmt: skip
    dropout = {"dropout_p": 0.3, "dropout_seed": torch.tensor([7])}
    bias = torch.randn(1, H, M, N, **options).requires_grad_()
    window = {"window": (N // 2, 2), "causal": "lower_right"}
    return {
        "plain": {},
        "top_left": {"causal": "top_left"},
        "lower_right": {"causal": "lower_right"},
        "window": {"window": (N // 2, 1)},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sinks": sinks},
        "lengths": lengths,
        "dropout": dropout,
        "bool mask": {"attn_mask": torch.rand(B, 1, M, N) < 0.7},
        "additive mask": {"attn_mask": bias},
        "everything": {
            "softcap": 1.5, "alibi_slopes": slopes, "sinks": sinks, "attn_mask": bias, **window, **dropout, **lengths
        },
    }  # fmt: skip


FEATURES = tuple(features(2, 2, 2, 2))


def ends(*lengths: int) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def operands(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float = 0.6, **options
) -> tuple[Settings, tuple[Tensor | None, ...]]:
    """The same call as the operators and Functions take it: settings, and all tensors."""
    left, right = options.get("window", (None, None))
    packed = "cu_seqlens_q" in options
    lengths = ("cu_seqlens_q", "cu_seqlens_k") if packed else ("query_lengths", "key_lengths")
    names = ("attn_mask", "alibi_slopes", "sinks", *lengths, "dropout_seed")
    settings = Settings(
        packed, options.get("causal") or "none", left, right, scale, options.get("softcap", 0.0),
        options.get("dropout_p", 0.0),
    )  # fmt: skip
    return settings, (query, key, value, *map(options.get, names))


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


def assert_like_torch(function: Callable, *inputs: Tensor, weigh: tuple[str, ...] = OUTPUTS, **options) -> Results:
    """``function`` does what torch does with the same arguments, as exactly as torch does it in that precision."""
    return _assert_like(torch_attention, function, *inputs, weigh=weigh, **options)


def assert_like_reference(*inputs: Tensor, weigh: tuple[str, ...] = OUTPUTS, **options) -> Results:
    """The kernels do what the reference does, as exactly as it does that in this precision."""
    options = {name: beside(value, inputs[0].device) for name, value in options.items()} | {"enable_gqa": True}
    return _assert_like(reference, kernels, *inputs, weigh=weigh, **options)


def _assert_like(yardstick: Callable, function: Callable, *inputs: Tensor, weigh: tuple[str, ...], **options):
    actual = results(function, *inputs, weigh=weigh, **options)
    eager = results(yardstick, *inputs, weigh=weigh, **options)
    inputs, options = [doubled(t) for t in inputs], {name: doubled(value) for name, value in options.items()}
    exact = results(yardstick, *inputs, weigh=weigh, **options)
    for name, value in actual.items():
        assert_within_budget(value, exact[name], eager[name], name)
    return actual


def beside(value: Any, device: torch.device) -> Any:
    """A tensor on ``device``, to be differentiated by if it was; anything else as it is."""
    return value.detach().to(device).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def doubled(value: Any) -> Any:
    """A floating-point tensor in float64, to be differentiated by if it was; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
