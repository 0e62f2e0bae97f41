"""Which kernels are compiled ahead of time, with which arguments, for which targets.

An :class:`Entry` describes one compile by what a launch would pass, so that it is specialised as a launch would
be. :func:`catalogue` lists all of them; :func:`covering` picks few that still show every pair of properties.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from ..cells import BUILT_IN, Cell
from ..kernels import tuning
from ..kernels.recurrence import plan as plans

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}

# target -> kernel -> variant -> bytes of scratch memory that a thread may use. What is not listed may use none.
SPILL_BUDGETS = Path(__file__).with_name("spill_budgets.json")


@functools.cache
def spill_budgets() -> dict[str, dict[str, dict[str, int]]]:
    """The recorded budgets; :func:`seqcore.testing.aot.record` writes them."""
    return json.loads(SPILL_BUDGETS.read_text()) if SPILL_BUDGETS.exists() else {}


@dataclass(frozen=True)
class Function:
    """A device function or kernel by name, "module:function" below ``seqcore.kernels``."""

    path: str


@dataclass(frozen=True)
class Entry:
    """One compile.

    Args:
        kernel: the kernel.
        target: one of ``TARGETS``.
        arguments: run-time arguments by name: a pointer as its Triton type, a number as a value typical of a call.
            Those the kernel has no parameter for are ignored, and so are constants; one it has and does not find
            is an error.
        constants: compile-time arguments by name; a device function as a :class:`Function`.
        tags: the properties by which entries are told apart and covered, besides kernel and target.
        stationary: how many tiles of weights must be in shared memory before the time loop begins.
        instruction: the matrix instruction that must be used, if it is certain which.
    """

    kernel: Function
    target: str
    arguments: dict[str, str | int | float]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tags: dict[str, str] = field(default_factory=dict)
    stationary: int = 0
    instruction: str | None = None

    @property
    def name(self) -> str:
        return self.kernel.path.partition(":")[2]

    @property
    def configuration(self) -> str:
        tiles = "x".join(str(value) for name, value in self.constants.items() if name in ("BLOCK_M", "BLOCK_N"))
        tiles = tiles or "x".join(
            str(self.constants[name]) for name in ("BLOCK_B", "BLOCK_H", "BLOCK_K") if name in self.constants
        )
        return f"{' '.join(self.tags.values())} {tiles} w{self.num_warps} s{self.num_stages}"

    @property
    def variant(self) -> str:
        """What spill budgets are recorded by: causal or not makes too little difference."""
        return " ".join(value for tag, value in self.tags.items() if tag != "causal")

    @property
    def spill_budget(self) -> int:
        return spill_budgets().get(self.target, {}).get(self.name, {}).get(self.variant, 0)

    def pairs(self) -> set[tuple]:
        """Pairs of its properties; the sizes of a recurrence, of which there are many, pair with the kernel alone."""
        sizes = [(tag, value) for tag, value in self.tags.items() if tag in ("hidden", "batch")]
        others = [(tag, value) for tag, value in self.tags.items() if tag not in ("hidden", "batch")]
        kernel = ("kernel", self.name)
        return set(combinations([kernel, ("target", self.target), *others], 2)) | {(kernel, size) for size in sizes}


def catalogue() -> list[Entry]:
    """Every kernel in every configuration that the library may launch."""
    return [*_recurrence(), *_floors(), *_attention()]


def covering(entries: Iterable[Entry]) -> list[Entry]:
    """Few of ``entries`` that together show every pair of properties which all of them show (greedily chosen)."""
    remaining = [(entry, entry.pairs()) for entry in entries]
    missing = set().union(*(pairs for _, pairs in remaining))
    chosen = []
    while missing:
        best, shown = max(remaining, key=lambda item: len(item[1] & missing))
        chosen.append(best)
        missing -= shown
    return chosen


# --- recurrence ----------------------------------------------------------------------------------------------


# Every regime, sizes that pad no tile and sizes that pad every one; a batch for each number of rows a program may have.
HIDDEN = (128, 256, 512, 650, 768, 1000, 1024, 1536, 2048)
BATCHES = {"bfloat16": (16, 64, 256), "float16": (16,), "float32": (16, 256)}
# Where nobody has measured yet, and for kernels that hold nothing, a few sizes show what there is to see.
FEW_HIDDEN = (128, 650, 2048)
# The pointers of all recurrence kernels that are not in the input's dtype.
INTEGERS = {
    "offset_ptr": "*i64", "active_ptr": "*i64", "source_ptr": "*i64", "last_ptr": "*i64", "steps_ptr": "*i64",
    "counter_ptr": "*i32",
}  # fmt: skip
TENSORS = (
    "x_gates", "w_hh", "b_hh", "h_init", "c_init", "y", "cells", "saved", "h_n", "c_n", "dy", "dcells", "dh_n", "dc_n",
    "dx_gates", "dh_gates", "dh_init", "dc_init", "x", "w_ih", "b_ih", "h", "c", "h_gates",
)  # fmt: skip


def _recurrence() -> Iterator[Entry]:
    for cell, dtype, hidden, target in product(BUILT_IN, POINTERS, HIDDEN, TARGETS):
        few = hidden in FEW_HIDDEN
        if few:
            yield _pointwise_entry(cell, dtype, hidden, target)
        if not few and target not in ("sm_80", "sm_90"):
            continue
        for batch, backward in product(BATCHES[dtype], (False, True)):
            shape = plans.Shape(cell.gates, hidden, 1, batch, 1, 4 if dtype == "float32" else 2, backward)
            # A map changes nothing about tiles and products: one batch in one dtype shows it.
            for mapped in (False, True) if dtype == "bfloat16" and batch == 16 else (False,):
                yield _sequence_entry(cell, dtype, target, shape, mapped)
            if few and dtype == "float32" and target.startswith("sm_"):
                yield _sequence_entry(cell, dtype, target, replace(shape, parts=2), False)
            if few and not backward:
                yield _step_entry(cell, dtype, target, shape)


def _recurrence_arguments(cell: Cell, dtype: str, hidden: int) -> dict[str, str | int | float]:
    width = max(cell.gates, cell.saved) * hidden
    numbers = {"T": 512, "B": 64, "R": 512 * 64, "H": hidden, "first_group": 0, "groups": 2, "clip": 1.0}
    strides = dict.fromkeys((f"stride_{name}" for name in ("x", "saved", "h", "c")), width)
    strides |= {"initial_rows": 64, "saved_direction": 512 * 64, "y_width": 1}
    strides |= dict.fromkeys(("x_width", "saved_width"), width // hidden)
    return {f"{name}_ptr": POINTERS[dtype] for name in TENSORS} | INTEGERS | numbers | strides


def _cell_constants(cell: Cell, backward: bool) -> dict[str, Any]:
    step = "STEP_BACKWARD" if backward else "STEP"
    function = cell.step_backward if backward else cell.step
    constants = {"GATES": cell.gates, "SAVED": cell.saved, "HAS_C": cell.has_c}
    return constants | {step: Function(function.removeprefix("seqcore.kernels."))}


def _sequence_entry(cell: Cell, dtype: str, target: str, shape: plans.Shape, mapped: bool) -> Entry:
    plan = plans.make(shape, tuning.Device(target))
    # In two parts where torch's switch forbids TF32.
    precision = "tf32x3" if shape.parts == 2 else _precisions(dtype, target)[-1]
    constants = _cell_constants(cell, shape.backward) | {
        "MAPPED": mapped, "NATIVE": target.startswith("sm_"), "BLOCKS": 1, "UNITS": shape.units,
        "SLICES": plan.slices, "HOLD": plan.hold, "SWAP": plan.swap, "FOLD": plan.fold, "STAGE": plan.stage,
        "CHAINS": plan.chains, "PRECISION": precision, "BLOCK_B": plan.rows,
        "BLOCK_H": plan.units, "BLOCK_K": plan.tile,
    }  # fmt: skip
    if shape.backward:
        has_c = cell.has_c
        constants |= {
            "APART": cell.apart, "HAS_DY": True, "HAS_DCELLS": has_c and mapped, "HAS_DH_N": True, "HAS_DC_N": has_c,
            "CLIP": mapped, "RESETS": mapped,
        }  # fmt: skip
        outputs = 1
    else:
        first, rest = plans.split(cell.gates, plan.padded)
        constants |= {"BIAS": True, "SAVE": True, "SAVE_CELLS": cell.has_c, "MAIN": first, "REST": rest}
        outputs = 2 if rest else 1
    name = "backward" if shape.backward else "forward"
    tiles = -(-shape.contraction // (plan.fold * plan.tile))
    # wgmma takes 64 rows at a time, two dimensions, and 16-bit operands as they come.
    wide = target == "sm_90" and plan.rows >= 64 and plan.fold == 1 and dtype != "float32"
    tags = {
        "cell": cell.name, "dtype": dtype, "regime": plan.regime, "hidden": f"H={shape.units}",
        "batch": f"B={shape.batch}", "input": "mapped" if mapped else "padded",
    }  # fmt: skip
    if shape.parts == 2:
        tags["precision"] = precision
    return Entry(
        Function(f"recurrence.{name}:recurrence_{name}_kernel"),
        target,
        _recurrence_arguments(cell, dtype, shape.units),
        constants,
        plan.num_warps,
        1,
        tags,
        stationary=tiles * outputs * shape.parts if plan.hold and target.startswith("sm_") else 0,
        instruction="wgmma" if wide else None,
    )


def _step_entry(cell: Cell, dtype: str, target: str, shape: plans.Shape) -> Entry:
    plan = plans.make_step(shape, tuning.Device(target))
    first, rest = plans.split(cell.gates, plan.padded)
    constants = _cell_constants(cell, backward=False) | {
        "BIAS": True, "SAVE": True, "SAVE_CELLS": cell.has_c, "INPUTS": shape.units, "BLOCKS": 1, "UNITS": shape.units,
        "SLICES": plan.slices, "MAIN": first, "REST": rest, "SWAP": plan.swap, "STAGE": plan.stage,
        "PRECISION": _precisions(dtype, target)[-1], "BLOCK_B": plan.rows, "BLOCK_H": plan.units, "BLOCK_K": plan.tile,
    }  # fmt: skip
    tags = {"cell": cell.name, "dtype": dtype, "hidden": f"H={shape.units}", "batch": f"B={shape.batch}"}
    arguments = _recurrence_arguments(cell, dtype, shape.units)
    return Entry(
        Function("recurrence.step:recurrence_step_kernel"), target, arguments, constants, plan.num_warps, 1, tags
    )


def _pointwise_entry(cell: Cell, dtype: str, hidden: int, target: str) -> Entry:
    tiles = tuning.pointwise_tiles(4096, hidden)
    constants = _cell_constants(cell, backward=False) | {"BLOCK_B": tiles.rows, "BLOCK_H": tiles.columns}
    tags = {"cell": cell.name, "dtype": dtype, "hidden": f"H={hidden}"}
    arguments = _recurrence_arguments(cell, dtype, hidden)
    return Entry(
        Function("recurrence.pointwise:pointwise_kernel"), target, arguments, constants, tiles.num_warps, 1, tags
    )


def _floors() -> Iterator[Entry]:
    """What the recurrences are judged by; the exchange with and without padded tiles, in 16 rows and in 64."""
    for target in TARGETS:
        yield Entry(Function("floors:empty_kernel"), target, {}, {}, 4, 1, {"floor": "launch"})
        arguments = {"rows_ptr": "*i32", "counter_ptr": "*i32", "T": 1024, "teams": 2}
        yield Entry(Function("floors:barrier_kernel"), target, arguments, {"SLICES": 48}, 4, 1, {"floor": "barrier"})
        for width, share, rows, warps in ((384, 8, 16, 4), (325, 8, 64, 8)):
            constants = {
                "SLICES": -(-width // share), "WIDTH": width, "SHARE": share, "BLOCK_B": rows, "BLOCK_K": 128,
            }  # fmt: skip
            tags = {"floor": f"exchange {width}x{rows}"}
            yield Entry(Function("floors:exchange_kernel"), target, arguments, constants, warps, 1, tags)


# --- attention -----------------------------------------------------------------------------------------------

# mask -> the kernels' code for it, its pointer's type where there is one, and query heads to a key head. A mask in
# float32 may go with queries of any dtype, and takes most registers.
MASKS = {"unmasked": (0, None, 1), "bool": (1, "*i1", 4), "additive": (2, "*fp32", 1)}
# 72 is no power of two, so that masking the head dim is compiled too, and its rows are not aligned to 16 elements.
HEAD_DIMS = (16, 64, 72, 128, 256)
HEADS, LENGTH = 8, 1024


def _attention() -> Iterator[Entry]:
    for dtype, head_dim, target in product(POINTERS, HEAD_DIMS, TARGETS):
        tags = {"dtype": dtype, "head_dim": f"D={head_dim}"}
        for has_dlse in (False, True):
            constants = {"HAS_DLSE": has_dlse}
            delta_tags = tags | {"dlse": "dlse" if has_dlse else "no dlse"}
            yield _attention_entry("backward_delta", dtype, head_dim, target, constants, delta_tags)
        for precision, causal, mask in product(_precisions(dtype, target), (False, True), MASKS):
            kind, _, group = MASKS[mask]
            constants = {"GROUP": group, "CAUSAL": causal, "MASK_KIND": kind, "PRECISION": precision}
            variant = {"precision": precision, "causal": "causal" if causal else "full", "mask": mask}
            for kernel in ("forward", "backward_dkdv", "backward_dq"):
                yield _attention_entry(kernel, dtype, head_dim, target, constants, tags | variant)


def _precisions(dtype: str, target: str) -> tuple[str, ...]:
    return ("tf32x3", "tf32") if dtype == "float32" and target.startswith("sm_") else ("ieee",)


def _attention_entry(
    kernel: str, dtype: str, head_dim: int, target: str, constants: dict[str, Any], tags: dict[str, str]
) -> Entry:
    operation = kernel.partition("_")[0]
    tiles = tuning.attention_tiles(f"attention_{operation}", head_dim, 32 if dtype == "float32" else 16, target)
    block = tuning.power_of_two(head_dim)
    arguments = {"H": HEADS, "H_KV": HEADS, "M": LENGTH, "N": LENGTH, "scale": 0.125, "diagonal": 0}
    for tensor in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        row = "n" if tensor in "kv" else "m"
        arguments |= {
            f"{tensor}_ptr": POINTERS[dtype],
            f"stride_{tensor}_b": HEADS * LENGTH * head_dim,
            f"stride_{tensor}_h": LENGTH * head_dim,
            f"stride_{tensor}_{row}": head_dim,
        }
    arguments |= dict.fromkeys(("lse_ptr", "row_max_ptr", "row_scale_ptr", "dlse_ptr", "delta_ptr"), "*fp32")
    # Broadcast over batch and heads, as most masks are.
    arguments |= {"stride_mask_b": 0, "stride_mask_h": 0, "stride_mask_m": LENGTH, "stride_mask_n": 1}
    arguments["mask_ptr"] = MASKS[tags.get("mask", "unmasked")][1] or POINTERS[dtype]
    blocks = {"D": head_dim, "DV": head_dim, "BLOCK_D": block, "BLOCK_DV": block}
    return Entry(
        Function(f"attention.{operation}:attention_{kernel}_kernel"),
        target,
        arguments,
        constants | blocks | {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns},
        4 if kernel == "backward_delta" else tiles.num_warps,
        tiles.num_stages,
        tags,
    )
