"""Which tile sizes run where, and what a device can hold. No search happens here: tables are read, never made."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

INTERPRETER = "interpreter"

# Bytes of shared memory that the default tiles may take; GPUs not made for data centres have 99 KiB.
ROOMY = 160 << 10

# Most queries, those of a group's heads together, for which packing them into one tile pays.
DECODE_ROWS = 64

# Multiprocessors and bytes of shared memory a program may use, of each architecture's common data-centre part.
TYPICAL = {
    "sm_80": (108, 163 << 10),  # A100
    "sm_86": (84, 99 << 10),  # A40, RTX 3090
    "sm_89": (142, 99 << 10),  # L40, RTX 4090
    "sm_90": (132, 227 << 10),  # H100, H200
    "sm_100": (148, 227 << 10),  # B200
    "sm_120": (188, 99 << 10),  # RTX PRO 6000
    "gfx942": (304, 64 << 10),  # MI300X
}


@dataclass(frozen=True)
class Device:
    """What the choice of a kernel needs to know of a device; make one by hand to ask about a GPU that is not here.

    ``arch`` is "sm_90", "gfx942", … or "interpreter"; ``shared_memory`` is bytes a program may use, ``registers``
    the 32-bit registers of one multiprocessor. What is left 0 is that of the architecture's common data-centre part.
    """

    arch: str
    multiprocessors: int = 0
    shared_memory: int = 0
    registers: int = 65536

    def __post_init__(self) -> None:
        multiprocessors, shared_memory = TYPICAL.get(self.arch, (1, 1 << 30))
        object.__setattr__(self, "multiprocessors", self.multiprocessors or multiprocessors)
        object.__setattr__(self, "shared_memory", self.shared_memory or shared_memory)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one launch. For attention ``rows`` tiles the queries and ``columns`` the keys.

    Of attention's forward kernel: ``persistent`` programs a multiprocessor take tile after tile (0: a program a tile);
    ``descriptors`` has the hardware copy tiles of keys where alignment allows; ``specialize`` gives warps roles.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    persistent: int = 0
    descriptors: bool = False
    specialize: bool = False

    def fitting(self, rows: int) -> "Tiles":
        """These with only as many rows as it takes."""
        return replace(self, rows=min(self.rows, power_of_two(rows)))


@functools.cache
def table(arch: str, shared_memory: int = 0) -> dict:
    """The table shipped for ``arch``; where none is, the one for kin, for little shared memory, or the defaults."""
    folder = Path(__file__).parent / "tuned"
    kin = "gfx942" if arch.startswith("gfx") else "small" if 0 < shared_memory < ROOMY else "defaults"
    path = folder / f"{arch}.json"
    return json.loads((path if path.is_file() else folder / f"{kin}.json").read_text())


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
def attention_tiles(operation: str, head_dim: int, dtype_bits: int, device: Device, masked: bool = False) -> Tiles:
    """Tiles for ``operation``, a key of the tables, at the larger of the two head dims.

    A mask takes shared memory and registers of its own: a row's "masked" says what to change for it.
    """
    if device.arch == INTERPRETER:
        # Small, so that small test shapes still cross tile borders.
        rows = DECODE_ROWS if operation == "attention_decode" else 32
        return Tiles(rows, columns=16, num_warps=1, num_stages=1)
    rows = table(device.arch, device.shared_memory)[operation]
    rows = [row for row in rows if row["dtype_bits"] == dtype_bits]
    row = min((row for row in rows if row["head_dim"] >= head_dim), key=lambda row: row["head_dim"])
    row = row | row.get("masked", {}) if masked else row
    options = {name: row[name] for name in ("persistent", "descriptors", "specialize") if name in row}
    return Tiles(row["BLOCK_M"], row["BLOCK_N"], row["num_warps"], row["num_stages"], **options)


def decode_splits(device: Device, programs: int, rows: int, group: int, blocks: int) -> int:
    """Among how many programs to split ``blocks`` tiles of keys, for ``rows`` queries of ``group`` heads packed.

    ``programs`` is how many there would be unsplit. 0 is for the plain kernel: too many rows for a packed tile, or the
    device is full without splits and there is no group that could share its keys.
    """
    if rows > DECODE_ROWS:
        return 0
    splits = max(1, min(2 * device.multiprocessors // programs, blocks // 2))
    return splits if splits > 1 or group > 1 else 0


def pointwise_tiles(rows: int, hidden: int) -> Tiles:
    """Tiles for pointwise cell steps on many rows, bound by memory: 128 units a warp keep loads wide."""
    return Tiles(min(4, power_of_two(rows, least=1)), min(128, power_of_two(hidden)), num_warps=4, num_stages=1)
