"""Which kernels are compiled ahead of time, with which arguments, for which targets.

:func:`catalogue` lists every configuration; :func:`covering` picks few that still show every pair of properties.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..cells import BUILT_IN, ZONEOUT, Cell
from ..kernels import tuning
from ..kernels.recurrence import plan as plans
from .aot_attention import attention
from .aot_entry import POINTERS, TARGETS, Entry, Function, precisions


def catalogue() -> list[Entry]:
    """Every kernel in every configuration that the library may launch."""
    return [*_recurrence(), *_zoneout(), *_floors(), *attention()]


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
            device = tuning.Device(target)
            for mapped in (False, True) if dtype == "bfloat16" and batch == 16 else (False,):
                yield sequence_entry(cell, dtype, device, shape, mapped)
            if few and dtype == "float32" and target.startswith("sm_"):
                yield sequence_entry(cell, dtype, device, replace(shape, parts=2), False)
            if few and not backward:
                yield _step_entry(cell, dtype, target, shape)


# A cell with zoneout differs by some pointwise math and tiles to load: once each, every target and dtype among them.
ZONED = {
    "rnn_tanh": ("sm_80", "float32", 128, False), "rnn_relu": ("gfx942", "float16", 128, False),
    "gru": ("sm_100", "bfloat16", 768, True), "lstm": ("sm_90", "bfloat16", 768, True),
}  # fmt: skip


def _zoneout() -> Iterator[Entry]:
    for name, (target, dtype, hidden, mapped) in ZONED.items():
        cell = ZONEOUT[name]
        yield _pointwise_entry(cell, dtype, hidden, target)
        for backward in (False, True):
            shape = plans.Shape(cell.gates, hidden, 1, 16, 1, 4 if dtype == "float32" else 2, backward)
            yield sequence_entry(cell, dtype, tuning.Device(target), shape, mapped)


def _recurrence_arguments(cell: Cell, dtype: str, hidden: int) -> dict[str, str | int | float]:
    width = max(cell.gates + cell.extra, cell.saved) * hidden
    numbers = {"T": 512, "B": 64, "R": 512 * 64, "H": hidden, "first_group": 0, "groups": 2, "clip": 1.0}
    strides = dict.fromkeys((f"stride_{name}" for name in ("x", "saved", "h", "c")), width)
    strides |= {"initial_rows": 64, "saved_direction": 512 * 64, "y_width": 1}
    strides |= dict.fromkeys(("x_width", "saved_width"), width // hidden)
    return {f"{name}_ptr": POINTERS[dtype] for name in TENSORS} | INTEGERS | numbers | strides


def _cell_constants(cell: Cell, backward: bool) -> dict[str, Any]:
    step = "STEP_BACKWARD" if backward else "STEP"
    function = cell.step_backward if backward else cell.step
    constants = {"GATES": cell.gates, "EXTRA": cell.extra, "SAVED": cell.saved, "HAS_C": cell.has_c}
    return constants | {step: Function(function.removeprefix("seqcore.kernels."))}


def sequence_entry(cell: Cell, dtype: str, device: tuning.Device, shape: plans.Shape, mapped: bool) -> Entry:
    """The kernel of a whole sequence as planned for ``device``; ``mapped``: of ragged rows, with more features."""
    plan, target = plans.make(shape, device), device.arch
    # In two parts where torch's switch forbids TF32.
    precision = "tf32x3" if shape.parts == 2 else precisions(dtype, target)[-1]
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
        "PRECISION": precisions(dtype, target)[-1], "BLOCK_B": plan.rows, "BLOCK_H": plan.units, "BLOCK_K": plan.tile,
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
