"""Parts of documents that a program writes, between two marks that readers do not see."""

from pathlib import Path


class Marked:
    """What stands in ``document`` between ``<!-- title -->`` and the same with "end"."""

    def __init__(self, title: str, document: Path):
        self.document = document
        self.begin, self.end = f"<!-- {title} -->", f"<!-- {title.partition(':')[0]}: end -->"

    def inside(self) -> str:
        """What stands there now."""
        return self._split()[1]

    def write(self, section: str) -> None:
        """Put ``section`` there."""
        before, _, after = self._split()
        self.document.write_text(f"{before}{self.begin}\n\n{section}\n\n{self.end}{after}")

    def _split(self) -> tuple[str, str, str]:
        """The document before, between and after the marks."""
        before, begin, rest = self.document.read_text().partition(self.begin)
        inside, end, after = rest.partition(self.end)
        if not begin or not end:
            raise ValueError(
                f"{self.document} lacks the marks {self.begin!r} and {self.end!r}; put them where the section belongs"
            )
        return before, inside, after
