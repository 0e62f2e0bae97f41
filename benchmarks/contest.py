"""One layer against its peers, from the weights to the row."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.layers import TORCHS, Layer, build_layers, check, make_data, memory, passes
from benchmarks.rows import extra_info
from benchmarks.shapes import Case, Sizes
from benchmarks.timing import race
from seqcore import UnsupportedInput
from seqcore.clock import Stopwatch
from seqcore.kernels.work import work

# What a suite adds to a row, from ours, torch's layer and the input.
More = Callable[[Layer, Layer, Tensor], dict]
# Further peers of a suite, out of torch's layer and the input, and why some do not take part.
Others = Callable[[Case, Layer, Tensor], tuple[dict[str, Layer], dict[str, str]]]


@contextlib.contextmanager
def where_supported(sizes: Sizes) -> Iterator[None]:
    """Skip what is not supported here or does not fit, and leave the GPU's memory to the next."""
    try:
        yield
    except UnsupportedInput as error:
        pytest.skip(f"not supported: {error}")
    except torch.OutOfMemoryError:
        pytest.skip("does not fit this GPU's memory")
    finally:
        if sizes.device == "cuda":
            # Peers are compiled for each case; of too many, torch would run the rest uncompiled without a word.
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


def contest(
    benchmark,
    suite: str,
    case: Case,
    sizes: Sizes,
    stopwatch: Stopwatch,
    describe: Callable[[], dict],
    more: More = lambda ours, torchs, x: {},
    others: Others = lambda case, torchs, x: ({}, {}),
) -> None:
    """Check ours, then time it, ``sizes.peers`` and others in turn, and write the row; skip what is not supported."""
    with where_supported(sizes):
        layers = build_layers(case, sizes)
        x, dy = make_data(case, sizes.device)
        ours, torchs = layers.pop(sizes.ours), next(layers[name] for name in TORCHS if name in layers)
        checked = check(case, sizes, ours, torchs, x, dy)
        memory_bytes, memory_kind = memory(case, ours, x, dy)
        added = more(ours, torchs, x)
        found, absent = others(case, torchs, x)
        peers = {name: passes(case, layer, x, dy) for name, layer in (layers | found).items()}
        timing, peer_timings = race(benchmark, stopwatch, passes(case, ours, x, dy), peers, sizes.case_seconds)
    benchmark.group = f"{case.op} {case.pass_} {case.sweep}"
    benchmark.extra_info |= extra_info(
        suite,
        case.op,
        case.pass_,
        case.dtype,
        case.shape,
        timing,
        peer_timings,
        work(case.op, case.pass_, case.shape, x.element_size()),
        describe(),
        sweep=case.sweep,
        backend=sizes.ours,
        memory_bytes=memory_bytes,
        memory_kind=memory_kind,
        checked_shape=checked,
        absent=absent,
        **added,
    )
