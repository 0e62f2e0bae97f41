"""Which kernels are compiled ahead of time, with which arguments, for which targets.

An :class:`Entry` describes one compile by what a launch would pass, so that it is specialised as a launch would
be. :func:`catalogue` lists all of them; :func:`covering` picks few that still show every pair of properties.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from ..kernels import tuning
from ..reference.bptt import SAVED
from ..reference.recurrence import GATES

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
    """

    kernel: Function
    target: str
    arguments: dict[str, str | int | float]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.path.partition(":")[2]

    @property
    def configuration(self) -> str:
        tiles = "x".join(str(value) for name, value in self.constants.items() if name in ("BLOCK_M", "BLOCK_N"))
        tiles = tiles or "x".join(str(self.constants[name]) for name in ("BLOCK_B", "BLOCK_H"))
        return f"{' '.join(self.tags.values())} {tiles} w{self.num_warps} s{self.num_stages}"

    @property
    def variant(self) -> str:
        """What spill budgets are recorded by: causal or not makes too little difference."""
        return " ".join(value for tag, value in self.tags.items() if tag != "causal")

    @property
    def spill_budget(self) -> int:
        return spill_budgets().get(self.target, {}).get(self.name, {}).get(self.variant, 0)

    def pairs(self) -> set[tuple]:
        properties = [("kernel", self.name), ("target", self.target), *self.tags.items()]
        return set(combinations(properties, 2))


def catalogue() -> list[Entry]:
    """Every kernel in every configuration that the library may launch."""
    return [*_pointwise(), *_attention()]


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


def _pointwise() -> Iterator[Entry]:
    module = "recurrence.cells"
    for cell, dtype, hidden, target in product(GATES, POINTERS, (768, 650), TARGETS):
        gates, saved = GATES[cell], SAVED[cell]
        tiles = tuning.pointwise_tiles(64, hidden)
        shared = {
            "h_ptr": POINTERS[dtype], "c_ptr": "*fp32", "saved_ptr": POINTERS[dtype],
            "B": 64, "H": hidden, "stride_h": hidden,
        }  # fmt: skip
        forward = {
            "x_gates_ptr": POINTERS[dtype], "h_gates_ptr": POINTERS[dtype], "h_out_ptr": POINTERS[dtype],
            "c_out_ptr": "*fp32", "stride_x": gates * hidden, "stride_h_out": hidden,
        }  # fmt: skip
        backward = {
            "c_new_ptr": "*fp32", "dh_ptr": "*fp32", "dc_ptr": "*fp32", "dh_out_ptr": "*fp32", "dc_out_ptr": "*fp32",
            "dx_gates_ptr": POINTERS[dtype], "dh_gates_ptr": POINTERS[dtype],
        }  # fmt: skip
        common = {
            "GATES": gates, "SAVED": saved, "HAS_C": cell == "lstm", "BLOCK_B": tiles.rows, "BLOCK_H": tiles.columns,
        }  # fmt: skip
        tags = {"cell": cell, "dtype": dtype, "hidden": f"H={hidden}"}
        for save in (True, False):
            yield Entry(
                Function(f"{module}:pointwise_forward_kernel"),
                target,
                shared | forward,
                common | {"STEP": Function(f"{module}:{cell}_step"), "SAVE": save},
                tiles.num_warps,
                tiles.num_stages,
                tags | {"save": "training" if save else "inference"},
            )
        yield Entry(
            Function(f"{module}:pointwise_backward_kernel"),
            target,
            shared | backward,
            common | {"STEP_BACKWARD": Function(f"{module}:{cell}_step_backward"), "SPLIT": cell == "gru"},
            tiles.num_warps,
            tiles.num_stages,
            tags,
        )


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
