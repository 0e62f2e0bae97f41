"""What a long run has finished, line by line, so that a run which begins again loses nothing."""

import contextlib
import errno
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .files import replaceable
from .kernels import reading

T = TypeVar("T")


class Journal:
    """A file of JSON lines, one for each thing finished; what stands there under the same key need not be done again.

    Args:
        path: the file; it need not exist yet. Several journals, also of several processes, may share it.
        key: what results depend on: sources, versions, device. Lines of another key are not read.
        kind: tells these lines from those of other kinds of things in the same file.
    """

    def __init__(self, path: Path, key: str, kind: str):
        self.path, self.key, self.kind = path, key, kind
        self.done: dict[str, Any] = {}
        self._begun: set[str] = set()
        for entry in lines(path):
            if (entry["key"], entry["kind"]) != (key, kind):
                continue
            if "value" in entry:
                self.done[entry["name"]] = entry["value"]
            self._begun.add(entry["name"])
        written = path.read_bytes() if path.exists() else b""
        if written and not written.endswith(b"\n"):
            # Whoever wrote was cut short; the next line must not continue that one.
            self._append("\n")

    def __contains__(self, name: str) -> bool:
        return name in self.done

    @property
    def suspects(self) -> set[str]:
        """What was begun and never finished: it may have hung or crashed, and is better left to the end."""
        return self._begun - self.done.keys()

    def suspects_last(self, items: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
        """The items, in their order but for those whose ``name`` is suspect."""
        suspects = self.suspects
        return sorted(items, key=lambda item: name(item) in suspects)

    def begin(self, name: str) -> None:
        """Note that ``name`` is about to run."""
        self._append(json.dumps({"key": self.key, "kind": self.kind, "name": name}) + "\n")

    def add(self, name: str, value: Any) -> None:
        """Note that ``name`` is finished and what came out, which JSON must be able to hold."""
        self.done[name] = value
        self._append(json.dumps({"key": self.key, "kind": self.kind, "name": name, "value": value}) + "\n")

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one piece, so that lines of several processes do not run into each other.
        with self.path.open("ab", buffering=0) as file:
            file.write(text.encode())


def lines(path: Path) -> list[dict[str, Any]]:
    """Every entry of a journal, whatever its key and kind; a line that was cut short, or is no entry, is none.

    Raises:
        OSError: if the file cannot be read, or is none that can hold lines.
    """
    try:
        found = reading.content(path).splitlines() if path.exists() else ()
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no journal, for {error}; name another file", str(path)) from None
    entries = []
    for line in found:
        with contextlib.suppress(ValueError):
            entry = reading.lenient(line)
            if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("key", "kind", "name")):
                entries.append(entry)
    return entries


def discard(path: Path) -> None:
    """Delete a journal, if there is one; of a link, what it leads to.

    Raises:
        OSError: naming ``path``, if what stands there is none: it is not empty, and no line is an entry.
    """
    end = replaceable(path)
    if not end.exists():
        return
    if end.stat().st_size and not lines(path):
        raise OSError(errno.EINVAL, "no journal, and not to be deleted as one; name another file", str(path))
    end.unlink()


def forget(path: Path, unwanted: Callable[[str, str], bool]) -> None:
    """Take every entry from a journal of which ``unwanted(kind, name)`` is true."""
    kept = [entry for entry in lines(path) if not unwanted(entry["kind"], entry["name"])]
    if path.exists():
        # Into the same file: a campaign's lock is on it, and on none that took its place.
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
