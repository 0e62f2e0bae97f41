"""Files that somebody else may have written: read within bounds, without waiting, and as strict JSON."""

import json
import os
import stat
from pathlib import Path
from typing import Any

# Bytes of any file that is read whole: more is no result of ours, and would fill the memory.
MOST_BYTES = 1 << 28
TOO_DEEP = "its values are nested too deep"


def content(path: Path, most: int = MOST_BYTES) -> bytes:
    """What a file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no regular file, or has more than ``most`` bytes.
    """
    # A pipe without a writer would be waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        # Not by the size that the file system states, which files that are made as they are read do not have.
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found


def strict(found: bytes) -> Any:
    """The value of a text in JSON and UTF-8: no NaN, no number beyond a float's range, no name twice in an object.

    Raises:
        ValueError: if it is none, or nested deeper than can be read.
    """
    try:
        return json.loads(
            found.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_refused
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def lenient(found: bytes) -> Any:
    """The value of what Python's own writer of JSON wrote, which may hold NaN. Raises ValueError if there is none."""
    try:
        return json.loads(found)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} stands there twice")
        found[name] = value
    return found


def _finite(number: str) -> float:
    value = float(number)
    return _refused(number) if value in (float("inf"), float("-inf")) else value


def _refused(number: str) -> float:
    raise ValueError(f"{number[:20]} is no number that JSON has")
