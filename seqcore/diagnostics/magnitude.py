"""Arithmetic on gradients whose squares no format holds, and the limits that verdicts go by."""

import math

import torch
from torch import Tensor

# Between the two ends of a sequence; what stays within them is "steady".
DECADES = 3.0


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` without its graph in float64, on its own device if that has float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def row_norms(rows: Tensor) -> Tensor:
    """The norm of each row of [T, N], [T] float64 on the CPU, also where squares would underflow or overflow."""
    rows = wide(rows)
    if not rows.shape[1]:
        return torch.zeros(len(rows), dtype=torch.float64)
    largest = rows.abs().amax(1)
    scalable = largest.isfinite() & (largest > 0)
    scaled = rows / torch.where(scalable, largest, 1)[:, None]
    return torch.where(scalable, largest * torch.linalg.vector_norm(scaled, dim=1), largest).cpu()


def verdict(decades: float, limit: float) -> str:
    """What to call a change by 10 ** ``decades`` from one end to the other; NaN and infinite growth explode."""
    if decades < -limit:
        return "vanishing"
    return "exploding" if math.isnan(decades) or decades > limit else "steady"


def change(decades: float, rate: float, steps: int, limit: float) -> str:
    """In words: a change by 10 ** ``decades`` over ``steps``, that is by the factor ``rate`` a step."""
    found = verdict(decades, limit)
    if found == "vanishing":
        return f"shrinks by {rate:.3g} a step: after {steps:,} steps {power(decades)} of it is left"
    if found == "exploding":
        return f"grows by {rate:.3g} a step: after {steps:,} steps it is {power(decades)} times as large"
    times = f"{power(decades)} times as large after {steps:,} steps"
    return f"stays within {limit:g} decades: by {rate:.3g} a step, {times}"


def power(decades: float) -> str:
    """10 ** ``decades`` in two digits, also beyond what a float holds."""
    if -4 <= decades < 4:
        return f"{10**decades:.2g}"
    exponent = math.floor(decades)
    digits = f"{10 ** (decades - exponent):.1f}"
    return f"1.0e{exponent + 1:+03d}" if digits == "10.0" else f"{digits}e{exponent:+03d}"
