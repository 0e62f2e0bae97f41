"""What no source of ours does: execute data, run a shell, open a connection, or trust a name that can be guessed."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("seqcore", "kernels", "benchmarks")

# Modules that execute what they read, reach beyond this machine, go round Python, or start other programs.
MODULES = {
    "_pickle", "asyncio", "cloudpickle", "code", "codeop", "commands", "ctypes", "cffi", "dbm", "dill", "ftplib",
    "http", "httpx", "imaplib", "joblib", "marshal", "multiprocessing", "pickle", "poplib", "pty", "requests", "runpy",
    "shelve", "smtplib", "socket", "socketserver", "ssl", "subprocess", "telnetlib", "urllib", "urllib3", "webbrowser",
    "xmlrpc", "yaml", "concurrent.futures", "torch.hub", "torch.utils.cpp_extension", "torch.utils.model_zoo",
    "huggingface_hub",
}  # fmt: skip
# Functions of Python's own, and those of modules.
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FUNCTIONS = {
    "os.system", "os.popen", "os.fork", "os.forkpty", "os.startfile", "os.putenv", "tempfile.mktemp", "torch.load",
    "torch.hub.load", "torch.jit.load", "torch.export.load", "importlib.import_module", "importlib.reload",
    "subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load", "numpy.fromfile", "torch.package",
    "torch._inductor.aoti_load_package", "triton.runtime.build",
}  # fmt: skip
STARTED = "a program, by a list of arguments: no shell reads it"
WORKERS = "processes of our own, which are passed what this one made"
NAMES_OF_OURS = "of names that stand in the sources, not of any that are read"

# Where one of these stands all the same, and why it may.
ALLOWED = {
    "seqcore/commands/__init__.py": {"subprocess": STARTED},
    "seqcore/info.py": {"subprocess": STARTED},
    "seqcore/profiling/kernel_tree.py": {"subprocess": STARTED},
    "seqcore/testing/aot_usage.py": {"subprocess": STARTED},
    "seqcore/testing/shares.py": {"subprocess": STARTED},
    "seqcore/testing/aot.py": {
        "multiprocessing": WORKERS, "concurrent.futures": WORKERS, "importlib.import_module": NAMES_OF_OURS,
    },
    "seqcore/tuning/ahead.py": {"multiprocessing": WORKERS, "concurrent.futures": WORKERS},
    "seqcore/cells.py": {"importlib.import_module": "of the names with which a program defines its own cell"},
    "kernels/launch_work.py": {"importlib.import_module": NAMES_OF_OURS},
    "benchmarks/campaign.py": {"subprocess": STARTED},
    "benchmarks/environment.py": {"subprocess": STARTED},
    "benchmarks/stages/importable.py": {"subprocess": STARTED},
    "benchmarks/stages/run_sanitizer.py": {"subprocess": STARTED},
    "benchmarks/study/run.py": {"multiprocessing": WORKERS, "concurrent.futures": WORKERS},
    "benchmarks/study/experiments/__init__.py": {"importlib.import_module": NAMES_OF_OURS},
}  # fmt: skip

STARTERS = {"run", "call", "check_call", "check_output", "Popen"}


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of an attribute of an attribute of a name; nothing of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def modules(node: ast.AST) -> Iterator[str]:
    """What an import imports, and what that is in."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
    if isinstance(node, ast.ImportFrom):
        names = [] if node.level else [node.module, *(f"{node.module}.{name}" for name in names)]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


def starts(node: ast.AST) -> bool:
    """Whether a call starts a program."""
    return isinstance(node, ast.Call) and dotted(node.func) in {f"subprocess.{name}" for name in STARTERS}


def started_by_text(node: ast.Call) -> bool:
    """Whether a program is started by a text, or by a shell, and not by a list of arguments."""
    if any(keyword.arg in ("shell", "executable") or keyword.arg is None for keyword in node.keywords):
        return True
    command = node.args[0] if node.args else None
    return not isinstance(command, ast.List | ast.Name)


def unsafe(tree: ast.AST) -> Iterator[str]:
    """The name of everything in a source that is not to be there."""
    for node in ast.walk(tree):
        yield from MODULES.intersection(modules(node))
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from FUNCTIONS.intersection(f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name in FUNCTIONS or name.startswith(("os.exec", "os.spawn", "os.posix_spawn", "builtins.")):
                yield name
            if name in ("torch.distributed.init_process_group", "tarfile.open"):
                yield name
        if starts(node) and started_by_text(node):
            yield "subprocess by text"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            yield node.arg


def sources() -> dict[str, ast.AST]:
    paths = (path for name in SOURCES for path in (ROOT / name).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def test_no_source_does_what_is_unsafe_without_a_reason():
    found = {path: set(unsafe(tree)) for path, tree in sources().items()}
    assert {path: names for path, names in found.items() if names} == {p: set(names) for p, names in ALLOWED.items()}


def test_every_process_is_started_by_a_list_of_arguments():
    """A name that is passed to subprocess is one that a list was put in, or that a caller makes lists for."""
    given = {"seqcore/testing/shares.py": "own", "benchmarks/campaign.py": "command"}
    seen = Counter()
    for path, tree in sources().items():
        lists = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in filter(starts, ast.walk(tree)):
            seen[path] += 1
            command = node.args[0]
            assert isinstance(command, ast.List) or command.id in lists | {given.get(path)}, path
    assert sum(seen.values()) >= 8, "the walk sees no processes"


UNSAFE = (
    "import pickle", "from pickle import loads", "import os; os.system('x')", "from os import system", "eval('1')",
    "run = exec", "import urllib.request", "from http import client", "torch.load('x')", "__import__('socket')",
    "subprocess.run('ls')", "subprocess.run(f'ls {x}')", "subprocess.run(x, shell=True)", "import yaml",
    "np.load('x', allow_pickle=True)", "tempfile.mktemp()", "os.execv('x', [])", "import concurrent.futures",
    "from concurrent import futures", "from importlib import import_module", "import builtins; builtins.exec('1')",
    "subprocess.run(**options)", "import torch.hub",
)  # fmt: skip


@pytest.mark.parametrize("text", UNSAFE)
def test_the_walk_sees_what_is_unsafe(text):
    assert list(unsafe(ast.parse(text)))


@pytest.mark.parametrize("text", ["model.eval()", "re.compile('a')", "torch.compile(f)", "import json", "x.load()"])
def test_the_walk_sees_nothing_else(text):
    assert not list(unsafe(ast.parse(text)))
