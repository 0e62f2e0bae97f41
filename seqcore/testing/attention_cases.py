"""What ``verify`` computes of attention: every kernel with every feature, at sizes for a GPU or, interpreted, a CPU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..devices import INTERPRETED
from .cases import Case, Results

BATCH, HEADS, HEADS_KV = 2, 4, 2
# M, N, D: tiles that are full and tiles that are not, and each row of the tables.
SIZES = [(333, 517, 64), (517, 333, 128), (130, 257, 96), (65, 190, 256)]
DECODED = [(1, 5000, 64), (3, 1777, 128), (1, 3000, 256)]
if INTERPRETED:
    SIZES, DECODED = [(37, 20, 20)], [(3, 70, 40)]

BACKWARD = "attention_backward_delta_kernel, attention_backward_{}_kernel"
KERNELS = {
    "default": "attention_forward_kernel",
    "weights": "attention_weights_kernel",
    "dq": BACKWARD.format("dq"),
    **dict.fromkeys(("dk", "dv"), BACKWARD.format("dkdv")),
    "dmask": BACKWARD.format("bias"),
    "dsinks": "attention_backward_delta_kernel",
}
DECODE = "attention_decode_kernel, attention_combine_kernel"


def attentions(device: torch.device) -> Iterator[Case]:
    for M, N, D in SIZES:
        for causal in (None, "top_left", "lower_right"):
            for mask in (None, (BATCH, 1, M, N), (1, HEADS, M, N)):
                yield attention_case(device, M, N, D, causal=causal, bool_mask=mask)
        for shape in ((M, N), (BATCH, 1, M, N), (1, HEADS, 1, N), (M, 1), (1, HEADS, 1, 1)):
            yield attention_case(device, M, N, D, causal="lower_right", mask=shape)
        for features in _features(M, N):
            yield attention_case(device, M, N, D, **features)
    for M, N, D in DECODED:
        for features in ({}, *_features(M, N)):
            # Packed sequences are the plain kernel's. A query that sees one key or two has a gradient that cancels out.
            if "cu_seqlens" not in features and features.get("causal") != "top_left":
                yield attention_case(device, M, N, D, KERNELS | {"default": DECODE}, **features)


def _features(M: int, N: int) -> list[dict[str, Any]]:
    lengths = {"query_lengths": [M, M // 2 + 1], "key_lengths": [N // 3, N]}
    return [
        {"window": (N // 4, 3)},
        {"window": (N // 3, None), "causal": "lower_right", "sinks": True},
        {"softcap": 2.0, "causal": "top_left"},
        {"alibi": True, "causal": "lower_right"},
        {"dropout_p": 0.3},
        {**lengths, "causal": "lower_right"},
        {"cu_seqlens": True, "causal": "top_left"},
        {"cu_seqlens": True, "window": (N // 4, None), "alibi": True},
        {"return_weights": "average", "causal": "top_left", "dropout_p": 0.3},
        {
            **lengths, "mask": (1, HEADS, M, N), "window": (N // 3, N // 5), "softcap": 3.0, "alibi": True,
            "sinks": True, "dropout_p": 0.2,
        },
    ]  # fmt: skip


def attention_case(
    device: torch.device, M: int, N: int, D: int, kernels: dict[str, str] = KERNELS, *, bool_mask=None, mask=None,
    sinks=False, alibi=False, cu_seqlens=False, query_lengths=None, key_lengths=None, **options: Any,
) -> Case:  # fmt: skip
    """Tensors by their names, those of floating point to be differentiated; options as ``functional.attention``'s."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch = () if cu_seqlens else (BATCH,)
    tensors = {"q": normal(*batch, HEADS, M, D)} | {name: normal(*batch, HEADS_KV, N, D) for name in "kv"}
    if mask is not None:
        tensors["mask"] = normal(*mask)
    if bool_mask is not None:
        tensors["mask"] = torch.rand(bool_mask, generator=generator) > 0.3
    if sinks:
        tensors["sinks"] = normal(HEADS)
    if cu_seqlens:
        for name, size in (("cu_seqlens_q", M), ("cu_seqlens_k", N)):
            tensors[name] = torch.tensor([0, size // 5, size // 5, size // 2, size])
    for name, lengths in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        if lengths is not None:
            tensors[name] = torch.tensor(lengths)
    if alibi:
        options["alibi_slopes"] = functional.alibi_slopes(HEADS, device)
    if options.get("dropout_p"):
        options["dropout_seed"] = 7
    shown = {"causal", "window", "softcap", "dropout_p", "return_weights"}
    said = {"bool": bool_mask, "mask": mask, "sinks": sinks, "alibi": alibi}
    said |= {"packed": cu_seqlens, "lengths": key_lengths}
    said |= {name: value for name, value in options.items() if name in shown}
    return Case(
        name=" ".join([f"attention M={M} N={N} D={D}", *(f"{name}={value}" for name, value in said.items() if value)]),
        tensors={name: t.to(device) for name, t in tensors.items()},
        run=lambda tensors, backend: _run(tensors, backend, options),
        kernels=kernels,
    )


def _run(tensors: Results, backend: str, options: dict[str, Any]) -> Results:
    q, k, v = (tensors[name] for name in "qkv")
    given = {name: t for name, t in tensors.items() if name not in ("q", "k", "v", "mask")}
    found = functional.attention(
        q, k, v, attn_mask=tensors.get("mask"), **given, **options, enable_gqa=True, return_lse=True, backend=backend
    )
    return dict(zip(("out", "lse", "weights"), found, strict=False))
