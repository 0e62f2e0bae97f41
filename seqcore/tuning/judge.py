"""Whether what a candidate computes may be timed at all: results first."""

import torch

from ..testing import verify
from ..testing.budget import check_budget
from .problem import Problem


class Judge:
    """Of the results of one problem's candidates, against float64 and what plain PyTorch makes in the same dtype."""

    def __init__(self, problem: Problem, device: torch.device):
        self.cases = [(case, *verify.yardsticks(case, problem.dtype)) for case in problem.cases(device)]

    def refusal(self) -> str | None:
        """Why results of the kernels, as they are launched now, are refused; None if they are within the budget."""
        for case, inputs, exact, eager in self.cases:
            try:
                actual = verify.compute(case, inputs, "triton")
            except Exception as error:
                return f"{case.name}: {type(error).__name__}: {str(error)[:300]}"
            for quantity, result in actual.items():
                budget = check_budget(result, exact[quantity], eager[quantity])
                if not budget.ok:
                    return f"{quantity} of {case.name} is outside the error budget: {budget}"
        return None
