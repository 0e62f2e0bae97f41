"""The numerics of every kernel on the device at hand: each result against float64, within the error budget.

On a GPU the kernels run compiled, in every dtype and at sizes that fill many tiles; interpreted on a CPU the shapes
are small. Each case runs twice, and the two results must agree in every bit; ``guarded``, the first time between guard
bands, so that what a kernel touches beside its tensors is found, too, before it does harm.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from ..devices import INTERPRETED
from ..journal import Journal
from .attention_cases import attentions
from .budget import check_budget
from .cases import Case, Results, dtype_name, floats_as, recurrences
from .guarded import guarded as guards
from .precision import float32_products
from .shares import Share

# In the place of a quantity.
NO_RESULT = "no result"
# Characters of an error message; Triton's hold the source.
MOST_SAID = 2000


@dataclass(frozen=True)
class Row:
    """One quantity of one case in one dtype; errors are absolute, in the quantity's own units."""

    kernel: str
    case: str
    quantity: str
    dtype: str
    max_error: float
    max_allowed: float
    mean_error: float
    mean_allowed: float
    within_budget: bool
    repeatable: bool
    # Why there is no result, if there is none.
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.within_budget and self.repeatable


def dtypes() -> tuple[torch.dtype, ...]:
    """Those the kernels take here: Triton's interpreter miscomputes bfloat16 products."""
    return (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def verify(
    device: torch.device,
    only: str = "",
    journal: Journal | None = None,
    share: Share | None = None,
    guarded: bool = False,
) -> Iterator[Row]:
    """Run every case in every dtype on ``device``, which is a GPU, or the CPU in a process that interprets kernels.

    float32 means float32: torch's switches for TF32 are off meanwhile. ``only`` is for cases whose name contains it,
    ``share`` for a part of all. What stands in ``journal`` is taken from there; what was begun there and never
    finished comes last.
    """
    with float32_products("ieee"):
        problems = [problem for problem in _problems(device) if only in problem[0].name]
        problems = problems if share is None else share.of(problems)
        if journal is not None:
            problems = journal.suspects_last(problems, lambda problem: _name(*problem))
        for case, dtype in problems:
            yield from _tried(case, dtype, guarded) if journal is None else _journalled(case, dtype, journal, guarded)


def _problems(device: torch.device) -> list[tuple[Case, torch.dtype]]:
    return [(case, dtype) for case in (*recurrences(device), *attentions(device)) for dtype in dtypes()]


def kernels_left(device: torch.device, rows: list[Row]) -> list[str]:
    """The kernels of which some case is not among ``rows``: nothing is to be said of them yet."""
    judged = {f"{row.case} {row.dtype}" for row in rows}
    left = (case.kernels.values() for case, dtype in _problems(device) if _name(case, dtype) not in judged)
    return sorted({kernel for several in left for names in several for kernel in names.split(", ")})


def finished(journal: Journal) -> list[Row]:
    """The rows of all that stands in ``journal``."""
    return [Row(**row) for rows in journal.done.values() for row in rows]


def _name(case: Case, dtype: torch.dtype) -> str:
    return f"{case.name} {dtype_name(dtype)}"


def _journalled(case: Case, dtype: torch.dtype, journal: Journal, guarded: bool) -> list[Row]:
    """The problem's rows from the journal, or judged now and written there."""
    name = _name(case, dtype)
    if name not in journal:
        journal.begin(name)
        journal.add(name, [asdict(row) for row in _tried(case, dtype, guarded)])
    return [Row(**row) for row in journal.done[name]]


def _tried(case: Case, dtype: torch.dtype, guarded: bool = False) -> list[Row]:
    """The problem's rows; of one that raises, a row for each of its kernels, since any of them may be at fault.

    Raises:
        RuntimeError: if the GPU answers no more, since whatever came after would fail of it too.
        OSError: of the machine, of which no kernel can be at fault.
    """
    try:
        return list(_judge(case, dtype, guarded))
    except OSError:
        raise
    except Exception as error:
        if next(iter(case.tensors.values())).is_cuda:
            torch.cuda.synchronize()
        errors = dict.fromkeys(("max_error", "max_allowed", "mean_error", "mean_allowed"), 0.0)
        errors |= {"within_budget": False, "repeatable": False, "error": f"{type(error).__name__}: {error}"[:MOST_SAID]}
        kernels = dict.fromkeys(case.kernels.values())
        return [Row(kernel, case.name, NO_RESULT, dtype_name(dtype), **errors) for kernel in kernels]


def _judge(case: Case, dtype: torch.dtype, guarded: bool) -> Iterator[Row]:
    inputs, exact, eager = yardsticks(case, dtype)
    with guards() if guarded else contextlib.nullcontext():
        actual = compute(case, inputs, "triton")
    again = compute(case, inputs, "triton")
    for quantity, result in actual.items():
        budget = check_budget(result, exact[quantity], eager[quantity])
        yield Row(
            kernel=case.kernels.get(quantity, case.kernels["default"]),
            case=case.name,
            quantity=quantity,
            dtype=dtype_name(dtype),
            max_error=budget.max_error,
            max_allowed=budget.max_allowed,
            mean_error=budget.mean_error,
            mean_allowed=budget.mean_allowed,
            within_budget=budget.ok,
            repeatable=torch.equal(result, again[quantity]),
        )


def yardsticks(case: Case, dtype: torch.dtype) -> tuple[Results, Results, Results]:
    """The case's inputs in ``dtype``, and what plain PyTorch makes of them: exactly, in float64, and as it is."""
    inputs = floats_as(dtype, case.tensors)
    exact, eager = (compute(case, given, "reference") for given in (floats_as(torch.float64, inputs), inputs))
    return inputs, exact, eager


def compute(case: Case, inputs: Results, backend: str) -> Results:
    """Outputs by name, and the gradient of each floating input x as "dx", for a fixed random cotangent."""
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    outputs = case.run(leaves, backend)
    generator = torch.Generator().manual_seed(1)
    # Drawn in float16 so that the cotangent is the same number in every dtype.
    cotangents = [torch.randn(t.shape, generator=generator).half().to(t) for t in outputs.values()]
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    gradients = torch.autograd.grad(list(outputs.values()), [leaves[name] for name in wanted], cotangents)
    found = {name: t.detach() for name, t in outputs.items()}
    return found | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def as_json(rows: list[Row]) -> list[dict]:
    """Rows as plain dictionaries."""
    return [asdict(row) | {"ok": row.ok} for row in rows]
