"""What a long run has finished, line by line, so that a run which begins again loses nothing."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines, one for each thing finished; what stands there under the same key need not be done again.

    Args:
        path: the file; it need not exist yet. Several journals, also of several processes in turn, may share it.
        key: what results depend on: sources, versions, device. Lines of another key are not read.
        kind: tells these lines from those of other kinds of things in the same file.
    """

    def __init__(self, path: Path, key: str, kind: str):
        self.path, self.key, self.kind = path, key, kind
        self.done: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            entry = _parsed(line)
            if (entry.get("key"), entry.get("kind")) == (key, kind):
                self.done[entry["name"]] = entry["value"]
        if text and not text.endswith("\n"):
            # Whoever wrote was cut short; the next line must not continue that one.
            self._append("\n")

    def __contains__(self, name: str) -> bool:
        return name in self.done

    def add(self, name: str, value: Any) -> None:
        """Note that ``name`` is finished and what came out, which JSON must be able to hold."""
        self.done[name] = value
        self._append(json.dumps({"key": self.key, "kind": self.kind, "name": name, "value": value}) + "\n")

    def _append(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def _parsed(line: str) -> dict[str, Any]:
    """The entry on a line, or nothing if it was cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
