"""Time and rows for the kernels: the tensors ``kernels/recurrence/layout.py`` describes, made without a host sync."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput

CUT, PAST = -1, -2


@dataclass(frozen=True)
class Map:
    """Where rows stand and where their states come from; all None for a padded batch without lengths or reset.

    T steps, B sequences, R rows; ``sizes`` are the batch sizes of a packed input, on the CPU.
    """

    steps: int
    batch: int
    rows: int
    directions: int
    offset: Tensor | None = None  # [T]
    active: Tensor | None = None  # [T]
    source: Tensor | None = None  # [D, R]
    last: Tensor | None = None  # [D, B]
    sizes: Tensor | None = None
    resets: bool = False  # to given states, which follow the initial ones

    @property
    def mapped(self) -> bool:
        return self.source is not None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernels take of it."""
        return self.offset, self.active, self.source, self.last

    def steps_of_groups(self, rows: int) -> Tensor:
        """[groups]: how many steps a group of ``rows`` sequences has, which is its first one's in a packed input."""
        if self.sizes is None:
            return torch.full((-(-self.batch // rows),), self.steps, device=self.source.device)
        firsts = torch.arange(0, self.batch, rows)
        return (self.sizes > firsts[:, None]).sum(1).to(self.source.device, non_blocking=True)

    def entering(self, direction: int, values: Tensor, initial: Tensor) -> Tensor:
        """The state entering each row [R, H], out of ``values`` [R, H] and ``initial`` [B or 2B, H]: a copy."""
        if self.mapped:
            source = self.source[direction]
            found = torch.cat([values, initial]).index_select(0, source.clamp(min=0))
            return found.masked_fill_((source < 0)[:, None], 0)
        batch = self.batch
        return torch.cat([initial, values[:-batch]] if direction == 0 else [values[batch:], initial])

    def valid(self) -> Tensor | None:
        """[R, 1] bool: which rows are steps of their sequences; None if it goes without saying."""
        return (self.source[0] != PAST)[:, None] if self.mapped else None

    def first_rows(self, direction: int) -> tuple[Tensor, Tensor | None]:
        """[B]: the row on which each sequence starts its walk, and where that row takes up the initial state at all."""
        if self.mapped:
            # A walk starts where the walk in the other direction ends.
            rows = self._ends(1 - direction)
            return rows.clamp(min=0), (rows >= 0) & (self.source[direction].index_select(0, rows.clamp(min=0)) >= 0)
        return self._edge(first=direction == 0), None

    def last_rows(self, direction: int) -> tuple[Tensor, Tensor | None]:
        """[B]: the row on which each sequence ends its walk, and whether it has one."""
        if self.mapped:
            rows = self._ends(direction)
            return rows.clamp(min=0), rows >= 0
        return self._edge(first=direction == 1), None

    def _ends(self, direction: int) -> Tensor:
        if self.directions > direction:
            return self.last[direction]
        # The direction that is not there would end where each sequence begins.
        begin = torch.arange(self.batch, device=self.last.device)
        return torch.where(self.last[0] >= 0, begin, -1)

    def _edge(self, first: bool) -> slice:
        return slice(0, self.batch) if first else slice(self.rows - self.batch, self.rows)


def plain(x: Tensor, directions: int) -> Map:
    """A padded batch x [T, B, …]."""
    return Map(x.shape[0], x.shape[1], x.shape[0] * x.shape[1], directions)


def padded(x: Tensor, directions: int, lengths: Tensor | None, reset: Tensor | None, resets: bool) -> Map:
    """A padded batch x [T, B, …] of which ``lengths`` [B] count, cut where ``reset`` [T, B] says.

    With ``resets`` a cut leads to row B + b of the initial states, without to none.
    """
    steps, batch = x.shape[:2]
    rows, device = steps * batch, x.device
    t, b = torch.arange(steps, device=device)[:, None], torch.arange(batch, device=device)
    row = t * batch + b
    length = torch.full((batch,), steps, device=device) if lengths is None else lengths.long().clamp(0, steps)
    inside = t < length
    forward = torch.where(t == 0, rows + b, row - batch)
    backward = torch.where(t == length - 1, rows + b, row + batch)
    if reset is not None:
        instead = rows + batch + b if resets else CUT
        forward = torch.where(reset, instead, forward)
        # Seen from the other side the cut before step t + 1 lies after step t; past the end nothing is cut.
        cut = torch.cat([reset[1:], torch.zeros_like(reset[:1])]) & (t + 1 < length)
        backward = torch.where(cut, instead, backward)
    source = torch.stack([forward, backward][:directions])
    source = torch.where(inside, source, PAST).view(directions, rows)
    last = torch.stack([(length - 1) * batch + b, b][:directions])
    last = torch.where(length > 0, last, -1)
    offset = torch.arange(0, rows, batch, device=device) if batch else torch.zeros(steps, device=device)
    active = torch.full((steps,), batch, device=device)
    return Map(steps, batch, rows, directions, offset, active, source, last, resets=resets)


def check_packed(x: Tensor, h0: Tensor, batch_sizes: Tensor) -> None:
    """Whether the parts of a packed input fit together: in a compiled graph nobody has looked at their values before.

    Raises:
        InvalidInput: if they do not.
    """
    rows, batch = x.shape[0], h0.shape[1]
    if int(batch_sizes[0]) != batch or int(batch_sizes.sum()) != rows:
        raise InvalidInput(
            f"recurrence: a PackedSequence of {int(batch_sizes[0])} sequences and {int(batch_sizes.sum())} rows needs "
            f"hx of as many sequences and data of as many rows, got {batch} and {rows}"
        )


def packed(x: Tensor, h0: Tensor, directions: int, batch_sizes: Tensor) -> Map:
    """Packed rows x [R, …]; ``batch_sizes`` stands on the CPU, as torch requires, so nothing waits for a GPU."""
    check_packed(x, h0, batch_sizes)
    rows, batch, steps, device = x.shape[0], h0.shape[1], batch_sizes.shape[0], x.device
    starts = batch_sizes.cumsum(0) - batch_sizes
    lengths = (batch_sizes > torch.arange(batch)[:, None]).sum(1)
    ends = starts[lengths - 1] + torch.arange(batch)
    offset, active, ends = (tensor.to(device, non_blocking=True) for tensor in (starts, batch_sizes, ends))
    t = torch.arange(steps, device=device).repeat_interleave(active, output_size=rows)
    b = torch.arange(rows, device=device) - offset[t]
    forward = torch.where(t == 0, rows + b, offset[(t - 1).clamp(min=0)] + b)
    after = (t + 1).clamp(max=steps - 1)
    goes_on = (t + 1 < steps) & (b < active[after])
    backward = torch.where(goes_on, offset[after] + b, rows + b)
    source = torch.stack([forward, backward][:directions])
    last = torch.stack([ends, torch.arange(batch, device=device)][:directions])
    return Map(steps, batch, rows, directions, offset, active, source, last, batch_sizes)


def of(
    x: Tensor, h0: Tensor, directions: int, batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None
) -> Map:
    """The map of one layer's input."""
    if batch_sizes is not None:
        return packed(x, h0, directions, batch_sizes)
    if lengths is None and reset is None:
        return plain(x, directions)
    return padded(x, directions, lengths, reset, resets=h0.shape[1] > x.shape[1])
