"""No public name without a test that draws calls of it: the tables stand beside what each subject promises."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import seqcore
from seqcore import diagnostics, distributed, functional, nn, testing

from . import trust

# Public names that no test draws, and why.
NOT_DRAWN = {
    "seqcore.InvalidInput": "raised, and caught wherever arguments are drawn",
    "seqcore.UnsupportedInput": "raised, and caught wherever arguments are drawn",
    "seqcore.Explanation": "made by explain alone, which is drawn",
    "seqcore.functional": "a module, whose names are in the tables",
    "seqcore.nn": "a module, whose names are in the tables",
    "seqcore.distributed.PipelineResult": "made by TimePipeline alone: test_time_pipeline.py",
    "seqcore.testing.Deadlock": "raised by explore",
    "seqcore.testing.check_cell": "draws by itself, of a cell: test_examples.py",
    "seqcore.testing.explore": "draws by itself, schedules: test_explorer.py",
}


def tables() -> dict[str, str]:
    """Each name in the ``DRAWN`` of a subject in ``trust``, to its test."""
    names = (found.name for found in pkgutil.iter_modules(trust.__path__))
    subjects = [importlib.import_module(f"{trust.__name__}.{name}") for name in names]
    return {name: test for subject in subjects for name, test in getattr(subject, "DRAWN", {}).items()}


def public(module) -> list[str]:
    return [f"{module.__name__}.{name}" for name in module.__all__]


@pytest.mark.parametrize(
    "module", [seqcore, nn, functional, diagnostics, distributed, testing], ids=lambda it: it.__name__
)
def test_every_public_name_is_drawn(module):
    assert sorted(set(public(module)) - tables().keys() - NOT_DRAWN.keys()) == []


def test_no_name_is_both_drawn_and_not():
    """And none is left in either table that there is no more."""
    assert not tables().keys() & NOT_DRAWN.keys()
    for name in (*tables(), *NOT_DRAWN):
        module, _, public_name = name.rpartition(".")
        assert public_name in importlib.import_module(module).__all__, name


def decorators(source: str) -> dict[str, set[str]]:
    """Each function of a file, to the names of what is called to decorate it."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    calls = {it.name: [made.func for made in it.decorator_list if isinstance(made, ast.Call)] for it in functions}
    return {name: {ast.unparse(function) for function in made} for name, made in calls.items()}


def test_the_tables_name_tests_that_draw():
    for name, test in tables().items():
        file, _, function = test.partition("::")
        function, _, parameter = function.partition("[")
        source = (Path(__file__).parent / file).read_text()
        assert "drawn" in decorators(source)[function], f"{name}: {test} draws nothing"
        assert not parameter or f'"{parameter.removesuffix("]")}": ' in source, f"{name}: {test} has no such parameter"
