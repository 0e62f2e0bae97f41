"""The schedule explorer: right kernels pass under every schedule, broken ones fail, and deadlocks are explained."""

import gc
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from seqcore.devices import INTERPRETED
from seqcore.kernels import grid
from seqcore.testing import explorer
from seqcore.testing.explorer import Deadlock, explore

from .mutants import mutant

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="the explorer schedules interpreted programs"),
]

greenlet = pytest.importorskip("greenlet", reason="greenlet is not installed")

S, T, BLOCK = 4, 6, 4
SEEDS = range(10)


@triton.jit(
    do_not_specialize=["T"],
)
def exchange_kernel(states_ptr, counter_ptr, T, S: tl.constexpr, BLOCK: tl.constexpr):
    """Each of S programs owns a slice; x[t+1] of a slice is half its x[t] plus a weighted sum over all of x[t]."""
    offs = tl.arange(0, BLOCK)
    own = tl.program_id(0) * BLOCK + offs
    offs_all = tl.arange(0, S * BLOCK)
    weight = (offs_all + 1).to(tl.float32) / (S * BLOCK * S * BLOCK)
    for t in range(T):
        row_ptr = states_ptr + t * S * BLOCK
        total = tl.sum(tl.load(row_ptr + offs_all) * weight, axis=0)
        x = 0.5 * tl.load(row_ptr + own) + total  # [BLOCK]
        tl.store(row_ptr + S * BLOCK + own, x)
        grid.signal(counter_ptr)
        grid.wait(counter_ptr, S * (t + 1))


def launch(kernel=exchange_kernel, launched=S, dtype=torch.float32):
    states = torch.full((T + 1, S * BLOCK), float("nan"), dtype=dtype)
    states[0] = torch.linspace(-1, 1, S * BLOCK)
    kernel[(launched,)](states, torch.zeros(1, dtype=torch.int32), T, S=S, BLOCK=BLOCK)
    return states


def expected():
    rows = [torch.linspace(-1, 1, S * BLOCK)]
    weight = torch.arange(1, S * BLOCK + 1) / (S * BLOCK) ** 2
    for _ in range(T):
        rows.append(0.5 * rows[-1] + (rows[-1] * weight).sum())
    return torch.stack(rows)


def is_right(states):
    return torch.allclose(states, expected(), rtol=1e-5, atol=1e-6)


def failures(kernel, seeds=SEEDS, **options):
    """How many of the seeds give a wrong result."""
    wrong = 0
    for seed in seeds:
        with explore(seed, **options):
            wrong += not is_right(launch(kernel))
    return wrong


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weak_memory", [True, False])
def test_a_right_kernel_is_right_under_every_schedule(weak_memory):
    assert failures(exchange_kernel, range(25), weak_memory=weak_memory) == 0


@triton.jit
def queue_kernel(order_ptr, tickets_ptr, ROUNDS: tl.constexpr):
    for _ in range(ROUNDS):
        ticket = tl.atomic_add(tickets_ptr, 1)
        tl.store(order_ptr + ticket, tl.program_id(0) * 10 + tl.program_id(1))


def queue(seed):
    order = torch.full((30,), -1)
    with explore(seed) as exploration:
        queue_kernel[(3, 2)](order, torch.zeros(1, dtype=torch.int32), ROUNDS=5)
    assert exploration.launches == 1
    # Each program is begun, and resumed before each of its operations.
    assert exploration.switches == 3 * 2 * (1 + 2 * 5)
    return tuple(order.tolist())


def test_the_seed_decides_the_schedule():
    orders = {seed: queue(seed) for seed in SEEDS}
    assert {seed: queue(seed) for seed in SEEDS} == orders
    assert len(set(orders.values())) == len(SEEDS)
    for order in orders.values():
        assert sorted(order) == sorted([0, 1, 10, 11, 20, 21] * 5)


@triton.jit
def inverse_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(0), 1.0 / tl.load(x_ptr + tl.program_id(0)))


def test_programs_run_in_the_context_of_their_launch():
    x = torch.zeros(3)
    with explore(0), np.errstate(divide="ignore"):
        inverse_kernel[(3,)](x)
    assert torch.all(x.isinf())


def test_launches_of_one_exploration_differ_and_are_counted():
    with explore(0) as exploration:
        orders = []
        for _ in range(2):
            orders.append(torch.full((30,), -1))
            queue_kernel[(3, 2)](orders[-1], torch.zeros(1, dtype=torch.int32), ROUNDS=5)
    assert exploration.launches == 2
    assert not torch.equal(*orders)


