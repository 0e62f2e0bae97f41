"""What ``verify`` computes: every kernel, in every regime, at sizes for a GPU or, interpreted, for a CPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from .. import functional
from ..cells import BUILT_IN, RNN_RELU, Cell
from ..devices import INTERPRETED

Results = dict[str, Tensor]


def floats_as(dtype: torch.dtype, tensors: Results) -> Results:
    """The tensors, those that are floating point in ``dtype``."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without the module."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """Something to compute with any backend. ``run(tensors, backend)`` returns outputs by name.

    ``kernels`` says which kernels make which result: a result's name maps to them, gradients of input x as "dx".
    """

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[Results, str], Results]
    kernels: dict[str, str]


# T, B, I, H and blocks. On a GPU: a single step, all weights in one program, spread with and without padded tiles, in
# 16 rows and in 64 and more, streaming, in blocks. Interpreted: the same kernels, small.
RECURRENCES = (
    [(1, 5, 8, 31, 1), (4, 5, 8, 31, 1), (3, 17, 8, 65, 1), (3, 5, 8, 34, 2)]
    if INTERPRETED
    else [
        (1, 17, 96, 257, 1), (33, 5, 96, 64, 1), (33, 17, 96, 257, 1), (17, 16, 128, 768, 1), (9, 70, 96, 650, 1),
        (9, 150, 64, 1024, 1), (5, 16, 64, 2048, 1), (33, 17, 96, 768, 12),
    ]
)  # fmt: skip


LAYOUTS = ("padded", "ragged and reset", "packed", "recomputed and clipped")
# In expectation, which draws nothing; the same kernels with other steps, so that one shape will do.
ZONED = "zoned out"


def recurrences(device: torch.device) -> Iterator[Case]:
    for cell in BUILT_IN:
        # No relu: its slope jumps at 0, where two right answers may differ by the whole gradient.
        if cell is RNN_RELU:
            continue
        for shape in RECURRENCES:
            for layout in LAYOUTS if shape[0] > 1 else LAYOUTS[:1]:
                yield recurrence_case(cell, *shape, layout, device)
        yield recurrence_case(cell, *RECURRENCES[2], ZONED, device)


def recurrence_case(
    cell: Cell, T: int, B: int, inputs: int, hidden: int, blocks: int, layout: str, device: torch.device,
    directions: int = 2,
) -> Case:  # fmt: skip
    """One of ``LAYOUTS``, or ``ZONED``; a single step has one direction."""
    generator = torch.Generator().manual_seed(0)
    directions = 1 if T == 1 else directions
    tensors = {"x": torch.randn(T, B, inputs, generator=generator)}
    for state in cell.states:
        tensors[f"{state}0"] = torch.randn(directions, B, hidden, generator=generator)
    units = hidden // blocks
    recurrent = (cell.gates * hidden, hidden) if blocks == 1 else (cell.gates, blocks, units, units)
    for suffix in ("", "_reverse")[:directions]:
        for kind, size in (
            ("w_ih", (cell.gates * hidden, inputs)), ("w_hh", recurrent),
            ("b_ih", (cell.gates * hidden,)), ("b_hh", (cell.gates * hidden,)),
        ):  # fmt: skip
            tensors[kind + suffix] = torch.randn(size, generator=generator) * units**-0.5
    if layout in ("ragged and reset", "packed"):
        tensors["lengths"] = torch.arange(B) % T + 1
    if layout == "ragged and reset":
        tensors["reset"] = torch.rand(T, B, generator=generator) < 0.2
    forward = "recurrence_step_kernel" if T == 1 else "recurrence_forward_kernel"
    backward = "recurrence_backward_kernel"
    if layout == "recomputed and clipped":
        backward = f"pointwise_kernel, {backward}"
    return Case(
        name=f"{cell.name} T={T} B={B} H={hidden}" + (f" in {blocks} blocks" if blocks > 1 else "") + f" {layout}",
        tensors={name: t.to(device) for name, t in tensors.items()},
        run=_run_recurrence(cell, layout),
        kernels={"default": forward} | {f"d{name}": backward for name in tensors},
    )


def _run_recurrence(cell: Cell, layout: str) -> Callable[[Results, str], Results]:
    packed = layout == "packed"
    of_layout = {"recomputed and clipped": {"recompute": True, "grad_clip": 0.25}, ZONED: {"zoneout": 0.25}}
    options = of_layout.get(layout, {})

    def run(tensors: Results, backend: str) -> Results:
        weights = [t for name, t in tensors.items() if name[:2] in ("w_", "b_")]
        hx = (tensors["h0"], tensors["c0"]) if cell.has_c else tensors["h0"]
        x, masks = tensors["x"], {name: tensors.get(name) for name in ("lengths", "reset")}
        if packed:
            x = pack_padded_sequence(x, masks.pop("lengths").cpu(), enforce_sorted=False)
        y, state = functional.recurrence(
            x, hx, weights, cell=cell, bidirectional=len(weights) == 8, backend=backend, **masks, **options
        )
        found = {"y": y.data if packed else y}
        return found | dict(zip(("h_n", "c_n"), state if cell.has_c else (state,), strict=False))

    return run
