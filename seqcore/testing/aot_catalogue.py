"""Which kernels are compiled ahead of time, with which arguments, for which targets.

An :class:`Entry` describes one compile by what a launch would pass, so that it is specialised as a launch would
be. :func:`catalogue` lists all of them; :func:`covering` picks few that still show every pair of properties.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from ..kernels import tuning
from ..reference.bptt import SAVED
from ..reference.recurrence import GATES

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}

# Bytes of scratch memory that a thread may use, where zero could not be had. A record names the tags it is for;
# what no record names may use none.
SPILL_BUDGETS: list[tuple[dict[str, str], int]] = []


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
    def spill_budget(self) -> int:
        tags = {**self.tags, "kernel": self.name, "target": self.target}
        return max((limit for wanted, limit in SPILL_BUDGETS if wanted.items() <= tags.items()), default=0)

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

MASKS = {"unmasked": 0, "bool": 1, "additive": 2}
# 80 and 65 are no powers of two, so that masking the head dim is compiled too; rows of 65 are not aligned either.
HEAD_DIMS = (16, 64, 65, 80, 128, 256)
BATCH, HEADS, LENGTH = 2, 8, 1024


def _attention() -> Iterator[Entry]:
    for dtype, head_dim, target in product(POINTERS, HEAD_DIMS, TARGETS):
        tags = {"dtype": dtype, "head_dim": f"D={head_dim}"}
        for has_dlse in (False, True):
            constants = {"HAS_DLSE": has_dlse}
            delta_tags = tags | {"dlse": "dlse" if has_dlse else "no dlse"}
            yield _attention_entry("backward_delta", dtype, head_dim, target, constants, delta_tags)
        variants = product(_precisions(dtype, target), (False, True), MASKS, (1, 4))
        for precision, causal, mask, group in variants:
            constants = {"GROUP": group, "CAUSAL": causal, "MASK_KIND": MASKS[mask], "PRECISION": precision}
            variant_tags = tags | {
                "precision": precision, "causal": "causal" if causal else "full", "mask": mask, "group": f"group={group}",
            }  # fmt: skip
            for kernel in ("forward", "backward_dkdv", "backward_dq"):
                yield _attention_entry(kernel, dtype, head_dim, target, constants, variant_tags)


def _precisions(dtype: str, target: str) -> tuple[str, ...]:
    if dtype != "float32":
        return ("ieee",)
    return ("ieee", "tf32") if target.startswith("gfx") else ("ieee", "tf32", "tf32x3")


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
    arguments |= dict.fromkeys(("lse_ptr", "dlse_ptr", "delta_ptr"), "*fp32")
    # Broadcast over batch and heads, as most masks are.
    arguments |= {"stride_mask_b": 0, "stride_mask_h": 0, "stride_mask_m": LENGTH, "stride_mask_n": 1}
    arguments["mask_ptr"] = "*i1" if tags.get("mask") == "bool" else POINTERS[dtype]
    blocks = {"D": head_dim, "DV": head_dim, "BLOCK_D": block, "BLOCK_DV": block}
    return Entry(
        Function(f"attention.{operation}:attention_{kernel}_kernel"),
        target,
        arguments,
        constants | blocks | {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns},
        tiles.num_warps,
        tiles.num_stages,
        tags,
    )
