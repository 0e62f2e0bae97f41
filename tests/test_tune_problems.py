"""What is tuned: candidates, what compiling them tells, and what is launched, judged and timed."""

import itertools
import os
from dataclasses import replace

import pytest
import torch

from seqcore.cells import LSTM, find
from seqcore.kernels import tuning
from seqcore.kernels.recurrence import plan
from seqcore.testing import aot
from seqcore.testing.launches import compiled_for
from seqcore.testing.precision import float32_products
from seqcore.tuning import ahead, problems, search
from seqcore.tuning.attention import Attention
from seqcore.tuning.judge import Judge
from seqcore.tuning.race import Deadline, OutOfTime
from seqcore.tuning.recurrence import Recurrence

from .tuning_stubs import CPU, FOREVER, H200, FakeClock, Here, Stub, bench

# --- candidates ----------------------------------------------------------------------------------------------


def test_every_problem_has_a_name_of_its_own_and_the_most_valuable_come_first():
    names = [problem.name for problem in problems.problems()]
    assert len(set(names)) == len(names)
    assert names[0] == "attention_forward bfloat16 D=128"
    assert names.index("lstm forward bfloat16 H=1024 B=16") < names.index("attention_forward float32 D=128")
    assert {p.dtype for p in problems.problems(["lstm"], ["float16"])} == {torch.float16}
    assert {p.operation for p in problems.problems(["rnn"])} == {"rnn_tanh"}


PROBLEMS = [
    problem
    for problem in problems.problems()
    if isinstance(problem, Attention) or (problem.hidden in (256, 768) and problem.batch == 16)
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_candidates_are_what_will_be_launched_the_present_choice_first(problem):
    found = problem.candidates(H200)
    assert len(found) > 8 and all(found.count(fields) == 1 for fields in found)
    if isinstance(problem, Recurrence):
        made, other = [plan.make(problem.shape, H200)], replace(problem.shape, backward=not problem.backward)
        before = plan.make(other, H200)
        for fields in found:
            with problem.using(fields):
                made.append(plan.make(problem.shape, H200))
                assert plan.make(other, H200) == before, "backward is tuned with forward as it is"
        assert all(m.shared_memory <= H200.shared_memory and m.rows <= 16 for m in made)
        assert [{name: getattr(m, name) for name in found[0]} for m in made] == [found[0], *found]
    else:
        tiles = tuning.attention_tiles(
            problem.section, problem.head_dim, 8 * problem.dtype.itemsize, H200, problem._masked
        )
        assert found[0] == tiles.row()
    for entry in problem.entries(found[-1], H200):
        source = aot.specialised_source(entry)
        assert list(source.signature) == [p.name for p in aot.resolve(entry.kernel).params]
        sizes = {name: entry.constants[name] for name in ("BLOCK_M", "BLOCK_N") if name in found[-1]}
        assert sizes.items() <= found[-1].items() or problem.kernel == "decode"


def test_what_is_dropped_is_neither_launched_nor_timed():
    class Compiler(Here):
        def rows(self, entries, deadline):
            takes = {"registers": 1, "spills": 0, "tensor_memory": 0}
            return [takes | {"shared": 0 if entry else 1 << 30} for entry in entries]

        def launches(self, problem, candidates, device, deadline):
            self.launched = candidates

    class Compilable(Stub):
        def entries(self, fields, device):
            return [fields["BLOCK_M"] != 32] * 2

    problem, clock, compiler = Compilable([1.0, 0.5, 0.8]), FakeClock(), Compiler()
    present, _, faster = problem.candidates(H200)
    found = search.search(problem, replace(bench(clock), compiler=compiler))
    assert found["choice"] == faster and 0.5 not in clock.calls
    assert found["dropped"] == {ahead.TOO_LARGE: 1} and compiler.launched == [present, faster]


SMALLEST = [Recurrence(LSTM, backward, torch.float16, hidden=32, batch=16) for backward in (False, True)]


# --- compiled ahead of time ----------------------------------------------------------------------------------


def test_what_takes_too_much_shared_memory_is_dropped():
    problem = Attention("decode", torch.float16, 16)
    little = replace(H200, shared_memory=8 << 10)
    present = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    verdicts = ahead.compiled(problem, [present, present | {"BLOCK_N": 256}], little, Here(), FOREVER)
    assert [verdict.dropped for verdict in verdicts] == [None, ahead.TOO_LARGE]
    assert verdicts[0].row["shared"] <= little.shared_memory < verdicts[1].row["shared"]


def test_what_spills_or_does_not_compile_is_dropped_but_not_the_present_choice():
    takes = {"registers": 255, "shared": 0, "tensor_memory": 0}
    plain = [takes | {"spills": spills} for spills in (400, 0, 32, 40)] + [{"registers": None, "error": "it fails"}]
    # Of those that are left, with features: the second of them needs more tensor memory than there is.
    many = [takes | {"spills": 500}, takes | {"tensor_memory": 1024}, takes | {"spills": 500}]

    class Rows(Here):
        answers = itertools.chain([plain, many])

        def rows(self, entries, deadline):
            answer = next(self.answers)
            assert len(answer) == len(entries)
            return answer

    class Compilable(Stub):
        def entries(self, fields, device):
            return [None, None]

    problem = Compilable([1.0] * 5)
    verdicts = ahead.compiled(problem, problem.candidates(H200), H200, Rows(), FOREVER)
    assert [verdict.dropped for verdict in verdicts] == [
        None, ahead.TOO_LARGE, None, ahead.SPILLS, ahead.NOT_COMPILED,
    ]  # fmt: skip


def test_processes_compile_in_the_order_they_are_asked_even_after_a_crash():
    problem = Attention("decode", torch.float16, 16)
    entries = [
        problem.entries({"BLOCK_M": 64, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}, H200)[0] for n in (32, 16)
    ]
    with ahead.Compiler(1) as compiler:
        # As a crash of the compiler would.
        assert compiler._pool.submit(os._exit, 1).exception()
        rows = compiler.rows(entries, FOREVER)
        with pytest.raises(OutOfTime):
            compiler.rows(entries, Deadline(-1))
    assert [row["configuration"] for row in rows] == [entry.configuration for entry in entries]
    assert all(row["registers"] for row in rows)


@pytest.mark.parametrize(
    "problem",
    [Attention("decode", torch.float16, 16, batch=8, heads=32, heads_kv=8, judged=(1, 5000)), *SMALLEST],
    ids=lambda problem: problem.name,
)
def test_what_will_be_launched_is_compiled_before(problem, tmp_path, monkeypatch):
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (fields, *_), cached = problem.candidates(H200), []
    with ahead.Compiler(1) as compiler:
        compiler.launches(problem, [fields], H200, FOREVER)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: cached.append(cache_hit))
    with compiled_for(H200), problem.using(fields), float32_products(problem.precision):
        problem.call(CPU)()
    assert cached and all(cached)


