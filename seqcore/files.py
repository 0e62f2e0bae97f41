"""Files that are written whole or not at all, and read whatever is in them."""

import os
from pathlib import Path
from typing import Any

from .kernels import reading


def read_json(path: Path) -> Any:
    """What a result holds that one of our tools wrote, if it did.

    Raises:
        OSError: if there is no such file.
        ValueError: naming the file, if it holds something else.
    """
    try:
        return reading.lenient(reading.content(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """Whoever reads ``path`` meanwhile, or after this process was cut short, finds what stood there before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
