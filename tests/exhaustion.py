"""Memory that runs out: the n-th tensor that a call would make raises, for every n until there are no more."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqcore import backends
from seqcore.kernels import tuning
from seqcore.kernels.recurrence import plan
from seqcore.ops import attention, recurrence

from .comparisons import Results
from .effort import effort, tried

_OPERATORS = {
    "attention_forward": attention._forward,
    "attention_backward": attention._backward,
    "attention_weights": attention._weights,
    "attention_weights_backward": attention._weights_backward,
    "recurrence_forward": recurrence._forward,
    "recurrence_backward": recurrence._backward,
}


class Exhausted(TorchDispatchMode):
    """Within it the ``at``-th operation that takes memory raises ``error``; those inside our operators count, too."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.error = at, torch.OutOfMemoryError(f"out of memory for tensor {at}")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "seqcore":
            with self:
                return _OPERATORS[function.name().partition("::")[2]](*arguments, **keywords)
        if any(made.alias_info is None and "Tensor" in str(made.type) for made in function._schema.returns):
            self.left -= 1
            if not self.left:
                raise self.error
        return function(*arguments, **keywords)


def surroundings() -> dict[str, Any]:
    """What a call may change for a while, and is to leave as it was."""
    local = backends._local
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "products": torch.backends.cuda.matmul.fp32_precision,
        "recurrences": torch.backends.cudnn.rnn.fp32_precision,
        "gradients": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "dtype": torch.get_default_dtype(),
        "backends": (local.stack, local.explanations, local.pretend),
        "plans": {side: dict(chosen) for side, chosen in plan._overrides.items()},
        "tiles": (dict(tuning._overrides), list(tuning._instead)),
    }


def failures(run: Callable[[], Any], unchanged: Callable[[], Any] = surroundings, step: int = 1) -> int:
    """Let ``run`` run out of memory at every ``step``-th tensor in turn, until it comes to its end; how many it makes.

    Each time the error is to come out as it went in, and what ``unchanged`` returns is to be what it was.
    """
    before, at = unchanged(), 1 - step
    while True:
        at += step
        exhausted = Exhausted(at)
        try:
            with exhausted:
                run()
        except torch.OutOfMemoryError as error:
            came_out = error
        else:
            assert exhausted.left > 0, f"the error for tensor {at} did not come out"
            return at - exhausted.left
        assert came_out is exhausted.error, f"tensor {at}"
        assert unchanged() == before, f"tensor {at}"
        tried()


def assert_recovers(run: Callable[[], Results], least: int) -> None:
    """After failures at the tensors it makes, of which there are at least so many, ``run`` gives the same bits."""
    expected = run()
    assert failures(run, step=effort(4, 1)) >= least
    found = run()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
