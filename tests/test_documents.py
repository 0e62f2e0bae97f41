"""Documents name what there is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_and_file_that_is_named_exists(document):
    # Without what stands in brackets behind a test's name: its parameters.
    text = re.sub(r"\b(test_\w+)\[[^\]\n]*\]", r"\1", document.read_text())
    defined = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"\btest_\w+\b(?!\.py|\*)", text))
    files = {path.name for folder in ("tests", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    assert named <= defined, f"no such tests: {named - defined}"
    assert set(re.findall(r"\btest_\w+\.py\b", text)) <= files
    for link in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"(`+).*?\1", "", text)):
        assert (document.parent / link).exists(), f"no such file: {link}"


def test_compatibility_names_a_test_in_every_row():
    rows = [line for line in (ROOT / "docs" / "compatibility.md").read_text().splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("|---", "| feature", "| tool"))]
    assert len(rows) > 15 and all("`test_" in row for row in rows)


def test_diagnostics_prints_what_its_page_says(capsys):
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / "diagnostics.md").read_text(), re.DOTALL)
    exec("".join(block for language, block in blocks if language == "python"), {"__name__": "page"})
    shown = "".join(block for language, block in blocks if not language)
    # Digits are those of one version of torch on one machine.
    words = lambda text: re.sub(r"\s*-?[\d.]+(e[+-]\d+)?", " 0", text)
    assert words(capsys.readouterr().out) == words(shown)
