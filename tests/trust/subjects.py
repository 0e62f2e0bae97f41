"""The subjects, in the order in which docs/trust.md has them."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .kinds import Guard, Promise

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "fuzzing_recurrence": "Recurrences, whatever they are given",
    "fuzzing_attention": "Attention and the tools, whatever they are given",
    "peers": "Known bugs of others",
    "memory": "Memory",
    "limits": "Sizes and their limits",
    "concurrency": "Several at once",
    "numerics": "Numbers",
    "determinism": "The same bits again",
    "surroundings": "Other GPUs, none, and other versions",
    "supply": "Files, network and installation",
}


@dataclass(frozen=True)
class Subject:
    title: str
    promises: list[Promise]
    guards: list[Guard]


def subjects() -> dict[str, Subject]:
    """Every subject by name, from the module of that name beside this file."""
    modules = {name: importlib.import_module(f".{name}", __package__) for name in TITLES}
    return {name: Subject(TITLES[name], module.PROMISES, module.GUARDS) for name, module in modules.items()}


def named_tests(promises: Iterable[Promise]) -> list[str]:
    """Every test that is named, without parameters, once; not those of a file that is named as a whole."""
    named = sorted({test.partition("[")[0] for promise in promises for test in promise.tests})
    return [test for test in named if "::" not in test or test.partition("::")[0] not in named]