# --- rows, and what is launched ------------------------------------------------------------------------------


def test_tiles_with_a_mask_stay_what_they_were():
    """``row`` says what to change for a mask, and what was chosen without one was not measured with one."""
    problem = Attention("forward", torch.bfloat16, 128)
    before = tuning.attention_tiles("attention_forward", 128, 16, H200, masked=True)
    chosen = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}
    for options in ({}, {"persistent": 1}, {"descriptors": True}):
        row = problem.row(chosen | options, H200)
        assert tuning.Tiles.of(row) == tuning.Tiles(64, 32, 4, 4, **options)
        assert tuning.Tiles.of(row | row["masked"]) == before


@pytest.mark.kernels
def test_the_judge_sees_a_wrong_kernel(monkeypatch, device):
    from seqcore.ops import attention_launch

    problem = problems.tiny(["attention"])[0]
    judge = Judge(problem, device)
    assert judge.refusal() is None
    right = attention_launch.forward
    monkeypatch.setattr(attention_launch, "forward", lambda *inputs: (right(*inputs)[0] * 1.01, *right(*inputs)[1:]))
    assert "out of attention" in judge.refusal()


TINY = {"batch": 1, "heads": 4, "heads_kv": 2, "keys": 40, "judged": (37, 20)}


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv", "backward_bias", "weights"])
def test_what_is_timed_of_attention_launches_the_kernel_in_its_tiles(kernel, device, monkeypatch):
    problem = Attention(kernel, torch.float32, 16, **TINY)
    asked = []
    listed = tuning.attention_tiles
    monkeypatch.setattr(tuning, "attention_tiles", lambda name, *given: asked.append(name) or listed(name, *given))
    call = problem.call(device)
    asked.clear()
    assert all(
        torch.isfinite(t).all()
        for found in call()
        for t in (found if isinstance(found, tuple) else (found,))
        if t.numel()
    )
    assert problem.section in asked
    assert problem.contest is None or all(problem.contestant(device, name)() for name in ("triton", "aten"))


@pytest.mark.kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_recurrences_are_compared_with_torchs_own(name, backward, device):
    problem = Recurrence(find(name), backward, torch.float32, hidden=20, batch=3, directions=2, steps=3)
    for backend in ("triton", "aten"):
        assert problem.contestant(device, backend)() is not None
    assert len(problem.call(device)()) == (4 if backward else 6)
