"""The attention kernels' part of what is compiled ahead of time."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from ..kernels import tuning
from .aot_entry import POINTERS, TARGETS, Entry, Function, precisions

# 72 is no power of two, so that masking the head dim is compiled too, and its rows are not aligned to 16 elements.
HEAD_DIMS = (16, 64, 72, 128, 256)
BATCH, HEADS, LENGTH = 2, 8, 1024

# What changes a kernel's code: each feature's ways to be.
FEATURES = {
    "bounds": ("full", "causal", "window"),
    "mask": ("unmasked", "bool", "additive"),
    "sequences": ("equal", "lower right", "lengths", "packed"),
    "softcap": ("", "softcap"),
    "alibi": ("", "alibi"),
    "sinks": ("", "sinks"),
    "dropout": ("", "dropout"),
    "group": ("", "grouped"),
}
KERNELS = ("forward", "backward_dkdv", "backward_dq", "backward_bias", "decode", "weights")
# Of the forward kernel: ways to run that a table of measurements may choose, besides the one ours does.
FORWARD_WAYS = ("persistent", "pointers", "descriptors")
# Of the kernel of the mask's gradient: what it sums over, besides batch and heads.
BIAS_WAYS = ("summed over queries", "summed over keys")
# Of the decode kernel: as many queries as a tile takes, and not the fewest.
ALL_ROWS = "all rows"


def attention() -> Iterator[Entry]:
    for dtype, head_dim, target in product(POINTERS, HEAD_DIMS, TARGETS):
        # float16 makes the code of bfloat16: one head dim shows it.
        if dtype == "float16" and head_dim != 64:
            continue
        yield from _pointwise(dtype, head_dim, target, {"dtype": dtype, "head_dim": f"D={head_dim}"})
        for precision, bounds, mask in product(precisions(dtype, target), FEATURES["bounds"][:2], FEATURES["mask"]):
            # Groups of heads with one kind of mask, none with the others: neither makes much of a difference.
            chosen = {"bounds": bounds, "mask": mask, "group": "grouped" if mask == "bool" else ""}
            for kernel in KERNELS[:3]:
                yield attention_entry(kernel, dtype, head_dim, target, chosen, precision)
            for kernel in KERNELS[3:]:
                if bounds == "causal" and (mask == "additive" or (mask == "unmasked" and kernel != "backward_bias")):
                    yield attention_entry(kernel, dtype, head_dim, target, chosen, precision)
    for head_dim, way, bounds in product((64, 128), FORWARD_WAYS, FEATURES["bounds"][:2]):
        yield attention_entry("forward", "bfloat16", head_dim, "sm_90", {"bounds": bounds}, "ieee", way)
    masked = {"bounds": "causal", "mask": "additive"}
    for dtype, head_dim, target in product(("bfloat16", "float32"), HEAD_DIMS, TARGETS):
        yield attention_entry("decode", dtype, head_dim, target, masked, precisions(dtype, target)[0], ALL_ROWS)
    for target, way in product(TARGETS, BIAS_WAYS):
        yield attention_entry("backward_bias", "bfloat16", 64, target, masked, "ieee", way)
    for target, chosen, kernel in product(TARGETS, _combinations(), KERNELS):
        ways = chosen | {"mask": "additive"} if kernel == "backward_bias" else chosen
        if ways["sequences"] != "packed" or kernel not in ("decode", "weights"):
            yield attention_entry(kernel, "bfloat16", 64, target, ways, "ieee")


def probes() -> list[Entry]:
    """Warps with roles of their own in the forward kernel: no table asks for it, and not every Triton compiles it."""
    plain = (
        attention_entry("forward", "bfloat16", head_dim, target, {"bounds": bounds}, "ieee", "descriptors")
        for target, head_dim, bounds in product(("sm_90", "sm_100"), (64, 128), FEATURES["bounds"][:2])
    )
    return [
        replace(entry, constants=entry.constants | {"SPECIALIZE": True}, num_warps=num_warps, instruction=None)
        for entry, num_warps in product(plain, (4, 8))
    ]


def _combinations() -> list[dict[str, str]]:
    """Few combinations of features that show every pair of ways to be; the first has as much as can be."""
    every = [dict(zip(FEATURES, ways, strict=True)) for ways in product(*(f[::-1] for f in FEATURES.values()))]
    missing = set().union(*(combinations(ways.items(), 2) for ways in every))
    chosen = []
    while missing:
        best = max(every, key=lambda ways: len(missing & set(combinations(ways.items(), 2))))
        chosen.append(best)
        missing -= set(combinations(best.items(), 2))
    return chosen


def _matrix(dtype: str, columns: int):
    from triton.language import constexpr

    from ..kernels.attention.layout import Matrix

    unit = 4 if dtype == "float32" else 8
    rows = columns // unit
    return Matrix(POINTERS[dtype], HEADS * LENGTH * rows, LENGTH * rows, rows, constexpr(unit))


def _features(chosen: dict[str, str]):
    from ..kernels.attention.layout import Sequences
    from ..kernels.attention.scores import Features

    mask, sequences = chosen.get("mask", "unmasked"), chosen.get("sequences", "equal")
    # Broadcast over batch and heads, as most masks are. In float32 an additive one takes most registers.
    types, strides = {"bool": "*i1", "additive": "*fp32"}, zip("bhmn", (0, 0, LENGTH, 1), strict=True)
    strides = {f"stride_mask_{name}": step for name, step in strides}
    dropout = bool(chosen.get("dropout"))
    features = Features(
        scale=0.125,
        positive=1,
        softcap=30.0 if chosen.get("softcap") else None,
        left=512 if chosen["bounds"] == "window" else None,
        right=None if chosen["bounds"] == "full" else 0,
        lower_right=None if sequences == "equal" else 1,
        mask_ptr=types.get(mask),
        **(strides if mask in types else {}),
        slopes_ptr="*fp32" if chosen.get("alibi") else None,
        sinks_ptr="*fp32" if chosen.get("sinks") else None,
        seed_ptr="*i64" if dropout else None,
        dropout=0.1 if dropout else None,
        kept_scale=1.1 if dropout else None,
    )
    lengths = "*i64" if sequences in ("lengths", "packed") else None
    return features, Sequences(lengths, lengths, 1 if sequences == "packed" else None)


def _arguments(dtype: str, head_dim: int, features, sequences) -> dict[str, Any]:
    """What the kernels take at run time, those of all kernels together."""
    sizes = {"tiles": 256, "B": BATCH, "H": HEADS, "H_KV": HEADS, "M": LENGTH, "N": LENGTH, "section": HEADS}
    sizes |= {"batches": BATCH, "heads": HEADS, "splits": 16, "rows": BATCH * HEADS}
    pointers = ("lse", "row_max", "row_scale", "dlse", "statistics", "part", "part_max", "part_sum", "weights", "dbias")
    matrices = {name: _matrix(dtype, head_dim) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    found = sizes | matrices | {f"{name}_ptr": "*fp32" for name in pointers}
    found |= {"out_ptr": POINTERS[dtype], "features": features, "sequences": sequences}
    return found | {"k_descriptor": None, "v_descriptor": None}


def _pointwise(dtype: str, head_dim: int, target: str, tags: dict[str, str]) -> Iterator[Entry]:
    """The kernels that multiply nothing."""
    arguments = _arguments(dtype, head_dim, *_features({"bounds": "full", "sinks": "sinks"}))
    constants = {"DV": head_dim, "BLOCK_DV": tuning.power_of_two(head_dim)}
    delta = Function("attention.backward:attention_backward_delta_kernel")
    combine = Function("attention.decode:attention_combine_kernel")
    for dlse in ("dlse", "no dlse"):
        given = arguments | {"dlse_ptr": "*fp32" if dlse == "dlse" else None}
        yield Entry(delta, target, given, constants | {"BLOCK_M": 64}, 4, 3, tags | {"dlse": dlse})
    yield Entry(combine, target, arguments, constants | {"BLOCK_M": 16}, 4, 3, tags)


def attention_entry(
    kernel: str, dtype: str, head_dim: int, target: str, chosen: dict[str, str], precision: str, way: str = ""
) -> Entry:
    """One of ``KERNELS`` in the tiles chosen for ``target``, with the ``chosen`` ways of ``FEATURES``."""
    operation = f"attention_{kernel}"
    masked = chosen.get("mask", "unmasked") != "unmasked"
    tiles = tuning.attention_tiles(operation, head_dim, 32 if dtype == "float32" else 16, tuning.Device(target), masked)
    if kernel == "decode" and way != ALL_ROWS:
        tiles = tiles.fitting(16)
    features, sequences = _features(chosen)
    arguments = _arguments(dtype, head_dim, features, sequences)
    block = tuning.power_of_two(head_dim)
    # As the launch does: descriptors copy whole rows.
    if way == "descriptors" or (not way and tiles.descriptors and block == head_dim):
        described = f"tensordesc<{POINTERS[dtype][1:]}[1, 1, {tiles.columns}, {block}]>"
        arguments |= {"k_descriptor": described, "v_descriptor": described}
    constants = {
        "GROUP": 4 if chosen.get("group") else 1, "D": head_dim, "DV": head_dim, "BLOCK_D": block, "BLOCK_DV": block,
        "PRECISION": precision, "PERSISTENT": way == "persistent" or tiles.persistent > 0,
        "SPECIALIZE": tiles.specialize, "SUM_M": way == BIAS_WAYS[0], "SUM_N": way == BIAS_WAYS[1],
        "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns,
    }  # fmt: skip
    tags = {"dtype": dtype, "head_dim": f"D={head_dim}", "precision": precision, "way": way}
    tags |= {name: chosen.get(name, ways[0]) for name, ways in FEATURES.items()}
    module = {"decode": "decode", "backward_bias": "bias", "weights": "weights"}.get(kernel, kernel.partition("_")[0])
    # Warp groups multiply 64 rows at a time, from 16-bit operands.
    rows = tiles.columns if kernel == "backward_dkdv" else tiles.rows
    wide = target == "sm_90" and dtype != "float32" and rows >= 64 and kernel != "decode"
    return Entry(
        Function(f"attention.{module}:attention_{kernel}_kernel"),
        target,
        arguments,
        constants,
        tiles.num_warps,
        tiles.num_stages,
        {name: value for name, value in tags.items() if value and value not in ("plain", "equal", "ieee")},
        instruction="wgmma" if wide else None,
    )
