"""No public name without a test that draws calls of it: the tables stand beside what each subject promises."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import seqcore
from seqcore import diagnostics, distributed, functional, nn

from . import trust


def tables() -> dict[str, str]:
    """Each name in the ``DRAWN`` of a subject in ``trust``, to its test."""
    names = (found.name for found in pkgutil.iter_modules(trust.__path__))
    subjects = [importlib.import_module(f"{trust.__name__}.{name}") for name in names]
    return {name: test for subject in subjects for name, test in getattr(subject, "DRAWN", {}).items()}


def public(module) -> list[str]:
    return [f"{module.__name__}.{name}" for name in module.__all__]


@pytest.mark.parametrize("module", [seqcore, nn, functional, diagnostics, distributed], ids=lambda it: it.__name__)
def test_every_public_name_is_drawn(module):
    assert sorted(set(public(module)) - tables().keys()) == []


def test_the_tables_name_what_there_is():
    """Public names, and tests that can be found in their files."""
    for name, test in tables().items():
        module, _, public_name = name.rpartition(".")
        assert public_name in importlib.import_module(module).__all__, name
        file, _, function = test.partition("::")
        source = (Path(__file__).parent / file).read_text()
        assert f"def {function.partition('[')[0]}(" in source or not function, f"{name}: {test}"
