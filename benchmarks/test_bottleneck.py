"""Layer against layer at equal width: what T dependent steps cost beside attending to all of them at once."""

import gc
from collections.abc import Callable

import pytest
import torch

from benchmarks.conftest import config_sizes
from benchmarks.flops import work
from benchmarks.layers import TORCH, build_layers, check, make_data, memory, passes
from benchmarks.rows import extra_info
from benchmarks.shapes import Case, Sizes
from benchmarks.timing import Stopwatch, race
from seqcore import UnsupportedInput


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(case, id=case.id, marks=getattr(pytest.mark, case.pass_))
        for case in config_sizes(metafunc.config).cases()
    ]
    metafunc.parametrize("case", cases)


@pytest.mark.bottleneck
def test_layer(
    benchmark,
    case: Case,
    sizes: Sizes,
    stopwatch: Stopwatch,
    describe: Callable[[], dict],
    in_time: Callable[[str], None],
) -> None:
    in_time(case.sweep)
    try:
        layers = build_layers(case, sizes)
        x, dy = make_data(case, sizes.device)
        ours = layers.pop(sizes.ours)
        checked = check(case, sizes, ours, layers[TORCH], x, dy)
        memory_bytes, memory_kind = memory(case, ours, x, dy)
        peers = {name: passes(case, layer, x, dy) for name, layer in layers.items()}
        timing, peer_timings = race(benchmark, stopwatch, passes(case, ours, x, dy), peers, sizes.case_seconds)
    except UnsupportedInput as error:
        pytest.skip(f"not supported: {error}")
    except torch.OutOfMemoryError:
        pytest.skip("does not fit this GPU's memory")
    finally:
        if sizes.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    benchmark.group = f"{case.op} {case.pass_} {case.sweep}"
    benchmark.extra_info |= extra_info(
        "bottleneck",
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
    )
