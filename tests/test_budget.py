"""The error budget: what passes, what does not, and that it says why."""

import pytest
import torch

from seqcore.testing.budget import MEAN_RULE_FROM, assert_within_budget, check_budget

ROUNDING = torch.finfo(torch.float32).eps / 2


def exact_and_eager(size: int, eager_error: float) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.ones(size, dtype=torch.float64)
    return exact, (exact + eager_error).float()


def test_twice_the_eager_error_and_four_roundings_pass_and_more_does_not():
    exact, eager = exact_and_eager(10, eager_error=2**-10)
    allowed = 2 * 2**-10 + 4 * ROUNDING
    assert check_budget((exact + allowed).float(), exact, eager).ok
    assert not check_budget((exact + allowed + 2 * ROUNDING).float(), exact, eager).ok


def test_one_bad_element_among_many_fails_by_the_maximum():
    exact, eager = exact_and_eager(MEAN_RULE_FROM, eager_error=2**-10)
    actual = eager.clone()
    actual[17] = 1.01
    assert not check_budget(actual, exact, eager).ok


@pytest.mark.parametrize(("size", "passes"), [(MEAN_RULE_FROM - 1, True), (MEAN_RULE_FROM, False)])
def test_the_mean_rule_starts_at_a_thousand_elements(size, passes):
    exact, eager = exact_and_eager(size, eager_error=2**-10)
    # Everywhere 1.75 times the eager error: within the rule for the maximum, outside that for the mean.
    assert check_budget((exact + 1.75 * 2**-10).float(), exact, eager).ok is passes


def test_nan_fails_and_infinities_must_agree():
    exact, eager = exact_and_eager(3, eager_error=0.0)
    assert not check_budget(torch.tensor([1.0, float("nan"), 1.0]), exact, eager).ok
    exact[0] = eager[0] = float("-inf")
    assert check_budget(eager.clone(), exact, eager).ok
    assert not check_budget(torch.tensor([float("inf"), 1.0, 1.0]), exact, eager).ok
    assert not check_budget(torch.tensor([float("-inf"), float("-inf"), 1.0]), exact, eager).ok


def test_the_error_names_the_result_and_both_errors():
    exact, eager = exact_and_eager(3, eager_error=0.0)
    with pytest.raises(AssertionError, match=r"h_n \(3,\) torch.float32 is outside .* max error 1 \(allowed"):
        assert_within_budget(eager + 1, exact, eager, "h_n")


def test_what_cannot_be_judged_is_refused():
    exact, eager = exact_and_eager(3, eager_error=0.0)
    with pytest.raises(ValueError, match="float64"):
        check_budget(eager, eager, eager)
    with pytest.raises(ValueError, match="shapes differ"):
        check_budget(eager[:2], exact, eager)
