"""Multi-head attention, with the constructor, parameters and outputs of ``torch.nn.MultiheadAttention``."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..backends import check_backend, resolve
from ..errors import InvalidInput
from ..functional.arguments import FLOATS, check_flags, check_floating, check_strided, check_truth
from ..functional.attention_checks import is_causal_bias
from ..functional.autocast import target_dtype
from ..reference.recurrence import wide
from ..reference.sizes import is_among
from .cache import KVCache
from .positions import RotaryPositions
from .scripting import NotScriptable


class MultiheadAttention(NotScriptable, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with a choice of backend; goes into torch's Transformer layers.

    Each head attends as softmax(q k^T / sqrt(d) + mask) v over projections of query, key and value; the heads are
    joined and projected again.

    Args:
        *args, **kwargs: those of ``torch.nn.MultiheadAttention`` (embed_dim, num_heads, dropout=0.0, bias=True,
            add_bias_kv=False, add_zero_attn=False, kdim=None, vdim=None, batch_first=False, device=None, dtype=None).
        rotary: rotates each head's queries and keys by their positions.
        alibi: subtract ALiBi's slope * distance from the scores (:func:`seqcore.functional.alibi_slopes`).
            Neither goes with add_bias_kv or add_zero_attn, whose keys belong to no position.
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``. "aten" is torch's own
            module to the last bit, as long as nothing is asked that it does not have.

    One deliberate difference, except under "aten": a query that may see no key gives zeros before the output
    projection, and zero weights, where torch gives NaN with ``need_weights=True``.

    Source: Vaswani et al. (2017); https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html
    """

    # Class-level defaults, so that an instance made by torch.nn and given this class works.
    backend: str | None = None
    alibi: bool = False
    _inside_torch: bool = False

    def __init__(
        self,
        *args: Any,
        rotary: RotaryPositions | None = None,
        alibi: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_flags("MultiheadAttention", alibi=alibi)
        if backend is not None:
            check_backend(backend)
        with self._as_torch():
            super().__init__(*args, **kwargs)
        self.backend, self.alibi = backend, alibi
        if rotary is not None:
            if not isinstance(rotary, RotaryPositions) or rotary.head_dim != self.head_dim:
                raise InvalidInput(
                    f"MultiheadAttention: rotary must be RotaryPositions of head_dim {self.head_dim} = embed_dim / "
                    f"num_heads, got {rotary!r}"
                )
            self.rotary = rotary

    @property
    def rotary(self) -> RotaryPositions | None:
        """The submodule of this name; a default of the class would hide one that is assigned later."""
        return self._modules.get("rotary")

    @contextlib.contextmanager
    def _as_torch(self) -> Iterator[None]:
        """Within, torch's own code asks ``_qkv_same_embed_dim`` which parameters there are, and is told."""
        self.__dict__["_inside_torch"] = True
        try:
            yield
        finally:
            self.__dict__.pop("_inside_torch", None)

    def _reset_parameters(self) -> None:
        with self._as_torch():
            super()._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False unless torch's own code is to run: its Transformer layers ask this before they pass our forward by."""
        if self._inside_torch:
            return self.__dict__["_qkv_same_embed_dim"]
        return self.in_proj_weight is not None and self._is_torchs()

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = same

    def _is_torchs(self) -> bool:
        return resolve(self.backend) == "aten" and self.rotary is None and not self.alibi

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended [M, B, E] ([B, M, E] if batch_first, [M, E] unbatched) and, if asked, the weights.

        Args:
            query, key, value: [M, B, E], [N, B, kdim], [N, B, vdim], in the module's layout.
            key_padding_mask: [B, N] ([N] unbatched); True, or -inf, marks keys to ignore. What they hold is to be
                finite, as in torch: a weight of 0 times NaN is NaN.
            need_weights: also return the weights.
            attn_mask: [M, N] or [B * H, M, N]; True marks pairs that may NOT attend, floats are added.
            average_attn_weights: average them over heads, [B, M, N], without a matrix of each; else [B, H, M, N].
            is_causal: a promise that ``attn_mask`` is the causal mask, as in torch; it is then read for weights only.
            cache: append key and value to what it holds and attend to all of it, each query to what came before it and
                to itself. Goes with no mask; weights are over all N slots. See :class:`seqcore.nn.KVCache`.

        Raises:
            InvalidInput: for wrong ranks, sizes, dtypes or masks.
            UnsupportedInput: if the backend was named and cannot serve the request.
        """
        if cache is None and self._is_torchs():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
        check_truth("MultiheadAttention", **flags)
        if is_causal and attn_mask is None and cache is None:
            raise InvalidInput(
                "MultiheadAttention: is_causal is a hint about attn_mask, got attn_mask=None; pass the causal mask "
                "(torch.nn.Transformer.generate_square_subsequent_mask) with it"
            )
        batched = self._check(query, key, value)
        layout = _Layout(batched, self.batch_first)
        query, key, value = layout.enter_all(query, key, value)
        self._check_positions(query, key, cache, masked=attn_mask is not None or key_padding_mask is not None)
        q, k, v = self._project(query, key, value)
        masks = _Masks(q, k, attn_mask, key_padding_mask, self.num_heads, batched)
        if self.bias_k is not None:
            # Cast last, so that under autocast the gradient is summed over the batch in the parameter's dtype.
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1).to(k.dtype)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1).to(v.dtype)], 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if self.rotary is not None:
            start = 0 if cache is None else cache.lengths
            q, k = self.rotary(q, start), self.rotary(k, start)
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0}
        if self.alibi:
            options["alibi_slopes"] = functional.alibi_slopes(self.num_heads, q.device, wide(q.dtype))
        if cache is None:
            extra_keys = k.shape[2] - key.shape[1]
            # The hint spares reading the mask, as in torch; with padding too, unless a key without position joins.
            causal = is_causal and not need_weights and (key_padding_mask is None or not extra_keys)
            mask = masks.joined(extra_keys, without_attn_mask=causal)
            options |= {"attn_mask": mask, "causal": "top_left" if causal else None}
        else:
            k, v, options["key_lengths"] = cache.update(k, v)
            options["causal"] = "lower_right"
        kind = ("average" if average_attn_weights else "per_head") if need_weights else None
        try:
            found = functional.attention(q, k, v, **options, return_weights=kind, backend=self.backend)
            out, weights = found if need_weights else (found, None)
            out = self.out_proj(out.transpose(1, 2).flatten(2))
        except BaseException:
            if cache is not None:
                # Whoever tries again, on another backend say, will append them again.
                cache._take_back(key.shape[1])
            raise
        weights = weights if weights is None or batched else weights.squeeze(0)
        return layout.leave(out), weights

    def _check_positions(self, query: Tensor, key: Tensor, cache: KVCache | None, masked: bool) -> None:
        """Raise for what has no meaning where positions matter; query and key are [B, rows, E]."""
        used = {"a cache": cache is not None, "rotary": self.rotary is not None, "alibi": self.alibi}
        if any(used.values()) and (self.bias_k is not None or self.add_zero_attn):
            raise InvalidInput(
                "MultiheadAttention: add_bias_kv and add_zero_attn, whose keys belong to no position, do not go with "
                + ", ".join(name for name, present in used.items() if present)
            )
        if cache is None:
            return
        if not isinstance(cache, KVCache):
            raise InvalidInput(f"MultiheadAttention: cache must be a seqcore.nn.KVCache, got {type(cache).__name__}")
        if masked:
            raise InvalidInput(
                "MultiheadAttention: with a cache attention is causal over what the cache holds, and takes no "
                "attn_mask and no key_padding_mask; for ragged prompts call KVCache.update and functional.attention"
            )
        if query.shape[1] != key.shape[1]:
            raise InvalidInput(
                f"MultiheadAttention: with a cache query and key are the same new tokens, got {query.shape[1]} and "
                f"{key.shape[1]} of them"
            )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the input is batched."""
        named = {"query": query, "key": key, "value": value}
        for name, tensor in named.items():
            if isinstance(tensor, Tensor) and tensor.is_nested:
                raise InvalidInput(
                    f"MultiheadAttention: {name} must be a dense Tensor, got a nested one; torch.nn.TransformerEncoder "
                    "makes them when it evaluates, unless its attribute use_nested_tensor is False"
                )
            check_floating("MultiheadAttention", name, tensor)
        ranks = query.dim(), key.dim(), value.dim()
        if ranks not in ((2, 2, 2), (3, 3, 3)):
            raise InvalidInput(
                f"MultiheadAttention: query, key and value must all be 3-D, or 2-D unbatched, got {ranks} dimensions"
            )
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if widths != (self.embed_dim, self.kdim, self.vdim):
            raise InvalidInput(
                f"MultiheadAttention: last dimensions of query, key and value must be "
                f"{(self.embed_dim, self.kdim, self.vdim)}, got {widths}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise InvalidInput(
                f"MultiheadAttention: key and value need the same length and batch, got {list(key.shape)} and "
                f"{list(value.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise InvalidInput(
                f"MultiheadAttention: query and key need the same batch, dimension {batch_dim}, got "
                f"{list(query.shape)} and {list(key.shape)}"
            )
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        for name, tensor in named.items():
            if tensor.device != weight.device:
                raise InvalidInput(
                    f"MultiheadAttention: {name} must be on the parameters' device {weight.device}, got {tensor.device}"
                )
            if target_dtype(tensor) != target_dtype(weight):
                raise InvalidInput(
                    f"MultiheadAttention: {name} must have the parameters' dtype {weight.dtype}, got {tensor.dtype}"
                )
        return query.dim() == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None and query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True)]

    def extra_repr(self) -> str:
        # A rotary is shown as the submodule it is.
        options = {"alibi": self.alibi, "backend": self.backend}
        return super().extra_repr() + ", ".join(f"{name}={value!r}" for name, value in options.items() if value)


