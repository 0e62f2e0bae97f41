"""Tables in Markdown, and numbers in them."""

from collections.abc import Iterable


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and all others to the right, aligned in plain text too."""
    cells = [header, *lines]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(line: list[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(padded)} |"

    return "\n".join([row(header), row(rule), *(row(line) for line in cells[1:])])


def bytes_text(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
