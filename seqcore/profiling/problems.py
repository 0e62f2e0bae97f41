"""What can be profiled: one layer, or attention by itself, at given sizes, as a call without arguments."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from .. import functional, nn
from ..backends import BACKENDS
from ..clock import Call
from ..errors import InvalidInput
from ..functional.arguments import is_size

MODULES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
PASSES = ("forward", "training")
DTYPES = ("float16", "bfloat16", "float32")
POSITIVE = "a positive number of at most 2^31 - 1"


def falling_lengths(T: int, B: int) -> list[int]:
    """Of B sequences: evenly from T down to a quarter of it."""
    return [T - b * 3 * T // (4 * max(B - 1, 1)) for b in range(B)]


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What both kinds share."""

    # Fields that are no sizes.
    OPTIONS: ClassVar = ("op", "dtype", "backend", "pass_")

    dtype: str = "float32"
    backend: str = "auto"
    pass_: str = "forward"

    def _check(self) -> None:
        allowed = {"pass_": PASSES, "dtype": DTYPES, "backend": BACKENDS}
        for name, values in allowed.items():
            self._require(getattr(self, name) in values, name, f"one of {', '.join(values)}")
        for field in fields(self):
            if field.type is int and field.name != "window":
                self._require(is_size(getattr(self, field.name)), field.name, POSITIVE)

    def _require(self, right: bool, name: str, allowed: str) -> None:
        if not right:
            got = getattr(self, name)
            raise InvalidInput(f"{self.op}: {name.rstrip('_')} must be {allowed}, got {got!r}; --help tells more")

    @property
    def shape(self) -> dict[str, int]:
        """Its sizes; what is not as usual is there only if it is not."""
        sizes = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: int(v) for name, (v, usual) in sizes.items() if name not in self.OPTIONS and v != usual}

    @property
    def label(self) -> str:
        """What its ranges are called in a trace."""
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op} {sizes} {self.dtype} {self.pass_}"


@dataclass(frozen=True)
class Recurrence(_Problem):
    """A recurrent layer (or several) over B sequences of T steps, or, ``packed``, of T down to a quarter of T.

    Args:
        op: "rnn", "gru" or "lstm".
        T, B, H: steps, sequences, hidden units.
        I: input features; 0 for as many as H.
        layers, directions: how many of each; 1 or 2 directions.
        dtype, backend: torch's name, and one of ``seqcore.backends.BACKENDS``.
        pass_: "forward" is inference, "training" forward and backward.

    Raises:
        InvalidInput: if one of these is something else.
    """

    op: str
    T: int
    B: int
    H: int
    I: int = 0
    layers: int = 1
    directions: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        self._require(self.op in MODULES, "op", f"one of {', '.join(MODULES)}")
        if self.I == 0:
            object.__setattr__(self, "I", self.H)
        self._check()
        self._require(self.directions in (1, 2), "directions", "1 or 2")

    def build(self, device: str) -> Call:
        """One pass, to be called again and again."""
        options = {"device": device, "dtype": getattr(torch, self.dtype)}
        torch.manual_seed(0)
        module = getattr(nn, MODULES[self.op])(
            self.I, self.H, self.layers, bidirectional=self.directions == 2, backend=self.backend, **options
        )
        x = torch.randn(self.T, self.B, self.I, **options)
        if self.packed:
            x = pack_sequence([x[:length, b] for b, length in enumerate(falling_lengths(self.T, self.B))])
        inputs = [_data(x).requires_grad_(), *module.parameters()]
        return _one_pass(lambda: _data(module(x)[0]), inputs, self.pass_)


@dataclass(frozen=True)
class Attention(_Problem):
    """Attention of M queries over N keys, B times H heads, without projections.

    Args:
        B, H: sequences and query heads.
        M, N, D: queries, keys, head dim. ``N`` is 0 for as many keys as queries.
        H_kv: key heads, of which H must be a multiple; 0 for as many as query heads.
        causal: the last query sees all keys, the one before all but the last, and so on.
        window: how many keys a query sees, its own the last; needs ``causal``; 0 for all.
        dtype, backend, pass_: as in :class:`Recurrence`.

    Raises:
        InvalidInput: if one of these is something else.
    """

    B: int
    H: int
    M: int
    D: int
    N: int = 0
    H_kv: int = 0
    causal: bool = False
    window: int = 0
    op: str = "attention"

    def __post_init__(self) -> None:
        for name, default in (("N", self.M), ("H_kv", self.H)):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, default)
        self._check()
        self._require(self.H % self.H_kv == 0, "H_kv", f"a divisor of H = {self.H}")
        fits = is_size(self.window, least=0) and (self.causal or not self.window)
        self._require(fits, "window", f"{POSITIVE}, and with causal; or 0 for all")

    def build(self, device: str) -> Call:
        """One pass, to be called again and again."""
        torch.manual_seed(0)
        heads = ((self.H, self.M), (self.H_kv, self.N), (self.H_kv, self.N))
        dtype = getattr(torch, self.dtype)
        q, k, v = (
            torch.randn(self.B, count, rows, self.D, device=device, dtype=dtype, requires_grad=True)
            for count, rows in heads
        )
        options: dict[str, Any] = {"backend": self.backend, "enable_gqa": self.H != self.H_kv}
        if self.causal:
            options["causal"] = "top_left" if self.M == self.N else "lower_right"
        if self.window:
            options["window"] = (self.window - 1, 0)
        return _one_pass(lambda: functional.attention(q, k, v, **options), [q, k, v], self.pass_)


Problem = Recurrence | Attention


def problem_of(fields: dict[str, Any]) -> Problem:
    """The problem that ``dataclasses.asdict`` made these of."""
    return (Attention if fields["op"] == "attention" else Recurrence)(**fields)


def _data(rows: Any) -> Tensor:
    """Of a packed sequence, all its rows."""
    return rows if isinstance(rows, Tensor) else rows.data


def _one_pass(forward: Callable[[], Tensor], inputs: list[Tensor], pass_: str) -> Call:
    with torch.no_grad():
        dy = torch.randn_like(forward())

    def infer() -> object:
        with torch.no_grad():
            return forward()

    def train() -> object:
        # In one thread, so that what ranges enclose is the backward pass too.
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(forward(), inputs, dy)

    return infer if pass_ == "forward" else train
