"""The attention kernels on whatever hypothesis draws; a file of its own, for a GPU machine may lack hypothesis."""

import pytest
import torch

from .attention_twins import assert_like_torch, qkv
from .test_attention_kernels import LAYOUTS, additive_mask, bool_mask, kernels

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.kernels

sizes = st.integers(1, 40)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=sizes,
    n=sizes,
    d=sizes,
    dv=sizes,
    group=st.integers(1, 3),
    causal=st.sampled_from([None, "top_left", "lower_right"]),
    mask=st.sampled_from([None, bool_mask, additive_mask]),
    mask_broadcasts=st.tuples(*[st.booleans()] * 4),
    rows_behind=st.booleans(),
    half=st.booleans(),
)
def test_whatever_is_asked(m, n, d, dv, group, causal, mask, mask_broadcasts, rows_behind, half, device):
    shape = [1 if one else size for one, size in zip(mask_broadcasts, (2, group, m, n), strict=True)]
    options = {"dtype": torch.float16 if half else torch.float32, "device": device}
    inputs = qkv(2, group, heads_kv=1, M=m, N=n, D=d, DV=dv, **options)
    if rows_behind:
        inputs = [LAYOUTS["heads behind rows"](t) for t in inputs]
    mask = None if mask is None else mask(*shape).to(device)
    assert_like_torch(kernels, *inputs, attn_mask=mask, causal=causal, enable_gqa=True)