# --- mutants --------------------------------------------------------------------------------------------------------

STORE = "        tl.store(row_ptr + S * BLOCK + own, x)\n"
SIGNAL = "        grid.signal(counter_ptr)\n"
# What to replace, by what, and in which function.
MUTANTS = {
    "no wait": ("grid.wait(counter_ptr, S * (t + 1))", "pass", exchange_kernel),
    "wait that does not wait": ("while", "if", grid.wait),
    "wait for one signal too few": ("S * (t + 1)", "S * (t + 1) - 1", exchange_kernel),
    "signal before store": (STORE + SIGNAL, SIGNAL + STORE, exchange_kernel),
}
# These are bugs only because stores may be seen late and loads may see the past.
WEAK_MUTANTS = {
    "relaxed signal": ('sem="release"', 'sem="relaxed"', grid.signal),
    "signal that acquires": ('sem="release"', 'sem="acquire"', grid.signal),
    "signal without barrier": ("tl.debug_barrier()", "pass", grid.signal),
    "relaxed wait": ('sem="acquire"', 'sem="relaxed"', grid.wait),
    "wait that releases": ('sem="acquire"', 'sem="release"', grid.wait),
    "wait without barrier": ("tl.debug_barrier()", "pass", grid.wait),
}


def broken(name):
    old, new, function = {**MUTANTS, **WEAK_MUTANTS}[name]
    return mutant(exchange_kernel, old, new, of=function)


@pytest.mark.parametrize("weak_memory", [True, False])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_barrier_fails_under_nearly_every_schedule(name, weak_memory):
    assert failures(broken(name), weak_memory=weak_memory) >= len(SEEDS) - 1


@pytest.mark.parametrize("name", WEAK_MUTANTS)
def test_a_barrier_that_orders_too_little_fails_in_weak_memory(name):
    assert failures(broken(name)) >= len(SEEDS) - 1
    assert failures(broken(name), range(2), weak_memory=False) == 0


@triton.jit
def inner(x):
    return x + 1


@triton.jit
def outer(x):
    return inner(x) * 2


@triton.jit
def chain_kernel(x_ptr):
    tl.store(x_ptr, outer(tl.load(x_ptr)) + inner(0))


def chain(kernel):
    x = torch.tensor([3])
    kernel[(1,)](x)
    return x.item()


def test_mutant_replaces_a_helper_at_any_depth_and_leaves_the_original():
    minus = mutant(chain_kernel, "x + 1", "x - 1", of=inner)
    assert chain(minus) == (3 - 1) * 2 - 1
    assert chain(mutant(chain_kernel, "inner(x) * 2", "inner(x) * 5", of=outer)) == (3 + 1) * 5 + 1
    assert chain(mutant(minus, "outer(", "-outer(")) == -(3 - 1) * 2 - 1
    assert chain(mutant(minus, "x - 1", "x - 2", of=minus.fn.__globals__["inner"])) == (3 - 2) * 2 - 2
    assert chain(chain_kernel) == (3 + 1) * 2 + 1


@pytest.mark.parametrize(
    "error, message, old, options",
    [
        (ValueError, "occurs 0 times in chain_kernel, expected 1", "absent", {}),
        (ValueError, "occurs 3 times in chain_kernel, expected 2", "x", {"count": 2}),
        (ValueError, "chain_kernel does not call wait", "while", {"of": grid.wait}),
        (TypeError, "need a @triton.jit function with TRITON_INTERPRET=1, got function", "x", {"of": chain}),
    ],
)
def test_mutant_refuses_what_would_mutate_nothing(error, message, old, options):
    with pytest.raises(error, match=re.escape(message)):
        mutant(chain_kernel, old, old, **options)


# --- failures -------------------------------------------------------------------------------------------------------


def line_of(function, text):
    lines, first = inspect.getsourcelines(function.fn)
    return next(first + i for i, line in enumerate(lines) if text in line)


