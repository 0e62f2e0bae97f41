"""Files that are written whole or not at all, and read whatever is in them."""

import errno
import os
import stat
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


def replaceable(path: Path) -> Path:
    """Where ``path`` leads in the end, if a file may be written there: asked for before a long run, too.

    Raises:
        OSError: naming ``path``, if what stands there is no regular file.
    """
    end = Path(os.path.realpath(path))
    if os.path.lexists(end) and not stat.S_ISREG(os.lstat(end).st_mode):
        raise OSError(errno.EINVAL, "no regular file, and not to be replaced by one; name another", str(path))
    return end


def write_whole(path: Path, text: str) -> None:
    """Whoever reads ``path`` meanwhile, or after this process was cut short, finds what stood there before.

    A link stays: what it leads to is replaced.

    Raises:
        OSError: if it cannot be written, or what stands there is no regular file.
    """
    end = replaceable(path)
    partial = end.with_name(f"{end.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(end)
