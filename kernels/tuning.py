"""Which tile sizes run where, and what a device can hold. No search happens here: tables are read, never made."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import tables

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

    ``arch`` is "sm_90", "gfx942", … or "interpreter"; of "sm_90a" and "sm_100f", as compilers call what only that
    architecture or its family has, the number alone is kept. ``shared_memory`` is bytes a program may use,
    ``registers`` the 32-bit registers of one multiprocessor. What is left 0 is that of the architecture's common
    data-centre part. What is no string, no such name, or no integer, raises ValueError.
    """

    arch: str
    multiprocessors: int = 0
    shared_memory: int = 0
    registers: int = 65536

    def __post_init__(self) -> None:
        numbers = (self.multiprocessors, self.shared_memory, self.registers)
        if not isinstance(self.arch, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(
                "Device: arch must be a string, such as 'sm_90', and all else integers that are not negative, got "
                f"{self.arch!r} and {numbers}"
            )
        if self.arch.startswith("sm_"):
            object.__setattr__(self, "arch", self._numbered())
        multiprocessors, shared_memory = TYPICAL.get(self.arch, (1, 1 << 30))
        object.__setattr__(self, "multiprocessors", self.multiprocessors or multiprocessors)
        object.__setattr__(self, "shared_memory", self.shared_memory or shared_memory)

    def _numbered(self) -> str:
        # By methods of strings, since Dynamo traces this.
        numbered = self.arch[:-1] if "a" <= self.arch[-1] <= "z" else self.arch
        digits = numbered[len("sm_") :]
        if len(digits) not in (2, 3) or not (digits.isascii() and digits.isdecimal()):
            raise ValueError(f"Device: arch must be a string, such as 'sm_90' or 'sm_90a', got {self.arch!r}")
        return numbered


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

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Tiles":
        """Those of a table's row."""
        options = {name: row[name] for name in tables.TILE_OPTIONS if name in row}
        return cls(row["BLOCK_M"], row["BLOCK_N"], row["num_warps"], row["num_stages"], **options)

    def row(self) -> dict[str, int | bool]:
        """The part of a table's row that says what to launch."""
        sizes = (self.rows, self.columns, self.num_warps, self.num_stages)
        options = {name: getattr(self, name) for name in tables.TILE_OPTIONS}
        return dict(zip(tables.TILES, sizes, strict=True)) | {name: value for name, value in options.items() if value}


# In place of the user's own table, if it has been said.
_instead: list[Path | None] = []


@contextlib.contextmanager
def user_table(path: Path | None) -> Iterator[None]:
    """Within the block the user's table is ``path``, or there is none: for tuning, and for tests.

    One that cannot be used then raises BadTable where a kernel is chosen.
    """
    _instead.append(path)
    _forget()
    try:
        yield
    finally:
        _instead.pop()
        _forget()


def _forget() -> None:
    table.cache_clear()
    _listed_tiles.cache_clear()


def files(arch: str, shared_memory: int = 0) -> list[Path]:
    """The tables that the choice on ``arch`` is read from; rows of the first beat those of the next.

    The user's, ours for ``arch``, and ours for its kin: for AMD, for little shared memory, or the defaults.
    """
    # Times of an interpreter decide nothing.
    user = None if arch == INTERPRETER else _instead[-1] if _instead else tables.user_file(arch)
    kin = "gfx942" if arch.startswith("gfx") else "small" if 0 < shared_memory < ROOMY else "defaults"
    ours = [tables.SHIPPED / f"{name}.json" for name in dict.fromkeys((arch, kin))]
    # Whatever stands in the user's place is to be read, or said to be unusable; no folder that may not be looked into.
    there = [user] if user is not None and (_instead or os.path.lexists(user)) else []
    return there + [path for path in ours if path.is_file()]


# Those in the user's cache that have been said to be unusable.
_unusable: set[Path] = set()


def used(arch: str, shared_memory: int = 0) -> list[tuple[Path, dict[str, Any]]]:
    """The tables of ``files`` and where they stand, without one in the user's cache that cannot be used.

    Of that a warning tells, once: a file that is broken must not stop anyone's training.

    Raises:
        BadTable: if a table that was named by :func:`user_table` cannot be used.
    """
    found = []
    for path in files(arch, shared_memory):
        try:
            found.append((path, tables.read(path, arch)))
        except tables.BadTable as error:
            if _instead or path.parent == tables.SHIPPED:
                raise
            if path not in _unusable:
                # Where warnings are errors, as on the command line, it is said every time.
                warnings.warn(tables.BadTable(f"{error}. Until then the tables of this version are used"), stacklevel=2)
                _unusable.add(path)
    return found


@functools.cache
def table(arch: str, shared_memory: int = 0) -> dict[str, Any]:
    """The user's rows for ``arch``, and ours where the user has none.

    Raises:
        BadTable: if a table that was named cannot be used.
    """
    found: dict[str, Any] = {}
    for _, rows in used(arch, shared_memory):
        found = tables.merged(found, rows)
    return found


def is_measured(arch: str) -> bool:
    """Whether tile sizes for ``arch`` come from measurements on it."""
    return "measured_on" in table(arch)


def is_no_slower(arch: str, operation: str) -> bool:
    """Whether the table measured on ``arch`` lists ``operation`` as no slower than torch's own."""
    return is_measured(arch) and operation in table(arch).get("no_slower", ())


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds ``size`` and is at least what a matrix instruction takes."""
    return max(least, 1 << (size - 1).bit_length())


_overrides: dict[str, Tiles] = {}


@contextlib.contextmanager
def overriding(operation: str, tiles: Tiles) -> Iterator[None]:
    """Launches of ``operation`` within the block, in all threads, take ``tiles``, whatever was chosen: for tuning."""
    before = dict(_overrides)
    _overrides[operation] = tiles
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def attention_tiles(operation: str, head_dim: int, dtype_bits: int, device: Device, masked: bool = False) -> Tiles:
    """Tiles for ``operation``, a key of the tables, at the larger of the two head dims.

    A mask takes shared memory and registers of its own: a row's "masked" says what to change for it.
    """
    return _overrides.get(operation) or _listed_tiles(operation, head_dim, dtype_bits, device, masked)


@functools.cache
def _listed_tiles(operation: str, head_dim: int, dtype_bits: int, device: Device, masked: bool) -> Tiles:
    if device.arch == INTERPRETER:
        # Small, so that small test shapes still cross tile borders.
        rows = DECODE_ROWS if operation == "attention_decode" else 32
        return Tiles(rows, columns=16, num_warps=1, num_stages=1)
    rows = table(device.arch, device.shared_memory)[operation]
    rows = [row for row in rows if row["dtype_bits"] == dtype_bits]
    row = min((row for row in rows if row["head_dim"] >= head_dim), key=lambda row: row["head_dim"])
    return Tiles.of(row | row.get("masked", {}) if masked else row)


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
