"""Who runs an attention case: ours, each backend of torch's operator by name, FlexAttention and flash-attn."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqcore.functional
from benchmarks.attention_cases import COMPILED_D, COMPILED_N
from benchmarks.attention_data import Contestant, Data
from benchmarks.peers import Absent, take_part

MATH = "SDPA math"
SDPA = {
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
FLEX, FLASH_ATTN = "FlexAttention", "flash-attn"
# Scores [B, H, M, N] that are written down may take this many bytes in float32; several copies of them live at once.
MOST_SCORE_BYTES = 20e9


def ours(data: Data, backend: str) -> Contestant:
    """``seqcore.functional.attention``."""
    case = data.case
    options = {"causal": "top_left" if case.causal else None, "enable_gqa": case.grouped, "backend": backend}
    if case.window:
        options["window"] = (case.window - 1, None)
    if case.alibi:
        options["alibi_slopes"] = data.slopes
    if case.packed:
        options |= {"cu_seqlens_q": data.ends, "cu_seqlens_k": data.ends}
    elif case.lengths:
        options["key_lengths"] = data.lengths

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if case.packed:
            return seqcore.functional.attention(query[0], key[0], value[0], **options)[None]
        return seqcore.functional.attention(query, key, value, attn_mask=bias, **options)

    return Contestant(call, data.inputs, data.dout)


def sdpa(data: Data, backend: SDPBackend) -> Contestant:
    """torch's operator on one of its backends; packed sequences as a padded batch."""
    data = data.unpacked
    case = data.case
    if (data.masked or backend == SDPBackend.MATH) and case.score_bytes > MOST_SCORE_BYTES:
        raise Absent(f"its scores would take {case.score_bytes / 1e9:.0f} GB")
    mask, causal = data.mask, case.causal and not data.masked

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                query, key, value, mask if bias is None else bias, is_causal=causal, enable_gqa=case.grouped
            )

    return Contestant(call, data.inputs, data.dout)


def compiled_flex(data: Data) -> Contestant:
    """FlexAttention as it is meant to be used."""
    case = data.case
    if data.device.type != "cuda":
        raise Absent("measured on a GPU only")
    other = (case.D, case.N) != (COMPILED_D, COMPILED_N)
    if case.sweep == "memory" or (case.sweep in ("plain", "grouped") and other):
        raise Absent(f"left out, to save the time of compiling it; is there at D = {COMPILED_D}, N = {COMPILED_N:,}")
    from torch.nn.attention.flex_attention import flex_attention

    return flex(data, torch.compile(flex_attention, dynamic=False))


def flex(data: Data, flex_attention: Callable[..., Tensor]) -> Contestant:
    """FlexAttention with a block mask and a modification of the scores equal to the case."""
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    case, masks, window = data.case, [], data.case.window
    if case.causal:
        masks.append(lambda b, h, m, n: n <= m)
    if window:
        masks.append(lambda b, h, m, n: m - n < window)
    if case.packed:
        sequence = data.sequence
        masks.append(lambda b, h, m, n: sequence[m] == sequence[n])
    elif case.lengths:
        lengths = data.lengths
        masks.append(lambda b, h, m, n: n < lengths[b])
    options: dict = {"enable_gqa": case.grouped}
    if masks:
        M, N, B = data.query.shape[2], data.key.shape[2], case.B if case.lengths and not case.packed else None
        options["block_mask"] = create_block_mask(and_masks(*masks), B, None, M, N, device=str(data.device))
    slopes = data.slopes

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return flex_attention(query, key, value, score_mod=lambda s, b, h, m, n: s + bias[0, h, m, n], **options)
        if case.alibi:
            return flex_attention(query, key, value, score_mod=lambda s, b, h, m, n: s - slopes[h] * (m - n), **options)
        return flex_attention(query, key, value, **options)

    return Contestant(call, data.inputs, data.dout)


def flash_attn(data: Data) -> Contestant:
    """The flash-attn package, whose tensors are [B, M, H, D] or, packed, [tokens, H, D]."""
    import flash_attn as package

    case = data.case
    if case.bias:
        raise Absent("takes no bias")
    if case.lengths and not case.packed:
        raise Absent("takes no lengths of a padded batch")
    options: dict = {"causal": case.causal}
    if case.window:
        options["window_size"] = (case.window - 1, 0)
    if case.alibi:
        options["alibi_slopes"] = data.slopes

    def call(*inputs: Tensor) -> Tensor:
        inputs = [tensor.transpose(1, 2) for tensor in inputs]
        if not case.packed:
            return package.flash_attn_func(*inputs, **options).transpose(1, 2)
        ends, longest = data.ends, max(case.lengths)
        inputs = [tensor[0] for tensor in inputs]
        return package.flash_attn_varlen_func(*inputs, ends, ends, longest, longest, **options)[None].transpose(1, 2)

    return Contestant(call, data.inputs, data.dout)


PEERS: dict[str, Callable[[Data], Contestant]] = {
    **{name: partial(sdpa, backend=backend) for name, backend in SDPA.items()},
    FLEX: compiled_flex,
    FLASH_ATTN: flash_attn,
}


def peers(data: Data) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that take part, and why the others do not; each has run once."""
    builders = {name: partial(build, data) for name, build in PEERS.items()}
    return take_part(builders, lambda peer: peer.run(data.case.pass_), data.device.type == "cuda")
