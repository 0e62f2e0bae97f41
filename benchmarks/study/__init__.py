"""The study: what is commonly taught about recurrence and attention, each claim measured and judged.

``python -m benchmarks.study`` runs every experiment and writes the report, ``python -m benchmarks.study NAME`` one of
them. An experiment is a file in ``experiments/``: its cases, how one is measured, and how claims are judged and drawn
from the rows alone. Everything else here is common to them.
"""
