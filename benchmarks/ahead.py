"""Every kernel of ours that suites will launch, compiled by several processes before anything is timed.

On a GPU that is new to this machine compiling takes longer than measuring, and a suite compiles one kernel at a time.
What is compiled here is found in Triton's cache then; what is missed here is compiled there.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import layers
from benchmarks.attention_cases import AttentionCase, attention_cases
from benchmarks.attention_data import make_data
from benchmarks.attention_peers import ours
from benchmarks.measured import JOURNAL, ROW, is_finished, run_key
from benchmarks.recurrence_cases import recurrence_cases
from benchmarks.shapes import RECURRENCES, SIZES, Case, Sizes
from seqcore.devices import describe
from seqcore.journal import Journal
from seqcore.kernels.tuning import Device
from seqcore.precompile import listening
from seqcore.testing.launches import compiled_for
from seqcore.testing.shares import Share, run_shares

CASES: dict[str, Callable[[Sizes], list[Case | AttentionCase]]] = {
    "recurrence": recurrence_cases,
    "attention": attention_cases,
    "bottleneck": Sizes.cases,
}
# Lengths from which on kernels are the same; one query's keys are split among programs. A few sequences of attention.
STEPS, QUERIES, KEYS, FEW = 2, 128, 4096, 2


def smaller(case: Case | AttentionCase) -> Case | AttentionCase:
    """A case that launches the same kernels on less."""
    if isinstance(case, AttentionCase):
        N = min(case.N, KEYS if case.M == 1 else QUERIES)
        lengths = tuple(min(length, N) for length in case.lengths[:FEW])
        return replace(case, sweep="", B=min(case.B, FEW), M=min(case.M, QUERIES), N=N, lengths=lengths)
    if case.op in RECURRENCES:
        return replace(case, sweep="", T=min(case.T, STEPS))
    return replace(case, sweep="", T=min(case.T, QUERIES), B=min(case.B, FEW))


def launch(case: Case | AttentionCase, sizes: Sizes) -> None:
    """All that a suite calls of ours, on the CPU: within ``compiled_for``, which runs none of it."""
    if isinstance(case, AttentionCase):
        contestant = ours(make_data(case, "cpu"), sizes.ours)
        contestant.forward()
        if case.pass_ == "training":
            contestant.gradients(contestant.dout)
        return
    layer = layers.build_layers(case, replace(sizes, device="cpu", peers=()))[sizes.ours]
    x, dy = layers.make_data(case, "cpu")
    layer.forward(x)
    if case.pass_ == "training":
        layer.gradients(x, dy)
        if case.op in RECURRENCES:
            # The recurrence suite counts what both keep for backward.
            layer.module.recompute = not case.recompute
            layer(x.detach().requires_grad_())


def compile_ahead(cases: Iterable[Case | AttentionCase], sizes: Sizes, device: Device) -> int:
    """How many kernels were not in Triton's cache and now are."""
    torch.set_num_threads(1)
    with listening() as found, compiled_for(device):
        for case in cases:
            try:
                launch(case, sizes)
            except Exception as error:
                # It will fail again where it is measured, and be told there.
                print(f"{case.id}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return sum(compiled.seconds is not None for compiled in found)


def in_shares(suites: Iterable[str], sizes: Sizes, out: Path, jobs: int) -> None:
    """Compile for the GPU at hand what is not yet measured in ``out``, in ``jobs`` processes."""
    suites = [suite for suite in suites if suite in CASES]
    if not suites:
        return
    begin = time.monotonic()
    run_shares([sys.executable, "-m", "benchmarks.ahead", "--out", str(out), "--sizes", sizes.name, *suites], jobs)
    print(f"Compiled ahead in {time.monotonic() - begin:.0f} s.", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+", choices=CASES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is measured here is left out")
    parser.add_argument("--sizes", choices=SIZES, default="gpu")
    parser.add_argument("--share", type=Share.parse, default=Share(0, 1), help="only this part, like 0/4")
    parser.add_argument("--arch", help="a GPU that is not here, like sm_90")
    options = parser.parse_args(arguments)
    sizes = SIZES[options.sizes]
    device, done = Device(options.arch) if options.arch else describe(torch.device("cuda")), {}
    if not options.arch:
        done = Journal(options.out / JOURNAL, run_key(sizes), ROW).done
    measured = {name.partition("[")[2].removesuffix("]") for name, entry in done.items() if is_finished(entry)}
    cases = [case for suite in options.suites for case in CASES[suite](sizes) if case.id not in measured]
    wanted = options.share.of(list(dict.fromkeys(map(smaller, cases))))
    print(f"{compile_ahead(wanted, sizes, device)} kernels compiled for {len(wanted)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
