"""Which problems are tuned, the most valuable first."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from ..cells import GRU, LSTM, RNN_TANH
from ..testing.cases import dtype_name
from .attention import Attention
from .problem import Problem
from .recurrence import Recurrence

OPERATIONS = {"attention": ("attention",), "lstm": ("lstm",), "gru": ("gru",), "rnn": ("rnn_tanh",)}
DTYPES = ("bfloat16", "float16", "float32")

HEAD_DIMS = (128, 64, 256)
HIDDEN = (1024, 512, 768, 256, 1536)
BATCHES = (16, 64)
# Sizes that differ from a kernel's defaults. Persistent programs are judged on more tiles than are taken at once.
SIZES = {
    "forward": {"judged": (2200, 2200)},
    "decode": {"batch": 8, "heads": 32, "heads_kv": 8, "keys": 16384, "judged": (1, 5000)},
}
PASSES = ("forward", "backward_dkdv", "backward_dq", "decode")


def problems(operations: Sequence[str] = tuple(OPERATIONS), dtypes: Sequence[str] = DTYPES) -> list[Problem]:
    """Those of ``operations`` and ``dtypes``. Tables know 16 bits: float16 is measured where bfloat16 is left out."""
    wanted = {name for operation in operations for name in OPERATIONS[operation]}
    dtypes = [name for name in dtypes if name != "float16" or "bfloat16" not in dtypes]
    half = torch.bfloat16 if "bfloat16" in dtypes else torch.float16
    found = (problem for problem in _every(half) if problem.operation in wanted)
    return [problem for problem in found if dtype_name(problem.dtype) in dtypes]


def _every(half: torch.dtype) -> Iterator[Problem]:
    yield from _attention(PASSES, half)
    for directions, cell in product((1, 2), (LSTM, GRU)):
        yield from _recurrences(cell, half, directions)
    yield from _attention(PASSES, torch.float32)
    for cell in (LSTM, GRU):
        yield from _recurrences(cell, torch.float32, 1)
    for dtype in (half, torch.float32):
        yield from _attention(("backward_bias", "weights"), dtype)
    for dtype in (half, torch.float32):
        yield from _recurrences(RNN_TANH, dtype, 1)


def _attention(kernels: Sequence[str], dtype: torch.dtype) -> Iterator[Problem]:
    for head_dim, kernel in product(HEAD_DIMS, kernels):
        yield Attention(kernel, dtype, head_dim, **SIZES.get(kernel, {}))


def _recurrences(cell, dtype: torch.dtype, directions: int) -> Iterator[Problem]:
    for hidden, batch, backward in product(HIDDEN, BATCHES, (False, True)):
        yield Recurrence(cell, backward, dtype, hidden, batch, directions)


def tiny(operations: Sequence[str] = tuple(OPERATIONS)) -> list[Problem]:
    """What an interpreter can do in seconds: the same path."""
    wanted = {name for operation in operations for name in OPERATIONS[operation]}
    attention = {"dtype": torch.float32, "head_dim": 16, "batch": 1, "heads": 2, "heads_kv": 1, "keys": 40}
    recurrence = {"dtype": torch.float32, "hidden": 20, "batch": 3, "steps": 3}
    found = [
        Attention("forward", judged=(37, 20), **attention),
        Attention("decode", judged=(3, 70), **attention | {"keys": 70}),
        *(Recurrence(LSTM, backward, **recurrence) for backward in (False, True)),
    ]
    return [problem for problem in found if problem.operation in wanted]
