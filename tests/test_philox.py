"""The reference's random numbers: Philox-4x32-10 by its authors' vectors, and bit for bit what Triton draws."""

import pytest
import torch
import triton
import triton.language as tl

from seqcore.reference.philox import philox, uniform

SEEDS = [0, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 0x299F31D0_A4093822, 2**63 - 1, -1, -(2**63)]
# Every three of these as counter words, among them those with the sign bit set and the largest.
COUNTERS = [0, 1, 31, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 1]


# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, and the answer.
@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, answer):
    seed = torch.tensor([(key[1] << 32 | key[0]) - (1 << 64 if key[1] >> 31 else 0)])
    assert tuple(word.item() for word in philox(seed, *(torch.tensor([c]) for c in counter))) == answer


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
def draw_kernel(seed_ptr, quarter_ptr, row_ptr, batch_head_ptr, words_ptr, uniforms_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    quarter = tl.load(quarter_ptr + offs)
    row = tl.load(row_ptr + offs)
    batch_head = tl.load(batch_head_ptr + offs)
    words = tl.philox(tl.load(seed_ptr), quarter, row, batch_head, quarter * 0)
    for turn in tl.static_range(4):
        tl.store(words_ptr + turn * SIZE + offs, words[turn])
        tl.store(uniforms_ptr + turn * SIZE + offs, tl.uint_to_uniform_float(words[turn]))


@pytest.mark.kernels
@pytest.mark.parametrize("seed", SEEDS)
def test_bit_for_bit_what_triton_draws(seed, device):
    seed = torch.tensor([seed], device=device)
    counters = torch.cartesian_prod(*[torch.tensor(COUNTERS, device=device)] * 3).T
    size = triton.next_power_of_2(counters.shape[1])
    quarter, row, batch_head = (torch.nn.functional.pad(c, (0, size - c.numel())) for c in counters)
    words, draws = torch.empty(4, size, dtype=torch.int64, device=device), torch.empty(4, size, device=device)
    as_uint32 = [c.to(torch.uint32) for c in (quarter, row, batch_head)]
    draw_kernel[(1,)](seed, *as_uint32, words, draws, SIZE=size)
    assert torch.equal(torch.stack(philox(seed, quarter, row, batch_head, quarter * 0)), words & 0xFFFFFFFF)
    columns = quarter * 4 + torch.arange(4, device=device)[:, None]
    assert torch.equal(uniform(seed, batch_head, row, columns), draws)


@triton.jit
def rand_kernel(seed_ptr, draws_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    four = tl.rand4x(tl.load(seed_ptr), offs)
    for turn in tl.static_range(4):
        tl.store(draws_ptr + offs * 4 + turn, four[turn])


@pytest.mark.kernels
def test_the_first_row_of_the_first_head_is_tl_rand4x(device):
    seed, draws = torch.tensor([11], device=device), torch.empty(128, device=device)
    rand_kernel[(1,)](seed, draws, SIZE=32)
    column = torch.arange(128, device=device)
    assert torch.equal(uniform(seed, column * 0, column * 0, column), draws)
