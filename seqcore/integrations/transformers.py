"""seqcore's attention in Hugging Face transformers, through its own registries of attention functions and masks.

``register()`` once; then ``model.set_attn_implementation("seqcore")``, or ``attn_implementation="seqcore"`` where a
model is made. transformers is imported when ``register`` is called, not before.
"""

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..backends import BACKENDS, check_backend, resolve
from ..errors import UnsupportedInput

# Where a mask keeps the structure it was made from, and a model which attention it had.
STRUCTURE = "_seqcore_structure"
PREVIOUS = "_seqcore_previous_attention"


class Structure(NamedTuple):
    """A mask as attention's options: causality, window, and what remains to be read, such as padding [B, 1, 1, N]."""

    causal: str | None
    window: tuple[int, int] | None
    attn_mask: Tensor | None


def register(name: str = "seqcore", backend: str | None = None) -> None:
    """Make seqcore's attention one of transformers' attention implementations, under ``name``.

    Without a ``backend`` also under ``name`` and each backend's, such as "seqcore_triton".

    Serves grouped heads without repeating keys, sliding windows, soft caps, sinks, position biases, masks of four
    dimensions, dropout, and ``output_attentions``. Where a mask is causal, a window, or padding, kernels get that
    structure instead of the matrix.

    Args:
        name: for ``set_attn_implementation(name)`` and ``attn_implementation=name``.
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``.

    Raises:
        ImportError: without transformers, or with one too old to have the registries.
        InvalidInput: if ``backend`` is unknown.

    Source: https://huggingface.co/docs/transformers/attention_interface
    """
    if backend is not None:
        check_backend(backend)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "seqcore.integrations.transformers.register needs transformers with AttentionInterface and "
            f"AttentionMaskInterface, got: {error}; pip install 'transformers>=5'"
        ) from error
    names = {name: backend} | ({f"{name}_{each}": each for each in BACKENDS} if backend is None else {})
    for each, named in names.items():
        AttentionInterface.register(each, functools.partial(attention_forward, backend=named))
        AttentionMaskInterface.register(each, mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = False,
    cache: Any = None,
    *,
    backend: str | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it.

    Args:
        module: the one that attends.
        query, key, value: [B, H, M, D], [B, H_kv, N, D], [B, H_kv, N, DV].
        attention_mask: broadcasts to [B, H, M, N]; bool (True may attend) or added to the scores; or None.
        dropout: probability of dropping a weight.
        is_causal: whether query m sees keys n <= m; the module's by default, and of no meaning beside a mask.
        scaling, softcap: ``scale`` and ``softcap`` of :func:`seqcore.functional.attention`.
        position_bias: added to the scores; [1 or B, H, M, N].
        s_aux: the sinks, [H].
        output_attentions: also return the weights.

    Returns:
        [B, M, H, DV], and the weights [B, H, M, N] or None.

    Raises:
        InvalidInput: for wrong ranks, sizes, dtypes or devices.
        UnsupportedInput: for paged caches, and if the backend was named and cannot serve the request.
    """
    if cache is not None:
        raise UnsupportedInput("seqcore does not serve paged caches (continuous batching); set the attention to 'sdpa'")
    structured = _takes_structure(query, backend)
    causal, window, attn_mask = _structure(attention_mask, query, key) if structured else (None, None, attention_mask)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows = query.shape[2]
    if attention_mask is None and rows > 1 and is_causal:
        # A static cache that was empty has more slots than there are tokens yet.
        key, value = key[:, :, :rows], value[:, :, :rows]
        position_bias = None if position_bias is None else position_bias[..., :rows]
        if position_bias is None or structured:
            causal = "top_left"
        else:
            attn_mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()
    found = functional.attention(
        query, key, value, attn_mask=_with_bias(attn_mask, position_bias), causal=causal, window=window, scale=scaling,
        softcap=softcap or 0.0, sinks=s_aux, dropout_p=dropout, enable_gqa=key.shape[1] != query.shape[1],
        return_weights="per_head" if output_attentions else None, backend=backend,
    )  # fmt: skip
    out, weights = found if output_attentions else (found, None)
    return out.transpose(1, 2).contiguous(), weights


def _takes_structure(query: Tensor, backend: str | None) -> bool:
    """Whether causality, windows and padding are of use as such: torch's own, best on a CPU, wants a matrix."""
    if torch.compiler.is_compiling():
        return False
    asked = resolve(backend)
    return asked in ("triton", "reference") or (asked == "auto" and query.device.type != "cpu")


def _structure(mask: Tensor | None, query: Tensor, key: Tensor) -> Structure:
    """What is known of ``mask``; if nothing, the mask."""
    structure, version = getattr(mask, STRUCTURE, (None, None))
    if structure is None or version != mask._version or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        return Structure(None, None, mask)
    return structure


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask that transformers makes for "sdpa", knowing its structure if it has one that attention can use.

    What a model makes of the mask does not know it, and a mask changed in place has another version than it was told:
    attention then reads the matrix.
    """
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    made = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options
    )
    if made is None or torch.compiler.is_compiling() or made.is_inference() or isinstance(q_offset, Tensor):
        return made
    kind = _kind(mask_function, options.get("local_size"), masking_utils)
    # Kernels count from the end: the last query stands at the last key.
    if kind is None or (kind != (None, None) and q_offset + q_length != kv_offset + kv_length):
        return made
    keys = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if keys is not None:
        keys = keys[:, None, None, kv_offset : kv_offset + kv_length].bool()
    setattr(made, STRUCTURE, (Structure(*kind, keys), made._version))
    return made


def _kind(function: Callable, size: int | None, masking_utils: Any) -> tuple[str | None, tuple[int, int] | None] | None:
    """Causality and window of one of transformers' own mask functions; None for any other."""
    known = {
        masking_utils.causal_mask_function: ("lower_right", None),
        masking_utils.bidirectional_mask_function: (None, None),
    }
    if function in known:
        return known[function]
    if isinstance(size, int):
        if _same(function, masking_utils.sliding_window_causal_mask_function(size)):
            return "lower_right", (size - 1, 0)
        if _same(function, masking_utils.sliding_window_bidirectional_mask_function(size)):
            return None, (size, size)
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal, functions being compared by their code and what they close over."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        cells = [tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (a, b)]
        return a.__code__ is b.__code__ and _same(*cells)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, int) and isinstance(b, int) and a == b


