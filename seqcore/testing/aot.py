"""Compile every kernel ahead of time, for GPUs that are not here, and judge what came out.

    python -m seqcore.testing.aot [--full] [--out FILE] [--jobs N] [--kernel SUBSTRING] [--target T] [--record]
    python -m seqcore.testing.aot --probe

Triton's wheel brings the assemblers, so no GPU and no CUDA toolkit is needed. Each row of the report says what one
kernel in one configuration takes of one target: shared memory, registers, spills, matrix instructions. The exit
status is 1 if anything does not compile, does not fit, or spills more than its recorded budget.

Budgets are for configurations that could not be had without spills. ``--full --record`` raises them to what was
found and never lowers one, since versions of Triton differ; to lower them, delete the file and record each version.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..devices import INTERPRETED
from ..files import replaceable, write_whole
from ..kernels.tuning import TYPICAL
from .aot_attention import probes
from .aot_catalogue import catalogue, covering
from .aot_entry import SPILL_BUDGETS, TARGETS, Entry, Function, spill_budgets
from .aot_usage import allocations_above_loop, resources
from .shares import cores

# Most shared memory, in bytes, that one program may use.
SHARED_LIMIT = {target: shared_memory for target, (_, shared_memory) in TYPICAL.items()}
# Columns of tensor memory on sm_100.
TENSOR_MEMORY_LIMIT = 512

Row = dict[str, Any]


def gpu_target(name: str):
    """Triton's description of a target named "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def resolve(function: Function):
    """The Triton function that ``function`` names."""
    module, _, name = function.path.partition(":")
    return getattr(importlib.import_module(f"seqcore.kernels.{module}"), name)


def specialised_source(entry: Entry):
    """``entry`` as Triton's compiler takes it, specialised as a launch with these arguments would be.

    That is: tensors are aligned to 16 bytes, and for AMD smaller than 2 GiB; an integer that is 1 becomes a constant,
    as None does, and one that divides by 16 is marked so, unless the kernel forbids it.
    """
    from triton.compiler import ASTSource

    kernel = resolve(entry.kernel)
    signature, constants, attributes = {}, {}, {}
    tensor = [["tt.divisibility", 16]] + ([] if entry.target.startswith("sm_") else [["tt.pointer_range", 32]])
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            value = entry.constants[name]
            signature[name], constants[(index,)] = "constexpr", resolve(value) if isinstance(value, Function) else value
        else:
            specialise = not parameter.do_not_specialize
            signature[name] = _specialised(entry.arguments[name], specialise, (index,), tensor, constants, attributes)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _specialised(
    value: Any, specialise: bool, path: tuple[int, ...], tensor: list, constants: dict, attributes: dict
) -> Any:
    """The type of one argument, or of a tuple of them; constants and alignments go into the two dictionaries.

    ``tensor`` holds the attributes of a pointer.
    """
    import triton

    if isinstance(value, tuple):
        # Triton asks nobody whether to specialise what is inside a tuple.
        types = [_specialised(one, True, (*path, i), tensor, constants, attributes) for i, one in enumerate(value)]
        return type(value)(*types)
    if isinstance(value, triton.language.constexpr):
        constants[path] = value.value
        return "constexpr"
    if value is None or (value == 1 and isinstance(value, int) and specialise):
        constants[path] = value
        return "constexpr"
    if isinstance(value, str):
        if value.startswith("*"):
            attributes[path] = tensor
        return value
    if isinstance(value, float):
        return "fp32"
    if specialise and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def blank_row(entry: Entry) -> Row:
    """What is known of ``entry`` before it is compiled."""
    import triton

    return {
        "kernel": entry.name,
        "configuration": entry.configuration,
        "variant": entry.variant,
        "target": entry.target,
        "triton": triton.__version__,
        "shared": None,
        "registers": None,
        "spills": None,
        "budget": entry.spill_budget,
        "mma": {},
        "hash": None,
        "compile_s": None,
        "ok": False,
        "error": None,
    }


