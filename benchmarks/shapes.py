"""Which sizes are measured on which machine.

T is time, B batch, H the layer's width. Every layer maps [T, B, H] to [T, B, H], so that a recurrence and an
attention layer do the same job on the same data.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from seqcore.profiling.problems import MODULES, PASSES, falling_lengths

RECURRENCES = tuple(MODULES)
OPS = (*RECURRENCES, "attention")
# The sweeps in the order they are measured, and the share of the suite's time at which each must end.
SWEEP_ENDS = {"batch_sweep": 0.25, "tokens_fixed": 0.5, "batch_fixed": 1.0}


def powers_of_two(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """first, first·factor, … up to and including last."""
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= factor
    return tuple(sizes)


@dataclass(frozen=True)
class Case:
    """One layer at one size: one row of the bottleneck or the recurrence suite."""

    op: str
    pass_: str
    sweep: str
    T: int
    B: int
    H: int
    heads: int
    dtype: str
    # Of a recurrence:
    layers: int = 1
    directions: int = 1
    blocks: int = 1
    packed: bool = False
    # A padded batch with lengths in no order.
    ragged: bool = False
    # Steps of an episode on average; 0 for one that never ends.
    reset_every: int = 0
    recompute: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{self.pass_}-{self.sweep}-{self.dtype}-H{self.H}-T{self.T}-B{self.B}"

    @property
    def shape(self) -> dict[str, int]:
        """What is not as usual is there only if it is not."""
        found = {"T": self.T, "B": self.B, "I": self.H, "H": self.H}
        if self.op not in RECURRENCES:
            return {**found, "heads": self.heads}
        unusual = {"layers": self.layers, "directions": self.directions, "blocks": self.blocks}
        found |= {name: count for name, count in unusual.items() if count > 1}
        return {**found, "tokens": self.tokens} if self.packed or self.ragged else found

    @property
    def lengths(self) -> list[int]:
        """Of the sequences: T of each or, packed, evenly from T down to a quarter of it; ragged, the same in turns."""
        if not (self.packed or self.ragged):
            return [self.T] * self.B
        falling = falling_lengths(self.T, self.B)
        return falling if self.packed else [*falling[1::2], *falling[::2]]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def batch_sizes(self) -> list[int]:
        """Rows of each step."""
        return [sum(length > t for length in self.lengths) for t in range(self.T)]


@dataclass(frozen=True)
class ModelSizes:
    """The character models: how large, and for how long they train."""

    parameters: int
    layers: int
    heads: int
    T: int
    B: int
    steps: int
    evaluate_every: int
    text_bytes: int
    seconds: float
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Sizes:
    """Everything measured on one kind of machine."""

    name: str
    device: str
    dtype: str
    ours: str
    peers: tuple[str, ...]
    width: int
    heads: int
    # Sweep "batch fixed": the batch, and the lengths.
    batch: int
    lengths: tuple[int, ...]
    # Sweep "tokens fixed": T·B is always this.
    tokens: int
    token_lengths: tuple[int, ...]
    # Sweep "batch": recurrences at this length, to see how much batch fills the machine.
    fill_length: int
    fill_batches: tuple[int, ...]
    # Slow peers take part only up to these lengths.
    peer_limits: dict[str, int]
    # The float64 comparison covers at most this many steps and rows of the batch.
    check_T: int
    check_B: int
    # Side of the square product, and bytes of the copy, that give this machine's two roofs.
    peak_side: int
    copy_bytes: int
    # Time for all contestants of one case together, and for the whole bottleneck suite.
    case_seconds: float
    suite_seconds: float
    # For the whole recurrence suite.
    recurrence_seconds: float
    # For the whole attention suite.
    attention_seconds: float
    models: ModelSizes = field(repr=False)

    def share_of(self, seconds: float | None, suites: Iterable[str]) -> float:
        """How much of their usual time these suites may take, for all of them to take ``seconds``."""
        usual = {"bottleneck": self.suite_seconds, "recurrence": self.recurrence_seconds}
        usual["attention"] = self.attention_seconds
        together = sum(usual.get(suite, 0.0) for suite in suites)
        return 1.0 if seconds is None or not together else seconds / together

    def cases(self) -> list[Case]:
        """All cases, sweep by sweep, short ones first, so that a sweep out of time has lost only its longest."""
        found = []
        for pass_ in PASSES:
            found += [
                self._case(op, pass_, "batch_sweep", self.fill_length, B)
                for op in RECURRENCES
                for B in self.fill_batches
            ]
            for op in OPS:
                found += [self._case(op, pass_, "tokens_fixed", T, self.tokens // T) for T in self.token_lengths]
                found += [self._case(op, pass_, "batch_fixed", T, self.batch) for T in self.lengths]
        sweeps = list(SWEEP_ENDS)
        return sorted(found, key=lambda case: (sweeps.index(case.sweep), case.T, case.B))

    def sweep_ends(self, sweep: str) -> float:
        """Seconds after the suite's beginning by which a case of this sweep must have begun."""
        return SWEEP_ENDS[sweep] * self.suite_seconds

    def _case(self, op: str, pass_: str, sweep: str, T: int, B: int) -> Case:
        return Case(op, pass_, sweep, T, B, self.width, self.heads, self.dtype)


