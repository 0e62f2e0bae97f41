"""Modules that attend: torch's, ours with the same weights, and attention with positions spelt out; and models of them.

Models run whole, or token by token with caches.
"""

import copy

import torch
from torch import Tensor, nn

import seqcore
from seqcore.nn import KVCache, RotaryPositions

from .attention_twins import doubled
from .comparisons import Results, assert_equal_in_float64, assert_within, cotangents

B, M, N, E, HEADS = 2, 17, 21, 20, 2


def torch_module(**options) -> nn.MultiheadAttention:
    """Torch's, in eval mode, its biases made to matter."""
    module = nn.MultiheadAttention(**{"embed_dim": E, "num_heads": HEADS} | options).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def swapped(module: nn.Module, backend: str | None = None, rotary: bool = False, alibi: bool = False) -> nn.Module:
    """A copy whose attention, with the same weights and options, is ours."""
    module = copy.deepcopy(module)
    for inner in [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]:
        inner.__class__ = seqcore.nn.MultiheadAttention
        inner.backend, inner.alibi = backend, alibi
        if rotary:
            inner.rotary = RotaryPositions(inner.head_dim)
    return module


def inputs(module: nn.MultiheadAttention, kind: str = "cross") -> list[Tensor]:
    """query, key and value in the module's layout; the same tensor twice or thrice for "memory" and "self"."""

    def rows(count, width):
        batched = (B, count, width) if module.batch_first else (count, B, width)
        shape = (count, width) if kind == "unbatched" else batched
        return torch.randn(shape, device=module.out_proj.weight.device)

    if kind == "self":
        return [rows(M, module.embed_dim)] * 3
    query, key = rows(M, module.embed_dim), rows(N, module.kdim)
    return [query, key, key] if kind == "memory" else [query, key, rows(N, module.vdim)]


def results(module: nn.MultiheadAttention, given: list[Tensor], weigh=("out", "weights"), **keywords) -> Results:
    """Every output of ``module`` and every gradient of a fixed weighing of those in ``weigh``, by name."""
    leaves = {id(t): t.detach().requires_grad_() for t in given}
    outputs = dict(zip(("out", "weights"), module(*(leaves[id(t)] for t in given), **keywords), strict=True))
    outputs = {name: value for name, value in outputs.items() if value is not None}
    wanted = {f"input {i}": leaf for i, leaf in enumerate(leaves.values())} | dict(module.named_parameters())
    weighed = [value for name, value in outputs.items() if name in weigh]
    gradients = torch.autograd.grad(weighed, list(wanted.values()), cotangents(weighed), materialize_grads=True)
    return outputs | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def assert_like_torch(
    theirs: nn.MultiheadAttention,
    backend: str | None,
    given: list[Tensor],
    positions: dict[str, bool] | None = None,
    **keywords,
) -> None:
    """Ours does what torch's module does: as exactly as it does it where kernels run, and in float64 elsewhere.

    With ``positions``, rotary or alibi, the module they are spelt out in stands for torch's.
    """
    spelt = lambda module: explicit(module, **positions) if positions else module
    ours = lambda module: swapped(module, backend, **positions or {})
    doubles = {id(t): doubled(t) for t in given}
    double, given_double = copy.deepcopy(theirs).double(), [doubles[id(t)] for t in given]
    keywords_double = {name: doubled(value) for name, value in keywords.items()}
    exact = results(spelt(double), given_double, **keywords_double)
    if backend == "triton":
        actual, eager = (results(module, given, **keywords) for module in (ours(theirs), spelt(theirs)))
        assert_within(actual, exact, eager)
    else:
        assert_equal_in_float64(results(ours(double), given_double, **keywords_double), exact)


def may_not(*shape: int) -> Tensor:
    """The module's masks: True forbids. Every query keeps its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def additive(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(may_not(*shape), float("-inf"))


def layer_results(layer: nn.Module, *given: Tensor, **keywords) -> Results:
    """The output of ``layer`` and the gradients of a fixed weighing of it, of inputs and parameters."""
    leaves = [t.detach().requires_grad_() for t in given]
    out = layer(*leaves, **keywords)
    wanted = {f"input {i}": leaf for i, leaf in enumerate(leaves)} | dict(layer.named_parameters())
    gradients = torch.autograd.grad(out, list(wanted.values()), cotangents([out]))
    return {"out": out} | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def causal_mask(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=dtype)


def caches(encoder: nn.TransformerEncoder, batch: int, max_length: int) -> list[KVCache]:
    """An empty cache for each layer."""
    modules = [layer.self_attn for layer in encoder.layers]
    like = {"device": modules[0].in_proj_weight.device, "dtype": modules[0].in_proj_weight.dtype}
    return [KVCache(batch, m.num_heads, max_length, m.head_dim, **like) for m in modules]


def step(encoder: nn.TransformerEncoder, x: Tensor, caches: list[KVCache]) -> Tensor:
    """What ``encoder`` with a causal mask makes of the new tokens x, those before them being in ``caches``."""
    for layer, cache in zip(encoder.layers, caches, strict=True):
        h = layer.norm1(x) if layer.norm_first else x
        x = x + layer.self_attn(h, h, h, need_weights=False, cache=cache)[0]
        x = x if layer.norm_first else layer.norm1(x)
        h = layer.norm2(x) if layer.norm_first else x
        x = x + layer.linear2(layer.activation(layer.linear1(h)))
        x = x if layer.norm_first else layer.norm2(x)
    return x if encoder.norm is None else encoder.norm(x)


def rotated(x: Tensor) -> Tensor:
    """Each pair of features (i, i + D/2) of row p, as a complex number, times e^(i p 10000^(-2i/D)); x is [*, T, D]."""
    T, D = x.shape[-2:]
    wavelengths = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * wavelengths
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).to(x.device)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


class Explicit(nn.MultiheadAttention):
    """Self-attention with positions by a bias and rotations written out; an additive mask, no other options."""

    rotary = alibi = False

    def forward(self, query, key, value, attn_mask=None, need_weights=True, average_attn_weights=True, **_):
        projected = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        projected = projected if self.batch_first else projected.transpose(0, 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected.chunk(3, -1))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        scores = q @ k.mT / self.head_dim**0.5
        if self.alibi:
            position = torch.arange(q.shape[2], device=q.device)
            slopes = torch.tensor([2 ** (-8 * (h + 1) / self.num_heads) for h in range(self.num_heads)]).to(q)
            scores = scores - slopes[:, None, None] * (position[:, None] - position).abs()
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        out = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        weights = weights.mean(1) if average_attn_weights else weights
        return out if self.batch_first else out.transpose(0, 1), weights if need_weights else None


def explicit(module: nn.Module, rotary: bool = False, alibi: bool = False) -> nn.Module:
    """A copy whose attention is ``Explicit``."""
    module = copy.deepcopy(module)
    for inner in module.modules():
        if isinstance(inner, nn.MultiheadAttention):
            inner.__class__ = Explicit
            inner.rotary, inner.alibi = rotary, alibi
            # Else torch's layers, when they evaluate, pass any forward by.
            inner._qkv_same_embed_dim = False
    return module
