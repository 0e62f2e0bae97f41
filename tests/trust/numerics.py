"""Numbers: how far from the truth."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "A result errs at most twice as much as plain PyTorch does in the same precision, plus four roundings of the "
        "result's scale; large ones also in the mean, 1.5 times.",
        "Every numerical test judges by one helper, which is itself tested on both sides of each limit.",
        ("test_budget.py",),
    ),
]

GUARDS = [
    Guard(
        "the limit of the largest error",
        "seqcore/testing/budget.py",
        "max_allowed = 2 * eager_error",
        "max_allowed = 3 * eager_error",
        "test_budget.py::test_twice_the_eager_error_and_four_roundings_pass_and_more_does_not",
    ),
    Guard(
        "the limit of the mean error",
        "seqcore/testing/budget.py",
        "mean_error <= mean_allowed",
        "mean_error <= 2 * mean_allowed",
        "test_budget.py::test_the_mean_rule_starts_at_a_thousand_elements",
    ),
    Guard(
        "infinities must agree",
        "seqcore/testing/budget.py",
        "Budget(same_infinities and within,",
        "Budget(within,",
        "test_budget.py::test_nan_fails_and_infinities_must_agree",
    ),
]