CPU = Sizes(
    name="cpu",
    device="cpu",
    dtype="float32",
    ours="auto",
    peers=("torch.nn", "reference"),
    width=128,
    heads=4,
    batch=4,
    lengths=powers_of_two(32, 4096),
    tokens=4096,
    token_lengths=powers_of_two(16, 4096, factor=4),
    fill_length=64,
    fill_batches=powers_of_two(1, 256),
    peer_limits={"reference": 128},
    check_T=128,
    check_B=8,
    peak_side=768,
    copy_bytes=2**26,
    case_seconds=0.2,
    suite_seconds=80,
    recurrence_seconds=15,
    attention_seconds=15,
    models=ModelSizes(
        parameters=400_000,
        layers=2,
        heads=4,
        T=128,
        B=16,
        steps=120,
        evaluate_every=10,
        text_bytes=2_000_000,
        seconds=12,
    ),
)

GPU = Sizes(
    name="gpu",
    device="cuda",
    dtype="bfloat16",
    ours="triton",
    peers=("torch.nn", "aten"),
    width=1024,
    heads=16,
    batch=16,
    lengths=powers_of_two(128, 65536),
    tokens=65536,
    token_lengths=powers_of_two(128, 65536),
    fill_length=128,
    fill_batches=powers_of_two(1, 2048),
    peer_limits={"aten": 4096},
    check_T=512,
    check_B=16,
    peak_side=8192,
    copy_bytes=2**28,
    case_seconds=1.0,
    suite_seconds=190,
    recurrence_seconds=300,
    attention_seconds=460,
    models=ModelSizes(
        parameters=20_000_000,
        layers=4,
        heads=8,
        T=512,
        B=64,
        steps=400,
        evaluate_every=20,
        text_bytes=20_000_000,
        seconds=30,
        learning_rate=1e-3,
    ),
)

TINY = Sizes(
    name="tiny",
    device="cpu",
    dtype="float32",
    ours="auto",
    peers=("torch.nn", "reference"),
    width=16,
    heads=2,
    batch=2,
    lengths=powers_of_two(8, 32),
    tokens=64,
    token_lengths=powers_of_two(8, 32, factor=4),
    fill_length=8,
    fill_batches=powers_of_two(1, 2),
    peer_limits={"reference": 8},
    check_T=16,
    check_B=2,
    peak_side=128,
    copy_bytes=2**20,
    case_seconds=0.01,
    suite_seconds=20,
    recurrence_seconds=20,
    attention_seconds=20,
    models=ModelSizes(
        parameters=8_000,
        layers=1,
        heads=2,
        T=16,
        B=4,
        steps=8,
        evaluate_every=2,
        text_bytes=50_000,
        seconds=2,
    ),
)

SIZES = {sizes.name: sizes for sizes in (CPU, GPU, TINY)}


def choose_sizes(name: str = "auto") -> Sizes:
    """The sizes of that name; ``auto`` is the GPU's where there is one and the CPU's elsewhere.

    Raises ValueError where they need a GPU and there is none.
    """
    if name == "auto":
        name = "gpu" if torch.cuda.is_available() else "cpu"
    sizes = SIZES[name]
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"sizes {name!r} need a GPU, and torch.cuda.is_available() is False; take cpu, tiny or auto")
    return sizes
