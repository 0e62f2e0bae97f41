"""The reference's random numbers: Philox-4x32-10 by its authors' vectors, and bit for bit what Triton draws."""

import pytest
import torch
import triton
import triton.language as tl

from seqcore.reference.philox import philox, uniform

SEEDS = [0, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 0x299F31D0_A4093822, 2**63 - 1, -1, -(2**63)]
# Every three of these as counter words, among them those with the sign bit set and the largest.
COUNTERS = [0, 1, 31, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 1]


# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, and the first word of the answer.
@pytest.mark.parametrize(
    "counter, key, word",
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, word):
    seed = torch.tensor([(key[1] << 32 | key[0]) - (1 << 64 if key[1] >> 31 else 0)])
    assert philox(seed, *(torch.tensor([c]) for c in counter)).item() == word


def test_uniform_is_in_the_unit_interval_and_spread_evenly():
    index = torch.arange(100)
    draws = uniform(torch.tensor([3]), torch.arange(10)[:, None, None], index[:, None], index)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0 and draws.max() < 1
    tenths = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (tenths - 0.1).abs().max() < 4 * (0.09 / draws.numel()) ** 0.5


def test_each_of_batch_head_row_and_column_counts():
    seed, index = torch.tensor([3]), torch.arange(50)
    draws = [uniform(seed, *(index if i == axis else index * 0 for i in range(3))) for axis in range(3)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    assert all(len(set(draw.tolist())) == len(index) for draw in draws)


@triton.jit
def draw_kernel(seed_ptr, column_ptr, row_ptr, batch_head_ptr, word_ptr, uniform_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    column = tl.load(column_ptr + offs)
    row = tl.load(row_ptr + offs)
    batch_head = tl.load(batch_head_ptr + offs)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), column, row, batch_head, column * 0)
    tl.store(word_ptr + offs, word)
    tl.store(uniform_ptr + offs, tl.uint_to_uniform_float(word))


@pytest.mark.kernels
@pytest.mark.parametrize("seed", SEEDS)
def test_bit_for_bit_what_triton_draws(seed, device):
    seed = torch.tensor([seed], device=device)
    counters = torch.cartesian_prod(*[torch.tensor(COUNTERS, device=device)] * 3).T
    size = triton.next_power_of_2(counters.shape[1])
    column, row, batch_head = (torch.nn.functional.pad(c, (0, size - c.numel())) for c in counters)
    words, draws = torch.empty(size, dtype=torch.int64, device=device), torch.empty(size, device=device)
    as_uint32 = [c.to(torch.uint32) for c in (column, row, batch_head)]
    draw_kernel[(1,)](seed, *as_uint32, words, draws, SIZE=size)
    zero = torch.zeros_like(column)
    assert torch.equal(philox(seed, column, row, batch_head, zero), words & 0xFFFFFFFF)
    assert torch.equal(uniform(seed, batch_head, row, column), draws)


@triton.jit
def rand_kernel(seed_ptr, draws_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(draws_ptr + offs, tl.rand(tl.load(seed_ptr), offs))


@pytest.mark.kernels
def test_the_first_row_of_the_first_head_is_tl_rand(device):
    seed, draws = torch.tensor([11], device=device), torch.empty(128, device=device)
    rand_kernel[(1,)](seed, draws, SIZE=128)
    column = torch.arange(128, device=device)
    assert torch.equal(uniform(seed, column * 0, column * 0, column), draws)
