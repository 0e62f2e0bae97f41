"""How tests reach the benchmarks, which are no part of the package."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqcore.devices import INTERPRETED

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    """A module of the benchmarks, without the repository's root on sys.path: there `kernels` would shadow another
    distribution's for all other tests."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")


def needs_pytest_benchmark() -> None:
    """Skip the whole module where that is not installed."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


def not_interpreted(reason: str = "no kernel is run here: an interpreted process has nothing to add") -> None:
    """Skip the whole module in a process that interprets kernels."""
    if INTERPRETED:
        pytest.skip(reason, allow_module_level=True)


def start_python(*arguments: str) -> subprocess.Popen:
    """A process in the checkout, with one output."""
    # One thread: beside other tests, threads that wait for each other take a hundred times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **output)


def run_python(*arguments: str) -> str:
    """What it printed, having ended well."""
    process = start_python(*arguments)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return printed
