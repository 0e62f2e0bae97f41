"""Where the tables of tile sizes stand, the user's and ours, and how the two become one."""

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
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
ATTENTION = ("forward", "decode", "backward_dkdv", "backward_dq", "backward_bias", "weights")
RECURRENCE = "recurrence"
SECTIONS = (*(f"attention_{kernel}" for kernel in ATTENTION), RECURRENCE)


class BadTable(ValueError):
    """The user's table cannot be read; the message says which file it is and what to do."""


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
        found = json.loads(path.read_text(encoding="utf-8"))
        fault = None if path.resolve().parent == SHIPPED else _fault(found, arch)
    except (OSError, ValueError) as error:
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
    if found.get("format") != FORMAT:
        return f"its format is {found.get('format')!r}, and this version reads {FORMAT}"
    if found.get("arch") != arch:
        return f"it is for {found.get('arch')!r}"
    for name, kind in (("measured_on", dict), ("no_slower", list), ("compared", dict)):
        if not isinstance(found.get(name, kind()), kind):
            return f"its {name!r} is no {kind.__name__}"
    for section in SECTIONS:
        rows = found.get(section, [])
        for row in rows if isinstance(rows, list) else [rows]:
            if not _is_row(section, row):
                return f"a row of {section} reads {json.dumps(row)[:200]}"
    return None


def _is_row(section: str, row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    if section == RECURRENCE:
        return _has(row.get("shape"), SHAPE) and _has(row.get("plan"), PLAN) and _launches(row["plan"])
    masked = row.get("masked", {})
    if not isinstance(masked, dict) or not _has(row, {"dtype_bits": int, "head_dim": int} | TILES):
        return False
    every = row | masked
    options = all(type(every.get(name, kind())) is kind for name, kind in TILE_OPTIONS.items())
    return options and _has(every, TILES) and _launches(row) and _launches(every)


def _has(found: Any, fields: dict[str, type]) -> bool:
    """Whether all ``fields`` are there, of the type they should be, and every number a size."""
    return isinstance(found, dict) and all(
        type(found.get(name)) is kind and (kind is bool or found[name] > 0) for name, kind in fields.items()
    )


def _launches(sizes: dict[str, Any]) -> bool:
    """Whether blocks are such that Triton takes them."""
    return all(sizes[name] & (sizes[name] - 1) == 0 for name in POWERS_OF_TWO & sizes.keys())


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
