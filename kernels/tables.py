"""Where the tables of tile sizes stand, the user's and ours, and how the two become one."""

import json
import os
from pathlib import Path
from typing import Any

from . import reading

FORMAT = 1
# Bytes of a table: those of the longest that `seqcore tune` writes, many times over.
MOST_BYTES = 1 << 20
SHIPPED = Path(__file__).resolve().parent / "tuned"

# What the rows of a table hold: of attention's operations, and of recurrences in "shape" and "plan".
TILES = {"BLOCK_M": int, "BLOCK_N": int, "num_warps": int, "num_stages": int}
TILE_OPTIONS = {"persistent": int, "descriptors": bool, "specialize": bool}
SHAPE = {
    "gates": int, "units": int, "blocks": int, "batch": int, "directions": int, "itemsize": int, "backward": bool,
    "parts": int,
}  # fmt: skip
PLAN = {
    "rows": int, "units": int, "tile": int, "fold": int, "stage": int, "chains": int, "num_warps": int, "hold": bool,
    "swap": bool, "padded": bool,
}  # fmt: skip
# The sizes of blocks and how many warps share them.
POWERS_OF_TWO = {"BLOCK_M", "BLOCK_N", "num_warps", "rows", "units", "tile", "fold"}
# The least and the most of each: what the kernels are made for, with room for what a search may try.
RANGES = {
    "dtype_bits": (16, 32), "head_dim": (1, 256), "BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "num_warps": (1, 32),
    "num_stages": (1, 16), "persistent": (0, 16), "rows": (16, 128), "units": (8, 1024), "tile": (16, 1024),
    "fold": (1, 128), "stage": (1, 1024), "chains": (1, 64),
}  # fmt: skip
# Of what a row is for, which is only compared.
ANY_SIZE = (1, 1 << 40)
ATTENTION = ("forward", "decode", "backward_dkdv", "backward_dq", "backward_bias", "weights")
RECURRENCE = "recurrence"
SECTIONS = (*(f"attention_{kernel}" for kernel in ATTENTION), RECURRENCE)


class BadTable(ValueError, RuntimeWarning):
    """A table of tile sizes cannot be used; the message says which file it is, and what to do.

    An error where a table was named, a warning where one in the user's cache is left out.
    """


def cache_folder() -> Path | None:
    """The user's cache: SEQCORE_CACHE, else seqcore in XDG_CACHE_HOME or ~/.cache; None if SEQCORE_CACHE is empty."""
    chosen = os.environ.get("SEQCORE_CACHE")
    if chosen is None:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "seqcore")
    return Path(os.path.expanduser(chosen)) if chosen else None


def user_file(arch: str) -> Path | None:
    """Where the user's table for ``arch`` is, or would be; None if SEQCORE_CACHE is empty."""
    folder = cache_folder()
    return folder and folder / "tuned" / f"{arch}.json"


def read(path: Path, arch: str) -> dict[str, Any]:
    """The table in ``path``, if it is one of ours, or one that ``seqcore tune`` wrote for ``arch``.

    Raises:
        BadTable: if it is anything else.
    """
    try:
        found = reading.strict(reading.content(path, MOST_BYTES))
        fault = None if path.resolve().parent == SHIPPED else _fault(found, arch)
    except (OSError, ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise BadTable(
            f"{path} is no table of tile sizes for {arch}: {fault}. Delete it, or write it anew with "
            "`seqcore tune --force`, or set SEQCORE_CACHE to an empty string to do without"
        )
    return found


def _fault(found: Any, arch: str) -> str | None:
    """What is wrong with a table, or None."""
    if not isinstance(found, dict):
        return f"it holds a {type(found).__name__}, not an object"
    if type(found.get("format")) is not int or found["format"] != FORMAT:
        return f"its format is {_shown(found.get('format'))}, and this version reads {FORMAT}"
    if found.get("arch") != arch:
        return f"it is for {_shown(found.get('arch'))}"
    if unknown := found.keys() - {"format", "arch", *ABOUT, *SECTIONS}:
        return f"it has {_shown(min(unknown))}, which no table of this version has"
    for name, is_one in ABOUT.items():
        if name in found and not is_one(found[name]):
            return f"its {name!r} is {_shown(found[name])}"
    for section in SECTIONS:
        rows = found.get(section, [])
        for row in rows if isinstance(rows, list) else [rows]:
            if not _is_row(section, row):
                return f"a row of {section} reads {_shown(row)}"
    return None


def _shown(value: Any) -> str:
    return json.dumps(value)[:200]


def _is_text(value: Any) -> bool:
    # Nothing that would have a terminal do something.
    return isinstance(value, str) and value.isprintable()


def _is_verdicts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# What a table may have beside its rows, and whether that is what it should be.
ABOUT = {"provenance": _is_text, "measured_on": _is_object, "no_slower": _is_verdicts, "compared": _is_object}


def _is_row(section: str, row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("measured", {}), dict):
        return False
    if section == RECURRENCE:
        shape, plan = (row.get(name) for name in ("shape", "plan"))
        return row.keys() <= {"shape", "plan", "measured"} and _has(shape, SHAPE) and _has(plan, PLAN)
    own = {name: value for name, value in row.items() if name not in ("masked", "measured")}
    masked = row.get("masked", {})
    fields = {"dtype_bits": int, "head_dim": int} | TILES
    return (
        _has(own, fields, TILE_OPTIONS)
        and isinstance(masked, dict)
        and masked.keys() <= TILES.keys() | TILE_OPTIONS.keys()
        and _has(own | masked, fields, TILE_OPTIONS)
    )


def _has(found: Any, fields: dict[str, type], optional: dict[str, type] | None = None) -> bool:
    """Whether there are all ``fields``, perhaps some that are ``optional``, and no others; each as it may be."""
    known = fields | (optional or {})
    if not isinstance(found, dict) or not fields.keys() <= found.keys() <= known.keys():
        return False
    return all(
        type(value) is known[name] and (known[name] is bool or _is_size(name, value, fields is SHAPE))
        for name, value in found.items()
    )


def _is_size(name: str, value: int, only_compared: bool) -> bool:
    """Whether a number is one that kernels can be launched with, or that a shape may have."""
    least, most = ANY_SIZE if only_compared else RANGES[name]
    return least <= value <= most and (only_compared or name not in POWERS_OF_TWO or value & (value - 1) == 0)


def identity(row: dict[str, Any]) -> Any:
    """What a row is for: rows of one section and identity replace each other."""
    return row["shape"] if "shape" in row else (row["dtype_bits"], row["head_dim"])


def rows(table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each row with its section."""
    return [(section, row) for section in SECTIONS for row in table.get(section, [])]


def holds(table: dict[str, Any], section: str, row: dict[str, Any]) -> bool:
    """Whether ``table`` has a row in the place of ``row``."""
    return any(identity(own) == identity(row) for own in table.get(section, []))


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The rows of ``first``, and those of ``second`` that it does not replace; so with what is known of each operation.

    An operation that ``first`` compared with torch's own is no slower if ``first`` says so, whatever ``second`` says.
    """
    both = second | {name: value for name, value in first.items() if name not in SECTIONS}
    for section in SECTIONS:
        others = [row for row in second.get(section, []) if not holds(first, section, row)]
        if found := [*first.get(section, []), *others]:
            both[section] = found
    compared = first.get("compared", {})
    kept = [operation for operation in second.get("no_slower", ()) if operation not in compared]
    both["no_slower"] = sorted({*first.get("no_slower", ()), *kept})
    both["compared"] = second.get("compared", {}) | compared
    return both
