"""Which tile sizes run where, and what a device can hold. No search happens here: tables are read, never made."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Device:
    """What the choice of a kernel needs to know of a device; make one by hand to ask about a GPU that is not here.

    ``arch`` is "sm_90", "gfx942", … or "interpreter"; ``shared_memory`` is bytes a program may use, ``registers``
    the 32-bit registers of one multiprocessor.
    """

    arch: str
    multiprocessors: int = 1
    shared_memory: int = 1 << 30
    registers: int = 65536


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one launch. For attention ``rows`` tiles the queries and ``columns`` the keys."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@functools.cache
def table(arch: str) -> dict:
    """The tuned table shipped for ``arch``, or the untuned defaults where none is."""
    folder = Path(__file__).parent / "tuned"
    path = folder / f"{arch}.json"
    return json.loads((path if path.is_file() else folder / "defaults.json").read_text())


def is_measured(arch: str) -> bool:
    """Whether tile sizes for ``arch`` come from measurements on it."""
    return "measured_on" in table(arch)


def is_no_slower(arch: str, operation: str) -> bool:
    """Whether the table measured on ``arch`` lists ``operation`` as no slower than torch's own."""
    return is_measured(arch) and operation in table(arch).get("no_slower", ())


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size`` and is at least what a matrix instruction takes."""
    return max(least, 1 << (size - 1).bit_length())


@functools.cache
def attention_tiles(operation: str, head_dim: int, dtype_bits: int, arch: str) -> Tiles:
    """Tiles for ``operation`` ("attention_forward" or "attention_backward") at the larger of the two head dims."""
    if arch == INTERPRETER:
        # Small, so that small test shapes still cross tile borders.
        return Tiles(rows=32, columns=16, num_warps=1, num_stages=1)
    rows = [row for row in table(arch)[operation] if row["dtype_bits"] == dtype_bits]
    row = next(row for row in sorted(rows, key=lambda r: r["head_dim"]) if row["head_dim"] >= head_dim)
    return Tiles(row["BLOCK_M"], row["BLOCK_N"], row["num_warps"], row["num_stages"])


def pointwise_tiles(batch: int, hidden: int) -> Tiles:
    """Tiles for the pointwise cell step, bound by memory: one row of 128 units a warp keeps loads wide."""
    columns = min(128, power_of_two(hidden))
    rows = min(4, power_of_two(batch, least=1))
    return Tiles(rows, columns, num_warps=4, num_stages=1)
