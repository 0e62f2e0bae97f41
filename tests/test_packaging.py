"""What is installed, under which names, and who may import whom."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import seqcore

from .distributions import INSTALL, ROOT, SOURCES, copied, run, wheel_of

# --- the wheel ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the sources."""
    pytest.importorskip("setuptools", minversion="70.1", reason="older ones cannot build a wheel by themselves")
    copy = copied(tmp_path_factory.mktemp("sources"))
    return wheel_of(copy, copy)


def test_wheel_holds_every_source_file_under_seqcore(wheel):
    expected = set()
    for path in (p for name in SOURCES for p in (ROOT / name).rglob("*")):
        if path.suffix in (".py", ".json", ".typed") and "__pycache__" not in path.parts:
            inside = path.relative_to(ROOT).as_posix()
            expected.add(f"seqcore/{inside}" if inside.startswith("kernels/") else inside)
    assert any(name.startswith("seqcore/kernels/tuned/") for name in expected)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_has_one_top_level_name(wheel):
    archive = zipfile.ZipFile(wheel)
    top_level = next(name for name in archive.namelist() if name.endswith("top_level.txt"))
    assert archive.read(top_level).decode().split() == ["seqcore"]


def test_installed_wheel_imports_and_leaves_the_name_kernels_alone(wheel, tmp_path):
    site = tmp_path / "site"
    run(*INSTALL, "--target", site, wheel, cwd=tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
import importlib.util
import seqcore
import seqcore.kernels.tuning as tuning
print(seqcore.__file__)
print(tuning.__file__)
print(len(tuning.table("sm_90")) > 0)
top_level = importlib.util.find_spec("kernels")
print(top_level and top_level.origin)
"""
    package, kernels, table, top_level = run(sys.executable, "-c", script, cwd=tmp_path).split()
    assert package == str(site / "seqcore" / "__init__.py")
    assert kernels == str(site / "seqcore" / "kernels" / "tuning.py")
    assert table == "True"
    assert not top_level.startswith((str(site), str(ROOT))), "another package owns this name"


def test_version_is_stated_alike():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert seqcore.__version__ == stated == importlib.metadata.version("seqcore")


def test_every_requirement_is_pinned():
    pins = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([a-z0-9-]+)==[0-9][0-9a-z.]*(; python_version [<>=]+ \"3\.\d+\")?", line)
            assert pin, f"not an exact pin: {line!r}"
            pins.add(pin[1])
    required = importlib.metadata.requires("seqcore")
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in required}
    assert names <= pins, f"not pinned: {names - pins}"


# --- who imports whom -----------------------------------------------------------------------------------------

# Imports run from the left to the right and never back; what shares a place does not import its neighbour.
LAYERS = (
    ("replacement",), ("integrations", "sdpa", "truncation", "distributed", "diagnostics"), ("nn",), ("functional",),
    ("autograd",), ("ops",), ("reference", "backends"), ("capabilities",), ("kernels", "errors"),
)  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute names of all that a file imports, lazily or not; ``package`` is the package it is in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *((node.module or "").split(".") if node.module else ()))
            yield from (".".join((*module, alias.name)) for alias in node.names)


def files() -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """(layer, file, its package) of every source file in a layer."""
    for path in (p for name in SOURCES for p in (ROOT / name).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = parts if parts[0] == "seqcore" else ("seqcore", *parts)
        if len(module) > 1 and module[1] in RANK:
            yield module[1], path, module[:-1]


def test_imports_run_one_way():
    backward = []
    for layer, path, package in files():
        for name in imports(path, package):
            parts = name.split(".")
            if parts[0] != "seqcore" or len(parts) < 2 or parts[1] not in RANK or parts[1] == layer:
                continue
            if RANK[parts[1]] <= RANK[layer]:
                backward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not backward, "\n".join(backward)


def test_the_walk_sees_every_layer_and_its_imports():
    seen = {layer: set() for layer in RANK}
    for layer, path, package in files():
        seen[layer].update(imports(path, package))
    assert all(seen[layer] for layer in RANK if layer != "errors"), "a layer with no imports was not read"
    assert any(name.startswith("seqcore.autograd") for name in seen["functional"])


def test_kernels_import_nothing_but_triton():
    allowed = {"triton", *sys.stdlib_module_names}
    foreign = []
    for layer, path, package in files():
        if layer == "kernels":
            outside = (name for name in imports(path, package) if not name.startswith("seqcore.kernels."))
            foreign += [f"{path.relative_to(ROOT)}: {name}" for name in outside if name.split(".")[0] not in allowed]
    assert not foreign, "\n".join(foreign)


# --- what an import costs -------------------------------------------------------------------------------------


def test_import_brings_in_no_triton_and_touches_no_gpu(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import seqcore, seqcore.nn
print(*sorted(set(sys.modules) - before))
print(torch.cuda.is_initialized())
"""
    brought, initialised = run(sys.executable, "-c", script, cwd=tmp_path).splitlines()
    roots = {name.split(".")[0] for name in brought.split()}
    assert "seqcore" in roots
    assert not roots & {"triton", "benchmarks", "matplotlib", "pytest", "tqdm", "transformers", "torchrl", "tensordict"}
    unwanted = ("torch.distributed.tensor", "seqcore.diagnostics")
    assert not [name for name in brought.split() if name.startswith(unwanted)]
    assert initialised == "False"


def test_import_time_is_printed(tmp_path):
    done = subprocess.run(
        (sys.executable, "-X", "importtime", "-c", "import torch, seqcore"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    own = re.search(r"^import time:\s+\d+ \|\s+(\d+) \| seqcore$", done.stderr, re.MULTILINE)
    assert own, done.stderr[-2000:]
    print(f"import seqcore, beyond torch: {int(own[1]) / 1000:.0f} ms")
