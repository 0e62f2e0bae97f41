"""What one compile ahead of time is: a kernel, a target, and what a launch would pass."""

import functools
import json
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

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
        arguments: run-time arguments by name: a pointer as its Triton type, a number as a value typical of a call,
            None for what is absent, or a named tuple of these. Those the kernel has no parameter for are ignored, and
            so are constants; one it has and does not find is an error.
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
        return " ".join(value for tag, value in self.tags.items() if tag != "bounds")

    @property
    def spill_budget(self) -> int:
        return spill_budgets().get(self.target, {}).get(self.name, {}).get(self.variant, 0)

    def pairs(self) -> set[tuple]:
        """Pairs of its properties; the sizes of a recurrence, of which there are many, pair with the kernel alone."""
        sizes = [(tag, value) for tag, value in self.tags.items() if tag in ("hidden", "batch")]
        others = [(tag, value) for tag, value in self.tags.items() if tag not in ("hidden", "batch")]
        kernel = ("kernel", self.name)
        return set(combinations([kernel, ("target", self.target), *others], 2)) | {(kernel, size) for size in sizes}


def precisions(dtype: str, target: str) -> tuple[str, ...]:
    """How kernels may multiply ``dtype`` on ``target``; the first is the default."""
    return ("tf32x3", "tf32") if dtype == "float32" and target.startswith("sm_") else ("ieee",)
