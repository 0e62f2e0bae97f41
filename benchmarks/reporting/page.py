"""The report as one HTML file that needs no other: its Markdown rendered, its plots inlined as SVG.

Rendered is the Markdown that the reports are written in and no more: headings, paragraphs, lists and tables of one
level, figures (an image and below it its caption), **bold**, *emphasis*, [links](to) and `code`; blocks are parted by
empty lines.
"""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

# Colours of plots that follow the page's, light or dark.
INK, GRID = "#222222", "#e4e4e4"

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #5f6368; --grid: #e4e4e4; --stripe: #f6f7f8;
  --link: #0060a0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e3e3; --paper: #16181b; --faint: #9aa0a6; --grid: #3a3d41;
  --stripe: #1e2125; --link: #7ab8e8 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2em 0 .6em }
h1 { font-size: 1.9rem; margin-top: .5em } h2 { font-size: 1.45rem; border-bottom: 1px solid var(--grid) }
h3 { font-size: 1.15rem } h4 { font-size: 1rem; margin-bottom: .3em }
p, li { max-width: 46rem } li { margin: .3em 0 } ul { padding-left: 1.2rem }
a { color: var(--link) }
nav { columns: 18rem; font-size: .9rem; margin: 1.5rem 0; padding: .8rem 1rem; background: var(--stripe) }
nav ul { list-style: none; margin: 0; padding: 0 } nav .h3 { padding-left: 1rem }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--grid) }
th { border-bottom-width: 2px } .number { text-align: right } tbody tr:nth-child(even) { background: var(--stripe) }
figure { margin: 1.5rem 0 2.5rem } figcaption { max-width: 54rem; font-size: .88rem; color: var(--faint) }
figcaption b { color: var(--ink) }
svg { display: block; width: 100%; min-width: 38rem; height: auto; color: var(--ink) }
svg * { stroke-linejoin: round; stroke-linecap: butt }
code { font-family: ui-monospace, monospace; font-size: .9em }
@media print { body { max-width: none; padding: 0; font-size: 10pt } nav { display: none } svg { min-width: 0 }
  figure, tr { break-inside: avoid } h2, h3, h4 { break-after: avoid } .scroll { overflow: visible }
  table { font-size: 6.5pt } th, td { padding: .1rem .3rem; white-space: normal } }
"""
CODE = re.compile(r"`([^`]+)`")
BOLD = re.compile(r"\*\*(.+?)\*\*")
EMPHASIS = re.compile(r"(?<![\w*])\*(?=\S)([^*]+)\*(?!\w)")
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
FIGURE = re.compile(r"!\[(?P<title>.*?)\]\((?P<file>[^)]+)\)\n(?P<caption>.*)", re.DOTALL)


@dataclass(frozen=True)
class Plot:
    """One plot of a report: the file that Markdown refers to, and what HTML shows in its place."""

    path: Path
    title: str
    caption: str
    svg: str


def render(markdown: str, plots: list[Plot]) -> str:
    """The whole page."""
    pictures = {plot.path.name: plot.svg for plot in plots}
    headings: list[tuple[int, str, str]] = []
    body = [_block(block, pictures, headings) for block in re.split(r"\n\s*\n", markdown.strip())]
    title = next((text for level, _, text in headings if level == 1), "Report")
    # Behind the title, in front of all else.
    body.insert(1, _contents(headings))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _block(block: str, pictures: dict[str, str], headings: list[tuple[int, str, str]]) -> str:
    if found := re.fullmatch(r"(#+) (.*)", block):
        level, text = len(found[1]), inline(found[2])
        headings.append((level, f"s{len(headings)}", text))
        return f'<h{level} id="{headings[-1][1]}">{text}</h{level}>'
    if found := FIGURE.fullmatch(block):
        return _figure(found["title"], found["caption"], pictures[found["file"]], found["file"])
    lines = block.split("\n")
    if block.startswith("|"):
        return _table(lines)
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{inline(line.removeprefix('- '))}</li>" for line in lines) + "</ul>"
    return f"<p>{inline(block)}</p>"


def inline(text: str) -> str:
    """Escaped, with its emphasis; what is code is nothing else."""
    parts = CODE.split(text)
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else _emphasised(part) for i, part in enumerate(parts))


def _emphasised(text: str) -> str:
    linked = LINK.sub(r'<a href="\2">\1</a>', escape(text, quote=False))
    return EMPHASIS.sub(r"<em>\1</em>", BOLD.sub(r"<b>\1</b>", linked))


def _contents(headings: list[tuple[int, str, str]]) -> str:
    shown = [heading for heading in headings if heading[0] in (2, 3)]
    lines = "".join(f'<li class="h{level}"><a href="#{name}">{text}</a></li>' for level, name, text in shown)
    return f'<nav aria-label="Contents"><ul>{lines}</ul></nav>'


def _table(lines: list[str]) -> str:
    header, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    looks = [' class="number"' if cell.endswith(":") else "" for cell in rule]

    def line(cells: list[str], tag: str) -> str:
        found = (f"<{tag}{look}>{inline(cell)}</{tag}>" for cell, look in zip(cells, looks, strict=True))
        return f"<tr>{''.join(found)}</tr>"

    head, body = line(header, "th"), "\n".join(line(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def _figure(title: str, caption: str, svg: str, file: str) -> str:
    name = re.sub(r"\W", "-", file.partition(".")[0])
    label = f'<svg role="img" aria-label="{escape(title)}" '
    picture = inline_svg(svg, name).replace("<svg ", label, 1)
    return (
        f'<figure id="{name}"><div class="scroll">{picture}</div>\n'
        f"<figcaption><b>{inline(title)}.</b> {inline(caption.strip('*'))}</figcaption></figure>"
    )


def inline_svg(svg: str, prefix: str) -> str:
    """matplotlib's SVG as a part of a page: ids that no other has, and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
