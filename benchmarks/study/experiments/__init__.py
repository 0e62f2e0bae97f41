"""The experiments, in the order of the report."""

import importlib

from benchmarks.study.experiment import Experiment

NAMES = (
    "steps",
    "gradients",
    "clipping",
    "memory",
    "bottleneck",
    "intensity",
    "gru_lstm",
    "initialisation",
    "dropout",
    "transformers",
)


def load(name: str) -> Experiment:
    return importlib.import_module(f"{__name__}.{name}")
