"""Whether a cell of one's own computes what its reference says, forward and backward."""

import torch
from torch import Tensor

from ..cells import Cell, find
from ..devices import INTERPRETED
from ..errors import UnsupportedInput
from .budget import assert_within_budget
from .cases import recurrence_case
from .precision import float32_products
from .verify import compute, yardsticks


def check_cell(
    cell: Cell | str, *, hidden: int = 40, steps: int = 5, batch: int = 5, dtype: torch.dtype = torch.float32
) -> None:
    """Hold a cell's Triton functions to its PyTorch reference, by running both over random sequences.

    Outputs and all gradients must lie within the error budget of ``seqcore.testing.budget``: both directions, once with
    sequences of several lengths that are reset in between. On a GPU the kernels run compiled; without one, in a process
    started with TRITON_INTERPRET=1, interpreted.

    Args:
        cell: a ``seqcore.Cell`` or its name.
        hidden, steps, batch: sizes of the sequences.
        dtype: float32, float16 or, on a GPU, bfloat16.

    Raises:
        AssertionError: names the result that is off, its errors and what is allowed.
        UnsupportedInput: if kernels can run neither on a GPU nor interpreted here.
    """
    cell = find(cell)
    if not torch.cuda.is_available() and not INTERPRETED:
        raise UnsupportedInput(
            f"check_cell({cell.name!r}) runs kernels, and here is no GPU; to interpret them, start Python with "
            "TRITON_INTERPRET=1"
        )
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if cell.reference_backward is not None:
        _check_reference_backward(cell)
    # Against float64 and float32 as such, whatever torch's switch for TF32 says.
    with float32_products("ieee"):
        for layout in ("padded", "ragged and reset"):
            case = recurrence_case(cell, steps, batch, hidden, hidden, 1, layout, device)
            inputs, exact, eager = yardsticks(case, dtype)
            for name, value in compute(case, inputs, "triton").items():
                assert_within_budget(value, exact[name], eager[name], f"{cell.name}, {layout}: {name}")


def _check_reference_backward(cell: Cell) -> None:
    """The hand-written PyTorch backward against autograd, in float64."""

    def draw(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(4, 6, dtype=torch.float64).requires_grad_() for _ in range(count))

    x_gates, h_gates, state = draw(cell.gates), draw(cell.gates), draw(len(cell.states))
    new_state, saved = cell.reference((*x_gates, *draw(cell.extra)), h_gates, state)
    dstate = tuple(torch.randn_like(t) for t in new_state)
    wanted = torch.autograd.grad(
        new_state, (*x_gates, *h_gates, *state), dstate, materialize_grads=True, allow_unused=True
    )
    detached = [tuple(t.detach() for t in part) for part in (saved, state, new_state)]
    found = [t for part in cell.reference_backward(*detached, dstate) for t in part]
    parts = zip(("x_gates", "h_gates", "state"), (x_gates, h_gates, state), strict=True)
    names = [f"{kind}[{i}]" for kind, part in parts for i in range(len(part))]
    for name, actual, expected in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(
            actual, expected, msg=lambda text, name=name: f"{cell.name}: reference_backward, gradient {name}: {text}"
        )
