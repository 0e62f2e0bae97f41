"""Which kernels, as they stand, were verified on which GPU, and which wait for one.

    python -m benchmarks.ledger

A kernel was verified by a file of ``seqcore verify --out`` below ``benchmarks/results/`` in which all of its results
are within the error budget and repeatable, and whose hashes of the kernel's source, and of all it imports, are today's.
"""

import ast
import json
import sys
from pathlib import Path

from seqcore.info import kernel_hashes

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT.parent / "kernels"
RESULTS = ROOT / "results"


def kernels() -> dict[str, str]:
    """Every kernel's name and the file, below ``kernels/``, that defines it."""
    found = {}
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found[node.name] = path.relative_to(KERNELS).as_posix()
    return found


def sources(file: str) -> set[str]:
    """``file`` and every file below ``kernels/`` that it imports, directly or not."""
    found, waiting = set(), [file]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        folder = (KERNELS / name).parent
        for node in ast.walk(ast.parse((KERNELS / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder.joinpath(*[".."] * (node.level - 1), *(node.module or "").split("."))
                candidates = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [c.resolve().relative_to(KERNELS).as_posix() for c in candidates if c.is_file()]
    return found


def verified(results: Path = RESULTS) -> dict[str, list[str]]:
    """For each kernel the runs that verified it as it stands: device, dtypes and the file that says so."""
    today = kernel_hashes()
    found: dict[str, list[str]] = {name: [] for name in kernels()}
    for path in sorted(results.rglob("*.json")):
        run = json.loads(path.read_text())
        if "rows" not in run or "kernels" not in run.get("info", {}) or run["info"].get("interpreter"):
            continue
        for name, file in kernels().items():
            rows = [row for row in run["rows"] if name in row["kernel"]]
            same = all(run["info"]["kernels"].get(source) == today[source] for source in sources(file))
            if rows and same and all(row["ok"] for row in rows):
                dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
                found[name].append(f"{run['info']['device']} ({dtypes}; {path.name})")
    return found


def main() -> int:
    """Print the ledger; always 0, since waiting for a GPU is no failure."""
    found = verified()
    width = max(map(len, found))
    for name, runs in found.items():
        print(f"{name:<{width}}  {'; '.join(runs) or 'waits for a GPU'}")
    waiting = sum(not runs for runs in found.values())
    print(f"\n{len(found)} kernels, {len(found) - waiting} verified on a GPU as they stand, {waiting} waiting")
    return 0


if __name__ == "__main__":
    sys.exit(main())
