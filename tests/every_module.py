"""Every module of seqcore.nn that has a twin in torch.nn, small and by name: for what has to hold of all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import recurrence_twins, transformer_twins
from .comparisons import Results
from .recurrence_twins import CELLS, SINGLE, tensors, torch_module

STEPS = {f"{cell} cell": cell for cell in SINGLE}
EVERY = (*CELLS, *STEPS, "attention")
WIDTH = 4


def twin(name: str, **options) -> nn.Module:
    """The torch.nn module called ``name`` in ``EVERY``."""
    if name == "attention":
        return nn.MultiheadAttention(WIDTH, 2, **options)
    if name in STEPS:
        kind, selecting = SINGLE[STEPS[name]]
        return kind(WIDTH, 3, **selecting, **options)
    return torch_module(name, WIDTH, 3, **options)


def given(name: str, *, T: int = 3, B: int = 2, **options) -> Tensor:
    """An input: [B, I] of a step, else [T, B, I]."""
    return torch.randn(*(() if name in STEPS else (T,)), B, WIDTH, **options)


def batch_dim(name: str) -> int:
    return 0 if name in STEPS else 1


def outputs(module: nn.Module, x: Tensor, **keywords) -> list[Tensor]:
    """All that ``module`` makes of x; attention attends to x itself."""
    return tensors(module(*([x] * 3 if isinstance(module, nn.MultiheadAttention) else [x]), **keywords))


def first(module: nn.Module, **keywords) -> Callable[[Tensor], Tensor]:
    """What ``module`` puts out first, y, h or the attended, as a function of x."""
    return lambda x: outputs(module, x, **keywords)[0]


def results(module: nn.Module, x: Tensor) -> Results:
    """Every output and every gradient, by name."""
    if isinstance(module, nn.MultiheadAttention):
        return transformer_twins.results(module, [x] * 3)
    return recurrence_twins.results(module, x)


def main_weight(module: nn.Module) -> str:
    """The name of the weight most worth parametrizing or pruning; of a step the one that no state need be given for."""
    return next(name for name in ("weight_hh_l0", "weight_ih", "in_proj_weight") if hasattr(module, name))