def switch(
    model: torch.nn.Module,
    filter_fn: Callable[[str, torch.nn.Module], bool],
    backend: str | None,
    swapped: dict[str, str],
    skipped: dict[str, str],
) -> None:
    """Give the transformers models in ``model`` seqcore's attention, and write into the two reports."""
    implementation = "seqcore" if backend is None else f"seqcore_{backend}"
    for name, found in _outermost(model):
        if not filter_fn(name, found):
            continue
        title = f"{type(found).__name__}'s attention"
        if not getattr(found, "_can_set_attn_implementation", bool)():
            skipped[name] = f"{title}: does not go through transformers' AttentionInterface"
            continue
        if found.config._attn_implementation == implementation:
            skipped[name] = f"{title}: {implementation} already"
            continue
        if getattr(found.config, "output_attentions", False):
            skipped[name] = f"{title}: config.output_attentions, which transformers allows with 'eager' only"
            continue
        if implementation not in sys.modules["transformers"].AttentionInterface().valid_keys():
            register()
        for inner in _models(found):
            vars(inner).setdefault(PREVIOUS, inner.config._attn_implementation)
        before = found.config._attn_implementation
        found.set_attn_implementation(implementation)
        swapped[name] = f"{title}: {before} -> {implementation}"


def switch_back(
    model: torch.nn.Module,
    filter_fn: Callable[[str, torch.nn.Module], bool],
    swapped: dict[str, str],
    skipped: dict[str, str],
) -> None:
    """Undo :func:`switch`, but not what was chosen since."""
    for name, found in _outermost(model):
        if not filter_fn(name, found):
            continue
        now = found.config._attn_implementation
        before = [(inner, vars(inner).pop(PREVIOUS, None)) for inner in _models(found)]
        if not _is_ours(now):
            continue
        title = f"{type(found).__name__}'s attention"
        if before[0][1] is None or _is_ours(before[0][1]):
            skipped[name] = f"{title}: {now}, and no other before it; call set_attn_implementation('sdpa')"
            continue
        # An outer model sets the inner ones too, which come after it.
        for inner, implementation in before:
            if implementation is not None:
                inner.set_attn_implementation(implementation)
        swapped[name] = f"{title}: {now} -> {found.config._attn_implementation}"


def _is_ours(implementation: str) -> bool:
    registered = sys.modules["transformers"].AttentionInterface()
    found = registered[implementation] if implementation in registered.valid_keys() else None
    return getattr(found, "func", None) is attention_forward


def _models(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [inner for inner in model.modules() if isinstance(inner, sys.modules["transformers"].PreTrainedModel)]


def _outermost(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The transformers models in ``model`` that are in no other."""
    found: list[tuple[str, torch.nn.Module]] = []
    inside: set[torch.nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, sys.modules["transformers"].PreTrainedModel):
            if module not in inside:
                found.append((name, module))
            inside.update(module.modules())
    return found
