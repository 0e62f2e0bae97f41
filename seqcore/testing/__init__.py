"""Tools for testing numerics: error budgets, the check of a cell, the ahead-of-time compiler, the schedule explorer."""

from .budget import assert_within_budget, check_budget
from .check import check_cell
from .explorer import Deadlock, explore

__all__ = ["Deadlock", "assert_within_budget", "check_budget", "check_cell", "explore"]
