"""Ours against each backend of torch's operator, FlexAttention and flash-attn, whoever serves the case."""

from collections.abc import Callable

import pytest

from benchmarks.attention_cases import AttentionCase, attention_cases, score_work
from benchmarks.attention_data import check, make_data
from benchmarks.attention_peers import ours, peers
from benchmarks.conftest import config_sizes, parameters
from benchmarks.contest import where_supported
from benchmarks.rows import extra_info
from benchmarks.shapes import Sizes
from benchmarks.timing import race
from seqcore.clock import Stopwatch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", parameters(attention_cases(config_sizes(metafunc.config))))


@pytest.mark.attention
def test_attention(
    benchmark,
    case: AttentionCase,
    sizes: Sizes,
    stopwatch: Stopwatch,
    describe: Callable[[], dict],
    in_time: Callable[[float], None],
) -> None:
    in_time(sizes.attention_seconds)
    with where_supported(sizes):
        data = make_data(case, sizes.device)
        contestant = ours(data, sizes.ours)
        checked = check(data, contestant, sizes)
        present, absent = peers(data)
        memory = {name: peer.memory(case.pass_) for name, peer in present.items()}
        calls = {name: (lambda peer=peer: peer.run(case.pass_)) for name, peer in present.items()}
        more = {
            "sweep": case.sweep,
            "backend": sizes.ours,
            "causal": case.causal,
            "window": case.window,
            "absent": absent,
            "memory_bytes": contestant.memory(case.pass_),
            "memory_kind": "peak allocated" if stopwatch.on_gpu else "saved for backward",
            "peer_memory_bytes": memory,
            "checked_shape": checked,
        }
        timing, timings = race(benchmark, stopwatch, lambda: contestant.run(case.pass_), calls, sizes.case_seconds)
        work = score_work(case, data.query.element_size())
    benchmark.group = f"attention {case.pass_} {case.sweep}"
    benchmark.extra_info |= extra_info(
        "attention", "attention", case.pass_, case.dtype, case.shape, timing, timings, work, describe(), **more
    )
