"""What programs of one launch tell each other at every step, run by kernels that do nothing else, and their time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clock import Clock

WORD = 4
ROUNDS = 7
LONG, SHORT = 1024, 128
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Exchange:
    """What the programs of one launch tell each other at every step. Widths in bytes of one row."""

    slices: int
    teams: int
    rows: int
    width: int
    share: int
    num_warps: int

    @property
    def bytes_read(self) -> int:
        """By each program, at each step."""
        return self.rows * self.width

    @property
    def words(self) -> tuple[int, int]:
        """``width`` and ``share`` in words, rounded up."""
        return -(-self.width // WORD), -(-self.share // WORD)

    @property
    def block(self) -> int:
        """Words of a row read at once."""
        return min(128 if self.rows <= 64 else 64, 1 << (self.words[0] - 1).bit_length())

    def rows_of(self, steps: int, device: str) -> Tensor:
        """The kernel's buffer: random rows of step 0, and others that nobody has written."""
        rows = torch.full((steps + 1, self.teams * self.rows, self.words[0]), -1, dtype=torch.int32, device=device)
        rows[0].random_(0, 2**31 - 1)
        return rows

    def run(self, rows: Tensor, steps: int) -> None:
        """Launch ``steps`` exchanges over ``rows``."""
        from ..kernels import floors

        width, share = self.words
        floors.exchange_kernel[(self.teams * self.slices,)](
            rows, _counters(self.teams, rows.device), steps, self.teams,
            SLICES=self.slices, WIDTH=width, SHARE=share, BLOCK_B=self.rows, BLOCK_K=self.block,
            num_warps=self.num_warps, num_stages=1, **_waiting(rows.device),
        )  # fmt: skip

    def follow(self, rows: Tensor) -> Tensor:
        """What follows, one step later, from each step's ``rows`` [T, R, words]: the kernel's oracle."""
        width, share = self.words
        tiles = F.pad(rows, (0, -width % self.block)).unflatten(-1, (-1, self.block))
        total = tiles.sum(-2, dtype=torch.int32) + 1
        return total[..., torch.arange(width, device=rows.device) % share % self.block]

    def check(self, rows: Tensor) -> None:
        """Raise AssertionError unless every step follows from the one before."""
        for first in range(0, len(rows) - 1, 64):
            part = rows[first : first + 65]
            assert torch.equal(part[1:], self.follow(part[:-1])), f"{self}: wrong within 64 steps of step {first}"


def run_barrier(slices: int, teams: int, steps: int, device: str, num_warps: int = 4) -> Tensor:
    """Launch ``steps`` empty barriers; the counters afterwards."""
    from ..kernels import floors

    counters = _counters(teams, torch.device(device))
    floors.barrier_kernel[(teams * slices,)](
        counters, steps, SLICES=slices, num_warps=num_warps, num_stages=1, **_waiting(counters.device)
    )
    return counters


def _counters(teams: int, device: torch.device) -> Tensor:
    from ..kernels import grid

    return torch.zeros(teams * grid.COUNTER_STRIDE.value, dtype=torch.int32, device=device)


def _waiting(device: torch.device) -> dict:
    from ..kernels import grid

    # A launch whose programs cannot all be resident then fails, where it would hang.
    cooperative = {"launch_cooperative_grid": True} if device.type == "cuda" else {}
    return cooperative | grid.LAUNCH_OPTIONS


def exchange_of(plan, shape) -> Exchange | None:
    """What the programs of a plan exchange at every step; None where one program has a whole team's weights."""
    if plan.slices == 1:
        return None
    # A tile may have more rows than the batch; those that no sequence has are not read.
    rows = min(plan.rows, 1 << (shape.batch - 1).bit_length())
    column = shape.itemsize * (shape.gates if shape.backward else 1)
    width, share = (units * column for units in (shape.units, plan.units))
    return Exchange(plan.slices, plan.teams, rows, width, share, plan.num_warps)


def barrier_samples(clock: Clock, slices: int, teams: int, num_warps: int = 4) -> list[float]:
    """Milliseconds of each of many barriers among the programs of each team, measured several times."""
    return _per_step(clock, lambda steps: run_barrier(slices, teams, steps, "cuda", num_warps), LONG)


def exchange_samples(clock: Clock, exchange: Exchange) -> list[float]:
    """The same of exchanges, after a check that they do what they should."""
    step_bytes = exchange.teams * exchange.rows * exchange.words[0] * WORD
    longest = max(2 * SHORT, min(LONG, MOST_BYTES // step_bytes))
    rows = exchange.rows_of(longest, "cuda")
    exchange.run(rows, longest)
    exchange.check(rows)
    return _per_step(clock, lambda steps: exchange.run(rows, steps), longest)


def _per_step(clock: Clock, run: Callable[[int], object], longest: int) -> list[float]:
    """Out of a long and a short launch: what launching costs cancels."""

    def sample() -> float:
        long = clock(lambda: run(longest))
        return (long - clock(lambda: run(SHORT))) / (longest - SHORT)

    sample()
    return [sample() for _ in range(ROUNDS)]
