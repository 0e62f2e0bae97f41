"""Layer against layer at equal width: what T dependent steps cost beside attending to all of them at once."""

from collections.abc import Callable

import pytest

from benchmarks.conftest import config_sizes, parameters
from benchmarks.contest import contest
from benchmarks.shapes import Case, Sizes
from seqcore.clock import Stopwatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", parameters(config_sizes(metafunc.config).cases()))


@pytest.mark.bottleneck
def test_layer(
    benchmark,
    case: Case,
    sizes: Sizes,
    stopwatch: Stopwatch,
    describe: Callable[[], dict],
    in_time: Callable[[float], None],
) -> None:
    in_time(sizes.sweep_ends(case.sweep))
    contest(benchmark, "bottleneck", case, sizes, stopwatch, describe)
