"""What a program sees of another's stores: late under some schedules, but never what the memory model forbids."""

import pytest
import torch
import triton
import triton.language as tl

from seqcore.devices import INTERPRETED
from seqcore.testing.explorer import explore

from .mutants import mutant

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="the explorer schedules interpreted programs"),
]

pytest.importorskip("greenlet", reason="greenlet is not installed")

SEEDS = range(10)


@triton.jit
def store_buffering_kernel(x_ptr, y_ptr, seen_ptr):
    if tl.program_id(0) == 0:
        tl.store(x_ptr, 1)
        tl.store(seen_ptr, tl.load(y_ptr))
    else:
        tl.store(y_ptr, 1)
        tl.store(seen_ptr + 1, tl.load(x_ptr))


def both_missed(seed, weak_memory):
    x, y, seen = torch.zeros(1), torch.zeros(1), torch.full((2,), -1.0)
    with explore(seed, weak_memory=weak_memory):
        store_buffering_kernel[(2,)](x, y, seen)
    return seen.tolist() == [0, 0]


def test_stores_are_seen_late_only_in_weak_memory():
    assert any(both_missed(seed, weak_memory=True) for seed in range(20))
    assert not any(both_missed(seed, weak_memory=False) for seed in range(20))


@triton.jit
def coherence_kernel(x_ptr, seen_ptr, own_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, 4)
    for i in range(1, N + 1):
        if pid == 0:
            tl.store(x_ptr + offs, i, mask=offs < 3)
            tl.store(own_ptr + i - 1, tl.load(x_ptr + 2))
        else:
            tl.store(seen_ptr + (pid - 1) * N + i - 1, tl.load(x_ptr + 2))


def test_a_location_never_goes_back_and_a_program_sees_its_own_stores():
    readers, n, late = 3, 12, 0
    for seed in SEEDS:
        x, seen, own = torch.zeros(4), torch.full((readers, n), -1.0), torch.full((n,), -1.0)
        with explore(seed):
            coherence_kernel[(1 + readers,)](x, seen, own, N=n)
        assert own.tolist() == list(range(1, n + 1))
        assert x.tolist() == [n, n, n, 0]
        assert torch.all(seen.diff(dim=1) >= 0) and seen.min() >= 0
        late += len(set(seen[:, 2].tolist())) > 1
    assert late


@triton.jit
def ordered_kernel(x_ptr, seen_ptr, N: tl.constexpr):
    for i in range(N):
        tl.store(x_ptr + tl.arange(0, 4), i)
        tl.store(x_ptr + tl.arange(0, 2), i + 1)
    tl.store(seen_ptr, tl.atomic_add(x_ptr, 1, sem="relaxed"))


def test_stores_of_a_program_to_a_location_keep_their_order_before_its_atomics_too():
    for seed in SEEDS:
        x, seen = torch.full((8,), -1), torch.zeros(1)
        with explore(seed):
            ordered_kernel[(1,)](x, seen, N=10)
        assert x.tolist() == [11, 10, 9, 9, -1, -1, -1, -1] and seen.item() == 10


@triton.jit
def atomic_then_load_kernel(x_ptr, seen_ptr, ROUNDS: tl.constexpr):
    if tl.program_id(0) == 0:
        for i in range(1, ROUNDS + 1):
            tl.store(x_ptr, i)
    else:
        for i in range(ROUNDS):
            tl.store(seen_ptr + 2 * i, tl.atomic_add(x_ptr, 0, sem="relaxed"))
            tl.store(seen_ptr + 2 * i + 1, tl.load(x_ptr))


def test_a_load_sees_nothing_older_than_the_atomic_before_it():
    for seed in range(40):
        seen = torch.full((30,), -1)
        with explore(seed):
            atomic_then_load_kernel[(2,)](torch.zeros(1, dtype=torch.int32), seen, ROUNDS=15)
        assert torch.all(seen.diff() >= 0) and seen[0] >= 0


@triton.jit
def locked_kernel(lock_ptr, total_ptr, ROUNDS: tl.constexpr):
    for _ in range(ROUNDS):
        while tl.atomic_cas(lock_ptr, 0, 1, sem="acquire") == 1:
            pass
        tl.debug_barrier()
        tl.store(total_ptr, tl.load(total_ptr) + 1)
        tl.debug_barrier()
        tl.atomic_xchg(lock_ptr, 0, sem="release")


def test_a_lock_by_compare_and_swap_excludes_others_and_a_broken_one_does_not():
    def total(kernel, seed):
        found = torch.zeros(1)
        with explore(seed):
            kernel[(4,)](torch.zeros(1, dtype=torch.int32), found, ROUNDS=3)
        return found.item()

    assert {total(locked_kernel, seed) for seed in SEEDS} == {12}
    for old, new in (("== 1", "== 2"), ('"release"', '"relaxed"'), ('"acquire"', '"relaxed"')):
        assert min(total(mutant(locked_kernel, old, new), seed) for seed in SEEDS) < 12
