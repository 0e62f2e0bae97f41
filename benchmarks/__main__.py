"""Measure on this machine, and write the report: ``python -m benchmarks``."""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.progress import Progress
from benchmarks.report import print_summary, write_report
from benchmarks.shapes import SIZES, choose_sizes
from benchmarks.text import load_corpus

# In the order they are measured.
SUITES = ("floors", "recurrence", "attention", "bottleneck", "models")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="default: build/bench")
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=SUITES, help="only these")
    parser.add_argument("--json", default="bench.json", metavar="NAME", help="the measurements' file in OUT")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME", help="files of earlier runs in OUT, for the same report"
    )
    parser.add_argument("--sizes", choices=["auto", *SIZES], default="auto", help="auto: what suits this machine")
    parser.add_argument("--text", type=Path, help="text the models train on (default: Python's standard library)")
    parser.add_argument("--no-plots", action="store_true", help="tables and words only")
    options = parser.parse_args(arguments)

    sizes = choose_sizes(options.sizes)
    if options.text:
        try:
            load_corpus(options.text, sizes.models.text_bytes)
        except (OSError, ValueError) as error:
            parser.error(str(error))

    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / options.json
    # An old file must not be taken for the result of a run that failed to write one.
    data.unlink(missing_ok=True)
    print(f"Measuring at the sizes {sizes.name!r}.", flush=True)
    progress = Progress()
    status = pytest.main(
        [
            f"--rootdir={ROOT}",
            f"--confcutdir={ROOT / 'benchmarks'}",
            # Progress shows what pytest's terminal would, whose options must then not be asked for.
            "-pno:terminal",
            "--override-ini=addopts=--import-mode=importlib",
            f"--sizes={options.sizes}",
            "-Wdefault",
            "--benchmark-quiet",
            f"--benchmark-json={data}",
            *([f"--text={options.text}"] if options.text else []),
            *(str(ROOT / "benchmarks" / f"test_{suite}.py") for suite in SUITES if suite in options.suite),
        ],
        plugins=[progress],
    )
    if not data.exists():
        print(f"Nothing was measured. {'; '.join(progress.reasons)}", file=sys.stderr)
        # A CPU may have nothing to say about what was asked; a GPU has.
        return int(status) or int(sizes.device == "cuda" or not progress.reasons)
    also = [options.out / name for name in options.also if (options.out / name).exists()]
    results, written = write_report([data, *also], options.out, not options.no_plots)
    print_summary(results, [data, *written])
    if progress.failures:
        print("\nFailed:\n" + "\n".join(f"  {name}" for name in progress.failures), file=sys.stderr)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
