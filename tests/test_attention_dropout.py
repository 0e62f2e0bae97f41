"""Dropout in the attention kernels: one mask for forward and backward, whatever the tiles, that a seed repeats."""

import pytest
import torch

from seqcore import functional
from seqcore.kernels import tuning
from seqcore.kernels.tuning import Tiles
from seqcore.reference.attention import attention as reference_attention

from .attention_twins import assert_like_reference, ends, kernels, qkv, results

pytestmark = pytest.mark.kernels

B, H, M, N, D = 2, 2, 37, 41, 8


def kept(**options):
    """Which weights [B, H, M, N] the kernels keep: all keys weigh alike, and values are unit vectors."""
    device = options.pop("device")
    query, key = torch.zeros(B, H, M, D, device=device), torch.zeros(B, H, N, D, device=device)
    value = torch.eye(N, device=device).expand(B, H, N, N)
    return functional.attention(query, key, value, **options, backend="triton") > 0


@pytest.mark.parametrize("probability", [0.1, 0.75])
def test_the_mask_is_the_references_bit_for_bit(probability, device):
    seed = torch.tensor([2**40 + 5], device=device)
    found = kept(device=device, dropout_p=probability, dropout_seed=seed)
    zeros = torch.zeros(B, H, M, D, device=device), torch.zeros(B, H, N, D, device=device)
    weights = reference_attention(*zeros, zeros[1], dropout_p=probability, dropout_seed=seed).weights
    assert torch.equal(found, weights > 0)
    deviation = (probability * (1 - probability) / found.numel()) ** 0.5
    assert abs(1 - found.double().mean().item() - probability) < 4 * deviation


@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 32), (64, 64)])
def test_the_mask_does_not_hang_on_tiles(rows, columns, device, monkeypatch):
    options = {"device": device, "dropout_p": 0.5, "dropout_seed": 3}
    expected = kept(**options)
    monkeypatch.setattr(tuning, "attention_tiles", lambda *_: Tiles(rows, columns, num_warps=4, num_stages=1))
    assert torch.equal(kept(**options), expected)


def test_every_seed_batch_head_row_and_column_has_its_own(device):
    masks = [kept(device=device, dropout_p=0.5, dropout_seed=seed) for seed in (1, 2, 1 + 2**32, -1)]
    heads = [tuple(head.tolist()) for mask in masks for head in mask.flatten(0, 1).flatten(1)]
    assert len(set(heads)) == 4 * B * H
    assert len({tuple(row) for row in masks[0].flatten(0, 2).tolist()}) == B * H * M
    assert len({tuple(row) for row in masks[0].flatten(0, 2).T.tolist()}) == N


@pytest.mark.parametrize("m", [37, 2])
def test_backward_drops_what_forward_dropped(m, kernel_dtype, device):
    tensors = qkv(B, H, heads_kv=1, M=m, N=N, D=D, dtype=kernel_dtype, device=device)
    assert_like_reference(*tensors, dropout_p=0.6, dropout_seed=11, causal="lower_right")


def test_packed_sequences_draw_as_a_padded_batch_does(device):
    """Sequence, row and column count, not where they stand."""
    lengths, options = [9, 4, 6], {"dropout_p": 0.5, "dropout_seed": 5, "backend": "triton"}
    query, key, value = qkv(3, 2, M=9, N=9, D=4, device=device)
    padded = functional.attention(
        query, key, value, query_lengths=torch.tensor(lengths, device=device),
        key_lengths=torch.tensor(lengths, device=device), **options,
    )  # fmt: skip
    packed = [torch.cat([row[:, :n] for row, n in zip(t, lengths, strict=True)], 1) for t in (query, key, value)]
    sequences = {"cu_seqlens_q": ends(*lengths).to(device), "cu_seqlens_k": ends(*lengths).to(device)}
    found = functional.attention(*packed, **sequences, **options)
    expected = torch.cat([row[:, :n] for row, n in zip(padded, lengths, strict=True)], 1)
    assert torch.equal(found, expected)


def test_probability_zero_is_no_dropout(device):
    tensors = qkv(B, H, M=M, N=N, D=D, device=device)
    found, expected = (results(kernels, *tensors, **options) for options in ({"dropout_p": 0.0, "dropout_seed": 3}, {}))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_probability_one_gives_zeros_and_finite_gradients(device):
    tensors = qkv(B, H, M=M, N=N, D=D, device=device)
    found = results(kernels, *tensors, weigh=("out",), dropout_p=1.0, dropout_seed=3)
    assert found["lse"].isfinite().all()
    assert not any(tensor.any() for name, tensor in found.items() if name != "lse")


def test_torchs_generator_repeats_it(device):
    tensors = qkv(B, H, M=M, N=N, D=D, device=device)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([functional.attention(*tensors, dropout_p=0.5, backend="triton") for _ in range(2)])
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])
