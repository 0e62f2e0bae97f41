"""Ours against torch.nn's recurrences, which is cuDNN on a GPU, and beside the floor that no step can go below."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from benchmarks.conftest import config_sizes, parameters
from benchmarks.contest import contest
from benchmarks.floors import FloorMeter, step_floors
from benchmarks.layers import TORCH, Layer, kept_bytes
from benchmarks.recurrence_cases import cudnn_path, recurrence_cases
from benchmarks.recurrence_peers import recurrence_peers
from benchmarks.rows import OURS
from benchmarks.shapes import Case, Sizes
from seqcore.clock import Stopwatch

RECOMPUTED = f"{OURS}, recompute"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", parameters(recurrence_cases(config_sizes(metafunc.config))))


@pytest.mark.recurrence
def test_recurrence(
    benchmark,
    case: Case,
    sizes: Sizes,
    stopwatch: Stopwatch,
    floor_meter: FloorMeter | None,
    describe: Callable[[], dict],
    in_time: Callable[[float], None],
) -> None:
    in_time(sizes.recurrence_seconds)

    def more(ours: Layer, torchs: Layer, x: Tensor) -> dict:
        on_gpu = floor_meter is not None
        return {
            "cudnn_path": cudnn_path(case) if on_gpu else None,
            "step_floors": step_floors(case, floor_meter) if on_gpu else None,
            "kept_bytes_per_token": kept_per_token(case, ours, torchs, x) if case.pass_ == "training" else None,
        }

    only_torch = replace(sizes, peers=(TORCH,), peer_limits={})
    contest(benchmark, "recurrence", case, only_torch, stopwatch, describe, more, recurrence_peers)


def kept_per_token(case: Case, ours: Layer, torchs: Layer, x: Tensor) -> dict[str, float]:
    """Bytes kept for backward, of ours, of torch.nn's, and of ours with ``recompute``."""
    tokens = case.tokens
    kept = {TORCH: kept_bytes(torchs, x) / tokens}
    for name, recompute in ((OURS, False), (RECOMPUTED, True)):
        ours.module.recompute = recompute
        kept[name] = kept_bytes(ours, x) / tokens
    ours.module.recompute = case.recompute
    return kept
