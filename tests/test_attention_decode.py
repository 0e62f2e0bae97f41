"""Few queries over many keys: keys split among programs, groups of heads packed into a tile, against the reference."""

import pytest
import torch

from seqcore.kernels import tuning
from seqcore.kernels.tuning import Device
from seqcore.ops import attention_launch

from .attention_twins import FEATURES, assert_like_reference, beside, features, kernels, qkv, results

B, H, H_KV, N, D, DV = 2, 4, 2, 75, 8, 5


@pytest.fixture
def splits_into(monkeypatch):
    """Have decoding split keys into so many parts; a list grows by each launch that does."""

    def force(splits):
        launched, decode = [], attention_launch._decode
        monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)
        monkeypatch.setattr(
            attention_launch, "_decode", lambda problem, *rest: launched.append(rest[0]) or decode(problem, *rest)
        )
        return launched

    return force


def inputs(m, **options):
    return qkv(B, H, heads_kv=H_KV, M=m, N=N, D=D, DV=DV, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("splits", [0, 1, 3, 8])
@pytest.mark.parametrize("m", [1, 5])
def test_any_number_of_splits_will_do(m, splits, device, splits_into):
    launched = splits_into(splits)
    assert_like_reference(*inputs(m, device=device))
    assert launched == ([splits] if splits else [])


@pytest.mark.kernels
@pytest.mark.parametrize("name", FEATURES[1:-1])
def test_features(name, device, splits_into):
    splits_into(3)
    assert_like_reference(*inputs(3, device=device), **features(B, H, 3, N)[name])


@pytest.mark.kernels
@pytest.mark.parametrize("m", [1, 6])
def test_all_features_together(m, kernel_dtype, device, splits_into):
    splits_into(3)
    everything = features(B, H, m, N, dtype=kernel_dtype)["everything"]
    assert_like_reference(*inputs(m, dtype=kernel_dtype, device=device), **everything)


@pytest.mark.kernels
@pytest.mark.parametrize("heads, heads_kv", [(3, 3), (3, 1), (6, 2)])
def test_groups_are_packed_into_rows(heads, heads_kv, device, splits_into):
    splits_into(2)
    tensors = qkv(B, heads, heads_kv=heads_kv, M=2, N=N, D=D, device=device)
    assert_like_reference(*tensors, causal="lower_right", alibi_slopes=torch.linspace(0, 1, heads))


@pytest.mark.kernels
def test_parts_that_see_no_key(device, splits_into):
    """Of a window only the last of eight parts has keys, of a short sequence only the first; of none, none."""
    splits_into(8)
    assert_like_reference(*inputs(1, device=device), window=(3, None), causal="lower_right")
    lengths = torch.tensor([4, 0])
    found = assert_like_reference(*inputs(2, device=device), key_lengths=lengths)
    assert not found["out"][1].any() and (found["lse"][1] == float("-inf")).all()
    sinks = torch.randn(H)
    found = results(kernels, *inputs(2, device=device), key_lengths=lengths.to(device), sinks=sinks.to(device),
                    enable_gqa=True)  # fmt: skip
    torch.testing.assert_close(found["lse"][1].cpu(), sinks[:, None].expand(H, 2))


@pytest.mark.kernels
def test_nothing_in_the_padding_matters(device, splits_into):
    splits_into(3)
    query, *keys = inputs(1, device=device)
    lengths = torch.tensor([N - 30, 40], device=device)
    past = (torch.arange(N, device=device) >= lengths[:, None])[:, None, :, None]
    found, expected = (
        results(kernels, query, *(t.masked_fill(past, filling) for t in keys), key_lengths=lengths, enable_gqa=True)
        for filling in (float("nan"), 7.0)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.kernels
def test_repeats_are_bitwise_equal(device, splits_into):
    splits_into(3)
    everything = {name: beside(value, device) for name, value in features(B, H, 5, N)["everything"].items()}
    tensors = inputs(5, device=device)
    first, second = (kernels(*tensors, **everything, enable_gqa=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.kernels
def test_a_cache_of_wider_rows(device, splits_into):
    """Keys as a cache holds them: more room than is filled, and heads behind rows."""
    splits_into(3)
    query, key, value = inputs(1, device=device)
    room = [torch.full((B, 2 * N, H_KV, t.shape[-1]), float("nan"), device=device) for t in (key, value)]
    for cache, t in zip(room, (key, value), strict=True):
        cache[:, :N] = t.transpose(1, 2)
    views = [cache[:, :N].transpose(1, 2) for cache in room]
    found, expected = (kernels(query, *keys, enable_gqa=True) for keys in (views, (key, value)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_splits_fill_the_device_and_no_more():
    """``tuning.decode_splits``: programs unsplit, packed rows, heads of a group, tiles of keys."""
    device = Device("sm_90")
    splits = lambda *sizes: tuning.decode_splits(device, *sizes)
    assert splits(8, 1, 1, 1024) == 2 * device.multiprocessors // 8
    assert splits(8, 1, 1, 10) == 5, "each program has two tiles of keys at least"
    assert splits(4 * device.multiprocessors, 1, 1, 1024) == 0, "full without splits"
    assert splits(4 * device.multiprocessors, 4, 4, 1024) == 1, "but a group shares its keys"
    assert splits(8, tuning.DECODE_ROWS + 1, 4, 1024) == 0, "more rows than a packed tile has"
    assert splits(8, 1, 1, 1) == 0, "nothing to split"