def assert_restored():
    """The next launch is an ordinary one."""
    assert not {name for name in vars(interpreter.interpreter_builder) if name.startswith("create_")}
    for function in (interpreter.GridExecutor.__call__, interpreter._patch_lang):
        assert function.__module__ != explore.__module__
    assert not grid.interleaved
    suspended = [g for g in gc.get_objects() if issubclass(type(g), greenlet.greenlet) and g and g.parent is not None]
    assert not suspended
    order = torch.full((30,), -1)
    queue_kernel[(3, 2)](order, torch.zeros(1, dtype=torch.int32), ROUNDS=5)
    assert order.tolist() == [pid for pid in (0, 1, 10, 11, 20, 21) for _ in range(5)]


def test_one_program_fewer_is_a_deadlock_that_names_all_positions():
    place = f"test_explorer.py:{line_of(exchange_kernel, 'grid.wait')} -> grid.py:{line_of(grid.wait, 'while')}"
    with explore(0), pytest.raises(Deadlock) as caught:
        launch(launched=S - 1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 3 programs wait forever: no progress in 1000 turns of each"
    assert lines[1:4] == [
        f"  program ({i}, 0, 0) at {place}: atomic add on counter_ptr[0], which holds 3" for i in range(S - 1)
    ]
    assert "patience of more than 1000" in lines[4]
    assert_restored()


def test_a_target_never_reached_is_a_deadlock():
    greedy = mutant(exchange_kernel, "S * (t + 1)", "S * (t + 1) + 1")
    for seed in range(3):
        with explore(seed, patience=100), pytest.raises(Deadlock, match="4 of 4 programs wait"):
            launch(greedy)
    endless = mutant(exchange_kernel, "target < 0", "target < 1000", of=grid.wait)
    with explore(0, patience=100), pytest.raises(Deadlock, match=r"-> <mutant \d+ of grid.py>:\d+: atomic add"):
        launch(endless)
    assert_restored()


@triton.jit
def flag_kernel(flag_ptr, SPINS: tl.constexpr):
    if tl.program_id(0) == 0:
        for _ in range(SPINS):
            tl.load(flag_ptr + 1)
        tl.store(flag_ptr, 1)
    else:
        while tl.load(flag_ptr) == 0:
            pass


def test_patience_is_for_kernels_that_load_long():
    flag = torch.zeros(2, dtype=torch.int32)
    with explore(0, patience=200):
        flag_kernel[(3,)](flag, SPINS=100)
        flag.zero_()
        with pytest.raises(Deadlock, match=r"program \(0, 0, 0\) at test_explorer.py:\d+: load of flag_ptr\[1\]"):
            flag_kernel[(3,)](flag, SPINS=2000)


@triton.jit
def count_kernel(count_ptr, N: tl.constexpr):
    if tl.program_id(0) == 0:
        for _ in range(N):
            tl.atomic_add(count_ptr, 1)
    else:
        while tl.atomic_add(count_ptr, 0) < N:
            pass


def test_an_atomic_that_changes_memory_is_progress():
    with explore(0, patience=50):
        count_kernel[(3,)](torch.zeros(1, dtype=torch.int32), N=200)


@triton.jit
def checked(x):
    tl.static_assert(x != 2, "two")
    return x


@triton.jit
def failing_kernel(x_ptr):
    tl.store(x_ptr + tl.program_id(0), checked(tl.program_id(0)))


def test_an_error_in_one_program_names_it_and_ends_the_others():
    place = f"test_explorer.py:{line_of(failing_kernel, 'tl.store')} -> test_explorer.py:{line_of(checked, 'assert')}"
    message = re.escape(f"program (2, 0, 0) at {place}: AssertionError('two')")
    with explore(0) as exploration:
        with pytest.raises(InterpreterError, match=message) as caught:
            failing_kernel[(5,)](torch.zeros(5))
        assert isinstance(caught.value.__cause__, InterpreterError)
        assert is_right(launch())
    assert exploration.launches == 2
    assert_restored()


def test_explore_cannot_be_nested():
    with explore(0):
        with pytest.raises(RuntimeError, match="already under way"):
            with explore(1):
                pass
        assert is_right(launch())
    assert_restored()


def test_explore_needs_patience_the_interpreter_and_greenlet(monkeypatch):
    with pytest.raises(ValueError, match="at least 1, got 0"), explore(0, patience=0):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), explore(0):
            pass
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ImportError, match=re.escape("pip install seqcore[dev]")), explore(0):
        pass


def test_importing_the_explorer_imports_neither_triton_nor_greenlet():
    code = "import sys, seqcore.testing.explorer; print(*{'triton', 'greenlet'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
