"""Measure on this machine, and write the report: ``python -m benchmarks``."""

import argparse
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ahead
from benchmarks.environment import ROOT
from benchmarks.measured import JOURNAL, MEASURED, ROW, is_finished, keep_header, row_of, run_key, write
from benchmarks.progress import Progress
from benchmarks.report import print_summary, write_report
from benchmarks.resume import Resume
from benchmarks.shapes import SIZES, choose_sizes
from benchmarks.text import load_corpus
from seqcore.files import replaceable
from seqcore.journal import Journal, discard

# In the order they are measured.
SUITES = ("floors", "recurrence", "attention", "bottleneck", "models")


def main(arguments: list[str] | None = None) -> int:
    begin, options = time.monotonic(), parse(arguments)
    sizes = choose_sizes(options.sizes)
    data, journal_path = options.out / MEASURED, options.out / JOURNAL
    try:
        if not options.resume:
            discard(journal_path)
        # An old file must not be taken for the result of a run that failed to write one.
        replaceable(data).unlink(missing_ok=True)
    except OSError as error:
        print(f"Cannot measure: {error}", file=sys.stderr)
        return 2
    its_key = run_key(sizes, options.text)
    print(f"Measuring at the sizes {sizes.name!r}.", flush=True)
    if options.jobs > 1 and sizes.device == "cuda":
        ahead.in_shares(options.suite, sizes, options.out, options.jobs)
    left = None if options.seconds is None else max(0.0, options.seconds - (time.monotonic() - begin))
    progress = Progress()
    resume = Resume(Journal(journal_path, its_key, ROW), is_finished, row_of)
    status = pytest.main(
        [
            f"--rootdir={ROOT}",
            f"--confcutdir={ROOT / 'benchmarks'}",
            # Progress shows what pytest's terminal would, whose options must then not be asked for.
            "-pno:terminal",
            "--override-ini=addopts=--import-mode=importlib",
            f"--sizes={options.sizes}",
            f"--time-share={sizes.share_of(left, options.suite)}",
            "-Wdefault",
            # Of a run that goes on and finds all of it measured.
            "-Wignore:Not saving anything",
            "--benchmark-quiet",
            # Otherwise it does nothing beside the plugin that runs tests in several processes.
            "--benchmark-enable",
            f"--benchmark-json={data}",
            # Nothing is stored there; but otherwise a folder is made wherever one stands, and a cache in the checkout.
            f"--benchmark-storage=file://{options.out.resolve()}",
            "-pno:cacheprovider",
            *([f"--text={options.text}"] if options.text else []),
            *(str(ROOT / "benchmarks" / f"test_{suite}.py") for suite in SUITES if suite in options.suite),
        ],
        plugins=[progress, resume],
    )
    if data.exists():
        keep_header(journal_path, its_key, data)
    if not write(journal_path, its_key, data, sizes.device, resume.left):
        print(f"Nothing was measured. {'; '.join(progress.reasons)}", file=sys.stderr)
        # A CPU may have nothing to say about what was asked; a GPU has.
        return int(status) or int(sizes.device == "cuda" or not progress.reasons)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        # All of it was measured before.
        status = pytest.ExitCode.OK
    if options.no_report:
        return int(status)
    results, written = write_report([data], options.out, not options.no_plots)
    print_summary(results, [data, *written])
    if progress.failures:
        print("\nFailed:\n" + "\n".join(f"  {name}" for name in progress.failures), file=sys.stderr)
    if resume.left:
        print(f"\n{len(resume.left)} cases were not begun: the same with --resume measures them", file=sys.stderr)
    return int(status)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="default: build/bench")
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=SUITES, help="only these")
    parser.add_argument("--sizes", choices=["auto", *SIZES], default="auto", help="auto: what suits this machine")
    parser.add_argument("--text", type=Path, help="text the models train on (default: Python's standard library)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUT/journal.jsonl, where a run of the same sources stopped"
    )
    parser.add_argument("--seconds", type=float, help="for these suites together (default: what suits the sizes)")
    parser.add_argument("--jobs", type=int, default=1, help="on a GPU: processes that compile before anything is timed")
    parser.add_argument("--no-plots", action="store_true", help="tables and words only")
    parser.add_argument("--no-report", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    try:
        sizes = choose_sizes(options.sizes)
        if options.text:
            load_corpus(options.text, sizes.models.text_bytes)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    return options


if __name__ == "__main__":
    sys.exit(main())
