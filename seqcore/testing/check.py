"""Whether a cell of one's own computes what its reference says, forward and backward."""

import torch
from torch import Tensor

from .. import functional
from ..cells import Cell, find
from ..devices import INTERPRETED
from ..errors import UnsupportedInput
from .budget import assert_within_budget
from .precision import float32_products


def check_cell(
    cell: Cell | str, *, hidden: int = 40, steps: int = 5, batch: int = 5, dtype: torch.dtype = torch.float32
) -> None:
    """Hold a cell's Triton functions to its PyTorch reference, by running both over random sequences.

    Outputs and all gradients must lie within the error budget of ``seqcore.testing.budget``: both directions, one
    with sequences of several lengths. On a GPU the kernels run compiled; without one, in a process started with
    TRITON_INTERPRET=1, interpreted.

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
        for lengths in (None, torch.arange(batch, device=device) % steps + 1):
            tensors = _tensors(cell, hidden, steps, batch, dtype, device)
            actual = _results(cell, tensors, lengths, "triton")
            eager = _results(cell, tensors, lengths, "reference")
            exact = _results(cell, {name: t.double() for name, t in tensors.items()}, lengths, "reference")
            for name, value in actual.items():
                assert_within_budget(value, exact[name], eager[name], f"{cell.name}: {name}")


def _tensors(cell: Cell, hidden: int, steps: int, batch: int, dtype: torch.dtype, device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (steps, batch, hidden)} | {f"{state}0": (2, batch, hidden) for state in cell.states}
    for suffix in ("", "_reverse"):
        shapes |= {f"w_{kind}{suffix}": (cell.gates * hidden, hidden) for kind in ("ih", "hh")}
        shapes |= {f"b_{kind}{suffix}": (cell.gates * hidden,) for kind in ("ih", "hh")}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: (t * hidden**-0.5 if name[:2] in ("w_", "b_") else t).to(device, dtype) for name, t in drawn.items()
    }


def _results(cell: Cell, tensors: dict[str, Tensor], lengths: Tensor | None, backend: str) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    weights = [t for name, t in leaves.items() if name[:2] in ("w_", "b_")]
    hx = (leaves["h0"], leaves["c0"]) if cell.has_c else leaves["h0"]
    y, state = functional.recurrence(
        leaves["x"], hx, weights, cell=cell, bidirectional=True, lengths=lengths, backend=backend
    )
    outputs = {"y": y} | dict(zip(("h_n", "c_n"), state if cell.has_c else (state,), strict=False))
    generator = torch.Generator().manual_seed(1)
    # Eighths, which every dtype holds exactly.
    cotangents = [(torch.randint(-8, 9, t.shape, generator=generator) / 8).to(t) for t in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return {name: t.detach() for name, t in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


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
