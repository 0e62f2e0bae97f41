"""The numerics of every kernel on the device at hand: each result against float64, within the error budget.

On a GPU the kernels run compiled, in every dtype and at sizes that fill many tiles; interpreted on a CPU the shapes
are small. Each case runs twice, and the two results must agree in every bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .. import functional
from ..backends import INTERPRETED
from ..reference.recurrence import GATES
from .budget import check_budget

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Something to compute with any backend. ``run(tensors, backend)`` returns outputs by name.

    ``kernels`` says which kernels make which result: a result's name maps to them, gradients of input x as "dx".
    """

    name: str
    tensors: dict[str, Tensor]
    run: Callable[[Results, str], Results]
    kernels: dict[str, str]


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

    @property
    def ok(self) -> bool:
        return self.within_budget and self.repeatable


def dtypes() -> tuple[torch.dtype, ...]:
    """Those the kernels take here: Triton's interpreter miscomputes bfloat16 products."""
    return (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def verify(device: torch.device) -> Iterator[Row]:
    """Run every case in every dtype on ``device``, which is a GPU, or the CPU in a process that interprets kernels."""
    for case in (*_recurrences(device), *_attentions(device)):
        for dtype in dtypes():
            yield from _judge(case, dtype)


def _judge(case: Case, dtype: torch.dtype) -> Iterator[Row]:
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.tensors.items()}
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact, eager = _compute(case, doubled, "reference"), _compute(case, inputs, "reference")
    actual, again = _compute(case, inputs, "triton"), _compute(case, inputs, "triton")
    for quantity, result in actual.items():
        budget = check_budget(result, exact[quantity], eager[quantity])
        yield Row(
            kernel=case.kernels.get(quantity, case.kernels["default"]),
            case=case.name,
            quantity=quantity,
            dtype=str(dtype).removeprefix("torch."),
            max_error=budget.max_error,
            max_allowed=budget.max_allowed,
            mean_error=budget.mean_error,
            mean_allowed=budget.mean_allowed,
            within_budget=budget.ok,
            repeatable=torch.equal(result, again[quantity]),
        )


def _compute(case: Case, inputs: Results, backend: str) -> Results:
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


def _recurrences(device: torch.device) -> Iterator[Case]:
    T, B, inputs, hidden = (4, 5, 3, 31) if INTERPRETED else (32, 17, 96, 257)
    backward = "pointwise_backward_kernel"
    for cell in GATES:
        # No relu: its slope jumps at 0, where two right answers may differ by the whole gradient.
        if cell == "rnn_relu":
            continue
        for lengths in (False, True):
            generator = torch.Generator().manual_seed(0)
            tensors = {"x": torch.randn(T, B, inputs, generator=generator)}
            tensors |= {"h0": torch.randn(2, B, hidden, generator=generator)}
            if cell == "lstm":
                tensors["c0"] = torch.randn(2, B, hidden, generator=generator)
            for suffix in ("", "_reverse"):
                for kind, columns in (("w_ih", inputs), ("w_hh", hidden), ("b_ih", None), ("b_hh", None)):
                    shape = (GATES[cell] * hidden,) if columns is None else (GATES[cell] * hidden, columns)
                    tensors[kind + suffix] = torch.randn(shape, generator=generator) * hidden**-0.5
            if lengths:
                tensors["lengths"] = torch.arange(B) % T + 1
            quantities = {f"d{name}": backward for name in tensors}
            yield Case(
                name=f"{cell} T={T} B={B} H={hidden} both directions" + (" ragged" if lengths else ""),
                tensors={name: t.to(device) for name, t in tensors.items()},
                run=_run_recurrence(cell),
                kernels={"default": "pointwise_forward_kernel", **quantities},
            )


def _run_recurrence(cell: str) -> Callable[[Results, str], Results]:
    def run(tensors: Results, backend: str) -> Results:
        weights = [t for name, t in tensors.items() if name[:2] in ("w_", "b_")]
        hx = (tensors["h0"], tensors["c0"]) if cell == "lstm" else tensors["h0"]
        function = {"rnn_tanh": functional.rnn, "gru": functional.gru, "lstm": functional.lstm}[cell]
        y, state = function(
            tensors["x"], hx, weights, bidirectional=True, lengths=tensors.get("lengths"), backend=backend
        )
        return {"y": y, "h_n": state[0], "c_n": state[1]} if cell == "lstm" else {"y": y, "h_n": state}

    return run


def _attentions(device: torch.device) -> Iterator[Case]:
    sizes = [(333, 517, 64), (517, 333, 128), (130, 257, 96), (65, 190, 256)]
    if INTERPRETED:
        sizes = [(37, 20, 20), (20, 37, 40)]
    backward = "attention_backward_delta_kernel, attention_backward_{}_kernel"
    kernels = {"default": "attention_forward_kernel", "dq": backward.format("dq")}
    kernels |= dict.fromkeys(("dk", "dv"), backward.format("dkdv"))
    for M, N, D in sizes:
        for causal in (None, "top_left", "lower_right"):
            for mask in ("none", "bool", "additive"):
                generator = torch.Generator().manual_seed(0)
                tensors = {"q": torch.randn(2, 4, M, D, generator=generator)}
                tensors |= {name: torch.randn(2, 2, N, D, generator=generator) for name in "kv"}
                additive = None
                if mask == "bool":
                    tensors["mask"] = torch.rand(2, 1, M, N, generator=generator) > 0.3
                elif mask == "additive":
                    additive = torch.randn(M, N, generator=generator).half().to(device)
                yield Case(
                    name=f"attention M={M} N={N} D={D} causal={causal} mask={mask}",
                    tensors={name: t.to(device) for name, t in tensors.items()},
                    run=_run_attention(causal, additive),
                    kernels=kernels,
                )


def _run_attention(causal: str | None, additive: Tensor | None) -> Callable[[Results, str], Results]:
    def run(tensors: Results, backend: str) -> Results:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        mask = tensors.get("mask") if additive is None else additive.to(q.dtype)
        out, lse = functional.attention(
            q, k, v, attn_mask=mask, causal=causal, enable_gqa=True, return_lse=True, backend=backend
        )
        return {"out": out, "lse": lse}

    return run


def as_json(rows: list[Row]) -> list[dict]:
    """Rows as plain dictionaries."""
    return [asdict(row) | {"ok": row.ok} for row in rows]
