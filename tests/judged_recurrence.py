"""How calls of the recurrences that hypothesis has drawn are judged: by float64, and by what may not reach what."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .comparisons import assert_equal_in_float64, assert_within, cotangents, on_another_draw
from .drawn_recurrence import Call, Problem, as_x, rows_of, unread
from .recurrence_twins import differing


def storages(problem: Problem) -> list[bytes]:
    """All that the problem's tensors stand on, byte by byte, gaps too."""
    given = [*problem.leaves.values(), *([] if problem.reset is None else [problem.reset])]
    return [bytes(t.untyped_storage().tolist()) for t in given]


def judge(call: Call, others: list[str | None], device: torch.device | str = "cpu") -> None:
    """Hold what ``others`` make of a call to what the reference makes of it in float64; inputs stay as they were."""
    problem = Problem(call, device)
    before = storages(problem)
    exact, eager = problem.double(), problem.results("reference")
    for backend in others:
        found = problem.results(backend)
        if call.dtype == torch.float64:
            assert_equal_in_float64(found, exact)
        else:
            assert_within(found, exact, eager)
    assert storages(problem) == before


def on_a_second_seed(held: Callable[..., None], call: Call, *arguments: Any) -> None:
    """``held(call, …)``, with other numbers should the first leave the budget."""
    if call.dtype == torch.float64:
        held(call, *arguments)
    else:
        on_another_draw(lambda seed: held(replace(call, seed=seed), *arguments), call.seed)


def assert_unread_may_be_nan(call: Call, backend: str | None, device: torch.device | str = "cpu") -> None:
    """What no step reads may be NaN, and so may the gradient of y there: y and all gradients keep their bits."""
    problem = Problem(call, device)
    leaves, masks = problem.leaves, unread(problem)

    def filled(value):
        filled_in = {name: torch.where(mask.to(device), value, leaves[name]) for name, mask in masks.items()}
        problem.leaves = leaves | filled_in
        return problem.results(backend, past_the_end=value)

    found, clean = filled(torch.nan), filled(0.0)
    # The state of a sequence of no steps is handed on as it is.
    states = [f"output {index}" for index in (1, 2)]
    assert not differing(*({n: t for n, t in which.items() if n not in states} for which in (found, clean)))


def assert_stays_in_its_sequence(
    call: Call, t: int, b: int, value: float, backend: str | None, device: torch.device | str = "cpu"
) -> None:
    """NaN and infinite where the reference in float64 is, right elsewhere; other sequences as if nothing had been."""
    problem = Problem(call, device)
    # At an address like that of the one with NaN: a CPU's products may round by how their operands are aligned.
    problem.leaves["x"] = problem.leaves["x"].clone(memory_format=torch.contiguous_format)
    clean = problem.results(backend)
    rows = torch.zeros(call.T, call.B, 1, dtype=torch.bool)
    rows[t, b] = True
    x = problem.leaves["x"]
    problem.leaves["x"] = torch.where(as_x(call, rows).to(device), value, x)
    found, exact, eager = problem.results(backend), problem.double(), problem.results("reference")
    for name, expected in exact.items():
        nan = expected.isnan()
        assert torch.equal(found[name].isnan(), nan), name
        assert torch.equal(found[name][expected.isinf()].double(), expected[expected.isinf()]), name
        kept = ~nan & expected.isfinite()
        if call.dtype == torch.float64:
            assert_equal_in_float64({name: found[name][kept]}, {name: expected[kept]})
        else:
            assert_within({name: found[name][kept]}, {name: expected[kept]}, {name: eager[name][kept]})
    others = torch.arange(call.B) != b
    for name in ("output 0", "gradient of x") if not call.form.startswith("packed") else ("gradient of x",):
        here, there = (rows_of(call, results[name])[:, others] for results in (found, clean))
        assert torch.equal(here, there) and here.isfinite().all(), name


def assert_shared_memory_adds_up(
    call: Call, offsets: dict[str, int], backends: list[str | None], device: torch.device | str = "cpu"
) -> None:
    """Every input a view of one leaf, each at its offset, the same view where that is the same: gradients add up."""
    problem = Problem(call, device)
    shapes = {name: t.shape for name, t in problem.leaves.items()}
    torch.manual_seed(call.seed)
    size = max(offsets.get(name, 0) + shape.numel() for name, shape in shapes.items())
    shared = (torch.randn(size, dtype=call.dtype) / 2).to(device)

    def results(backend, dtype, apart):
        leaf, views = shared.to(dtype).detach().requires_grad_(), {}
        leaves = {}
        for name, shape in shapes.items():
            start = offsets.get(name, 0)
            view = leaf[start : start + shape.numel()].view(shape)
            leaves[name] = view.clone() if apart else views.setdefault((start, shape), view)
        outputs = problem.outputs(leaves, backend)
        [gradient] = torch.autograd.grad(outputs, [leaf], cotangents(outputs), materialize_grads=True)
        return {f"output {index}": out.detach() for index, out in enumerate(outputs)} | {"gradient": gradient}

    before = shared.clone()
    exact, eager = results("reference", torch.float64, apart=True), results("reference", call.dtype, apart=True)
    for backend in backends:
        found = results(backend, call.dtype, apart=False)
        if call.dtype == torch.float64:
            assert_equal_in_float64(found, exact)
        else:
            assert_within(found, exact, eager)
    assert torch.equal(shared, before)
