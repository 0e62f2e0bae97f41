"""The one statement of how far a result may lie from the truth.

A result in some precision is judged against float64, with the error that plain PyTorch makes in that same precision
as the yardstick:

    max |actual - exact|  <=  2 * max |eager - exact| + 4 u max |exact|
    mean |actual - exact| <=  1.5 * mean |eager - exact| + u mean |exact|      from 1,000 elements on

where u = eps / 2 is one rounding of the dtype. The mean rule is left to large tensors: on tiny ones an equally good
loop breaks it by chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput

MEAN_RULE_FROM = 1_000


@dataclass(frozen=True)
class Budget:
    """Errors of one tensor and what is allowed; all in the tensor's own units."""

    ok: bool
    max_error: float
    max_allowed: float
    mean_error: float
    mean_allowed: float

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}), "
            f"mean error {self.mean_error:.3g} (allowed {self.mean_allowed:.3g})"
        )


def check_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> Budget:
    """Judge ``actual`` against float64 ``exact``, allowing for the error of ``eager``.

    Args:
        actual: the result under test, in any float dtype.
        exact: the same quantity computed in float64.
        eager: the same quantity computed by plain PyTorch in ``actual``'s dtype.

    Raises:
        InvalidInput: if shapes or dtypes do not match, ``exact`` is not float64, or there are no numbers to compare.
    """
    for name, tensor in (("actual", actual), ("exact", exact), ("eager", eager)):
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            got = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidInput(f"check_budget: {name} must be a dense Tensor that holds numbers, got {got}")
    if not actual.is_floating_point():
        raise InvalidInput(f"check_budget: actual must be floating point, got {actual.dtype}; compare others exactly")
    if exact.dtype != torch.float64 or eager.dtype != actual.dtype:
        raise InvalidInput(
            f"check_budget: need exact in float64 and eager in actual's dtype, got exact {exact.dtype}, "
            f"eager {eager.dtype}, actual {actual.dtype}"
        )
    if not actual.shape == exact.shape == eager.shape:
        shapes = f"{list(actual.shape)}, {list(exact.shape)} and {list(eager.shape)}"
        raise InvalidInput(f"check_budget: shapes differ: actual, exact and eager need one, got {shapes}")
    if actual.numel() == 0:
        return Budget(True, 0.0, 0.0, 0.0, 0.0)
    rounding = torch.finfo(actual.dtype).eps / 2
    actual, exact, eager = (x.detach().to("cpu", torch.float64) for x in (actual, exact, eager))
    # Infinite entries (a log-sum-exp over no key) must agree exactly, and then carry no error.
    infinite = exact.isinf()
    same_infinities = torch.equal(actual[infinite], exact[infinite])
    actual, exact, eager = actual[~infinite], exact[~infinite], eager[~infinite]
    if exact.numel() == 0:
        return Budget(same_infinities, 0.0, 0.0, 0.0, 0.0)
    error, eager_error, scale = (actual - exact).abs(), (eager - exact).abs(), exact.abs()
    max_error, mean_error = error.max().item(), error.mean().item()
    max_allowed = 2 * eager_error.max().item() + 4 * rounding * scale.max().item()
    mean_allowed = 1.5 * eager_error.mean().item() + rounding * scale.mean().item()
    # Comparisons with NaN are False, so a NaN anywhere in `actual` fails.
    within = max_error <= max_allowed and (error.numel() < MEAN_RULE_FROM or mean_error <= mean_allowed)
    return Budget(same_infinities and within, max_error, max_allowed, mean_error, mean_allowed)


def assert_within_budget(actual: Tensor, exact: Tensor, eager: Tensor, name: str = "result") -> None:
    """Raise AssertionError naming ``name`` and both errors if ``check_budget`` does not pass."""
    budget = check_budget(actual, exact, eager)
    if not budget.ok:
        raise AssertionError(f"{name} {tuple(actual.shape)} {actual.dtype} is outside the error budget: {budget}")