def compile_entry(entry: Entry) -> Row:
    """One row of the report. Whatever goes wrong is in it, under ``error``.

    ``compile_s`` is None where Triton's cache had what it would have compiled, of which ``hash`` is the name.
    """
    import triton

    row = blank_row(entry)
    try:
        # A failing assembler prints the whole program.
        with contextlib.redirect_stdout(io.StringIO()), triton.knobs.compilation.scope():
            cached = []
            triton.knobs.compilation.listener = lambda *, cache_hit, **_: cached.append(cache_hit)
            began = time.perf_counter()
            compiled = triton.compile(
                specialised_source(entry),
                target=gpu_target(entry.target),
                options={"num_warps": entry.num_warps, "num_stages": entry.num_stages, **_watched()},
            )
            seconds = round(time.perf_counter() - began, 2)
        row |= {"hash": compiled.hash, "compile_s": None if any(cached) else seconds} | resources(compiled)
        error = violation(row) or broken_promise(entry, compiled, row)
    except Exception as exception:
        error = _innermost(exception)
    return row | {"ok": error is None, "error": error}


def _watched() -> dict[str, bool]:
    """As launches of kernels that wait have it with SEQCORE_DEBUG=1; else nothing."""
    from ..kernels import grid

    return grid.LAUNCH_OPTIONS


def _innermost(exception: BaseException) -> str:
    """The cause the compiler names last: the outer ones only say where it was called from."""
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {exception}".strip()


def violation(row: Row) -> str | None:
    """What is wrong with a kernel that did compile, or None."""
    limit = SHARED_LIMIT[row["target"]]
    if row["shared"] > limit:
        return f"takes {row['shared']} bytes of shared memory; {row['target']} allows {limit}"
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        return f"takes {row['tensor_memory']} columns of tensor memory; there are {TENSOR_MEMORY_LIMIT}"
    if row["spills"] > row["budget"]:
        return f"spills {row['spills']} bytes a thread; its recorded budget is {row['budget']}"
    return None


def broken_promise(entry: Entry, compiled, row: Row) -> str | None:
    """What ``entry`` says of its program that is not so, or None."""
    above = allocations_above_loop(compiled.asm["ttgir"])
    if above < entry.stationary:
        return f"holds {above} tiles in shared memory before the time loop, not all {entry.stationary} of the weights"
    if entry.instruction is not None and entry.instruction not in row["mma"]:
        return f"uses {' and '.join(row['mma']) or 'no matrix instruction'}, not {entry.instruction}"
    return None


def compile_all(entries: list[Entry], jobs: int) -> Iterator[Row]:
    """Rows of ``entries`` as they are done.

    A compiler that crashes takes its process with it, and the pool. What was left is then compiled in two halves,
    and so on, until the culprit is alone: it gets a row that says so, and nothing else is lost.
    """
    left = dict(enumerate(entries))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_entry, entry): index for index, entry in left.items()}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                del left[futures[future]]
                yield future.result()
    if left and len(entries) == 1:
        yield blank_row(entries[0]) | {"error": "the compiler crashed"}
    elif left:
        remaining = list(left.values())
        middle = (len(remaining) + 1) // 2
        yield from compile_all(remaining[:middle], jobs)
        yield from compile_all(remaining[middle:], jobs)


def probe(jobs: int) -> int:
    """Say of each configuration that only some versions of Triton compile whether this one does; 0."""
    import triton

    print(f"Triton {triton.__version__}, warps with roles of their own:")
    for row in compile_all(probes(), jobs):
        if row["registers"] is None:
            verdict = "does not compile"
        else:
            verdict = "compiles" if row["specialised"] else "compiles, but gives no warp a role"
        print(f"  {row['target']:<7} {row['configuration']:<55} {verdict}")
    return 0