class _Layout:
    """From the caller's layout to [B, rows, E] and back."""

    def __init__(self, batched: bool, batch_first: bool) -> None:
        self.batched, self.batch_first = batched, batch_first

    def _enter(self, tensor: Tensor) -> Tensor:
        if not self.batched:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def enter_all(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps "the same tensor" the same, so that self-attention can project once."""
        q = self._enter(query)
        k = q if key is query else self._enter(key)
        return q, k, k if value is key else self._enter(value)

    def leave(self, out: Tensor) -> Tensor:
        if not self.batched:
            return out.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1)


class _Masks:
    """``attn_mask`` and ``key_padding_mask``, in torch's module convention, checked; joined into attention's.

    The module's True means "may not attend", attention's "may attend".
    """

    def __init__(self, q, k, attn_mask, key_padding_mask, heads: int, batched: bool) -> None:
        (B, M), N = q.shape[:2], k.shape[1]
        allowed = {"attn_mask": ((M, N), (B * heads, M, N)), "key_padding_mask": ((B, N),) if batched else ((N,),)}
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise InvalidInput(f"MultiheadAttention: {name} must be a Tensor or None, got {type(mask).__name__}")
            check_strided("MultiheadAttention", name, mask)
            if is_causal_bias(mask):
                raise InvalidInput(
                    f"MultiheadAttention: {name} must be a Tensor that holds a mask, got torch's CausalBias; pass "
                    "torch.nn.Transformer.generate_square_subsequent_mask, and is_causal"
                )
            if mask.dtype not in (torch.bool, *FLOATS):
                raise InvalidInput(f"MultiheadAttention: {name} must be bool or floating point, got {mask.dtype}")
            if mask.device != q.device:
                raise InvalidInput(
                    f"MultiheadAttention: {name} must be on the query's device {q.device}, got {mask.device}"
                )
            if not is_among(mask.shape, allowed[name]):
                shapes = " or ".join(str(list(shape)) for shape in allowed[name])
                raise InvalidInput(f"MultiheadAttention: {name} must be {shapes}, got {list(mask.shape)}")
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (B, heads))
        self.attn_mask = attn_mask
        self.padding = None if key_padding_mask is None else key_padding_mask.reshape(B, 1, 1, N)
        self.dtype = q.dtype

    def joined(self, extra_keys: int, without_attn_mask: bool) -> Tensor | None:
        """One mask broadcasting to [B, H, M, N + extra_keys]; the extra keys, bias_k and zeros, are always seen."""
        masks = [m for m in (None if without_attn_mask else self.attn_mask, self.padding) if m is not None]
        masks = [F.pad(m, (0, extra_keys)) for m in masks]
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
        # Half does not hold what float32 does: 1e6 would be infinite, and -300.5 be rounded to an even number.
        alike = all(m.dtype in (torch.bool, self.dtype) for m in masks)
        return sum(_additive(m, self.dtype if alike else wide(self.dtype)) for m in masks)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: itself, or -inf where its True forbids."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
