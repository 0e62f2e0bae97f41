"""Tools for testing numerics: error budgets and the ahead-of-time compiler."""
