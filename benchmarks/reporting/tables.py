"""Tables in Markdown, and numbers in them."""

from collections.abc import Iterable

from benchmarks.rows import Row


def table(header: list[str], lines: Iterable[list[str]], words: bool = False, aligned: bool = True) -> str:
    """A Markdown table, its first column to the left and, unless they are words, all others to the right.

    Its source is ``aligned`` like the table; where cells hold sentences, that makes it no easier to read.
    """
    cells = [header, *lines]
    widths = [max(3, *(len(line[i]) for line in cells)) if aligned else 0 for i in range(len(header))]
    rule = ["-" * max(3, widths[0]), *("-" * max(2, width - 1) + ("-" if words else ":") for width in widths[1:])]

    def row(line: list[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        padded = [first[0].ljust(first[1])]
        padded += [text.ljust(width) if words else text.rjust(width) for text, width in others]
        return f"| {' | '.join(padded)} |"

    return "\n".join([row(header), row(rule), *(row(line) for line in cells[1:])])


def bytes_text(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def absent_lines(rows: list[Row]) -> list[str]:
    """Which peers did not take part in what, and why."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for name, reason in row.info.get("absent", {}).items():
            found.setdefault((name, reason), []).append(row)
    return [
        f"- {name}, {'everywhere' if len(without) == len(rows) else _where(without)}: {reason}"
        for (name, reason), without in sorted(found.items(), key=lambda item: item[0])
    ]


def _where(rows: list[Row]) -> str:
    return f"{len(rows)} rows ({', '.join(dict.fromkeys(row.info['sweep'] for row in rows))})"
