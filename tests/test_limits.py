"""Sizes beyond 16 and 31 bits, of which nothing has to run."""

import pytest
import torch

from seqcore import UnsupportedInput
from seqcore.kernels.tuning import Device
from seqcore.ops import attention_launch
from seqcore.ops import recurrence as recurrence_ops
from seqcore.testing.launches import noted_for

from .attention_twins import operands, qkv

MANY = 70_000
META = {"device": "meta"}


@pytest.fixture
def launched():
    with noted_for(Device("sm_90")) as found:
        yield found


def assert_launchable(launched, least):
    """CUDA's grids end at 2^31 - 1 programs along x and at 65,535 along y and z."""
    assert len({launch.name for launch in launched}) >= least
    assert all(len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31 for launch in launched)


# Batch, heads, queries and keys.
HUGE = {
    "batch": (MANY, 2, 5, 7),
    "heads": (2, MANY, 5, 7),
    "queries": (2, 2, MANY, 7),
    "keys": (2, 2, 40, MANY),
    "a single query": (2, 2, 1, MANY),
    "all": (2**12, 2**6, 2**17, 2**17),
}


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@pytest.mark.parametrize("size", HUGE)
def test_attention_fits_into_grids(size, kind, launched):
    B, H, M, N = HUGE[size]
    options = {} if kind == "plain" else {"causal": "top_left"}
    if kind == "packed":
        ends = torch.empty(B + 1, dtype=torch.int32, **META)
        B, M, N, options = 1, B * M, B * N, options | {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    for shape in {"masked": [(1, 1, M, N), (B, H, M, 1), (1, 1, 1, N), (1, H, 1, 1)]}.get(kind, [None]):
        mask = None if shape is None else torch.empty(shape, dtype=torch.float16, **META)
        settings, tensors = operands(
            *qkv(B, H, M=M, N=N, D=64, dtype=torch.float16, **META), attn_mask=mask, **options
        )
        out, lse, rows = attention_launch.forward(*tensors, *settings)
        wanted = [True, True, True, mask is not None, False]
        attention_launch.backward(out, lse, out, rows, wanted, *tensors, *settings)
        if kind != "packed" and B * M * N < 2**40:
            attention_launch.weights(rows, *tensors, *settings)
    assert_launchable(launched, 4 + (kind == "masked"))


@pytest.mark.parametrize("sizes", [(2**31, 1, 1, 7), (1, 2**27, 2**11, 7)], ids=["sequences", "tiles"])
def test_more_tiles_than_a_grid_has_are_refused(sizes, launched):
    B, H, M, N = sizes
    settings, tensors = operands(*qkv(B, H, M=M, N=N, D=64, dtype=torch.float16, **META))
    with pytest.raises(UnsupportedInput, match=r"fewer than 2\^31 tiles, got"):
        attention_launch.forward(*tensors, *settings)
    assert launched == []


def test_more_rows_than_are_put_together_go_through_the_plain_kernel(launched):
    for batch, expected in ((2**26, "attention_decode_kernel"), (2**27, "attention_forward_kernel")):
        settings, tensors = operands(*qkv(batch, 4, heads_kv=1, M=4, N=7, D=16, dtype=torch.float16, **META))
        launched.clear()
        attention_launch.forward(*tensors, *settings)
        assert launched[0].name == expected
        assert_launchable(launched, 1)


# Steps, batch, inputs, units of a block and blocks.
LONG = {
    "steps": (MANY, 5, 16, 64, 1),
    "batch": (3, 2**24, 16, 64, 1),
    "inputs": (3, 5, MANY, 64, 1),
    "blocks": (3, 5, 16, 16, MANY),
    "one step of a batch": (1, 2**24, 16, 64, 1),
    "one step of blocks": (1, 5, 16, 16, MANY),
    "one step of units": (1, 5, 16, 2**21, 1),
}


@pytest.mark.parametrize("save", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("size", LONG)
def test_recurrences_fit_into_grids(size, save, launched):
    T, B, I, units, blocks = LONG[size]
    H = units * blocks
    made = lambda *shape: torch.empty(shape, dtype=torch.float16, **META)
    recurrent = (4 * H, H) if blocks == 1 else (4, blocks, units, units)
    weights = [made(4 * H, I), made(*recurrent), made(4 * H), made(4 * H)]
    given = ("lstm", made(T, B, I), made(1, B, H), made(1, B, H), weights, 1, True, None, None, None)
    y, h_n, c_n, *kept = recurrence_ops._forward(*given, save, True)
    if size != "one step of units":
        # Whose weights do not fit any device's programs.
        recurrence_ops._backward(*given, y, *kept, y, h_n, c_n, None, None, True)
    assert_launchable(launched, 1 if size == "one step of units" else 2 + (not save))