def known_times(out: Path) -> dict[str, float]:
    """How long each program took to compile, by its hash, as far as the rows in ``out`` tell."""
    try:
        rows = json.loads(out.read_text())
        return {row["hash"]: row["compile_s"] for row in rows if row["compile_s"] is not None}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def record(rows: list[Row]) -> None:
    """Raise the recorded spill budgets to what ``rows`` spill, and judge those again."""
    budgets = spill_budgets()
    for row in rows:
        if row["spills"]:
            variants = budgets.setdefault(row["target"], {}).setdefault(row["kernel"], {})
            row["budget"] = variants[row["variant"]] = max(row["spills"], variants.get(row["variant"], 0))
            row["error"] = violation(row)
            row["ok"] = row["error"] is None
    SPILL_BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")


# --- command line --------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """``rows`` for a terminal, failures with their reasons last."""
    columns = ("kernel", "configuration", "target", "shared", "regs", "spills", "budget", "matrix", "compile s", "")
    lines = [columns]
    for row in rows:
        matrix = " ".join(f"{count} {name}" for name, count in row["mma"].items())
        values = (row["kernel"], row["configuration"], row["target"], row["shared"], row["registers"], row["spills"],
                  row["budget"], matrix, row["compile_s"], "ok" if row["ok"] else "FAILED")  # fmt: skip
        lines.append(tuple("-" if value is None else str(value) for value in values))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [name in ("shared", "regs", "spills", "budget", "compile s") for name in columns]
    text = [
        "  ".join(
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    failed = [row for row in rows if not row["ok"]]
    text += [f"\n{row['kernel']} {row['configuration']} {row['target']}:\n  {row['error']}" for row in failed]
    return "\n".join(text)


def show_progress(done: int, total: int, row: Row) -> None:
    """One line that is drawn over on a terminal, one line a row elsewhere."""
    name = f"{row['kernel']} {row['configuration']} {row['target']}"
    if not sys.stderr.isatty():
        print(f"[{done}/{total}] {name} {'ok' if row['ok'] else 'FAILED'}", file=sys.stderr, flush=True)
        return
    bar = "#" * (20 * done // total)
    end = "\n" if done == total else ""
    print(f"\r\033[K[{bar:<20}] {done}/{total} {name[:60]}", end=end, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, write the rows; 1 if any of them failed."""
    parser = argparse.ArgumentParser(prog="python -m seqcore.testing.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every configuration, not only a covering subset")
    parser.add_argument("--out", type=Path, default=Path("build/aot.json"), help="where the rows go, as JSON")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes to compile in")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--record", action="store_true", help="raise the spill budgets to what is found")
    parser.add_argument("--target", choices=TARGETS, help="only this target")
    parser.add_argument("--probe", action="store_true", help="only try what no table asks for: warp specialisation")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    if options.probe:
        return probe(max(1, options.jobs))
    try:
        replaceable(options.out)
    except OSError as error:
        parser.error(f"--out: {error}")

    entries = [
        entry for entry in catalogue() if options.kernel in entry.name and options.target in (None, entry.target)
    ]
    if not entries:
        parser.error(f"no kernel is called *{options.kernel}*")
    if not options.full:
        entries = covering(entries)

    began = time.perf_counter()
    rows, times = [], known_times(options.out)
    for row in compile_all(entries, max(1, options.jobs)):
        if row["compile_s"] is None:
            row["compile_s"] = times.get(row["hash"])
        rows.append(row)
        show_progress(len(rows), len(entries), row)
    rows.sort(key=lambda row: (row["kernel"], row["target"], row["configuration"]))
    if options.record:
        record(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, json.dumps(rows, indent=1) + "\n")

    print(table(rows))
    failures = sum(not row["ok"] for row in rows)
    targets = ", ".join(sorted({row["target"] for row in rows}))
    seconds = time.perf_counter() - began
    print(f"\n{len(rows)} compiled for {targets} in {seconds:.0f} s, {failures} failed; rows in {options.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
