"""What a recurrence is asked for, and the one form its checked arguments are brought into."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..reference.recurrence import Weights, block_count


@dataclass(frozen=True)
class Options:
    """What a call of ``functional.lstm`` and its siblings asks for besides its tensors; they document each."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_hx: Tensor | tuple[Tensor, Tensor] | None = None
    grad_clip: float | None = None
    recompute: bool = False
    return_cells: bool = False
    locked: bool = False
    zoneout: float | tuple[float, float] = 0.0


@dataclass
class Problem:
    """A checked request in one form: time-major, batched, states as [L*D, B, *], weights as ``[layer][direction]``."""

    cell: str
    x: Tensor  # [T, B, I], or [R, I] packed
    h0: Tensor  # with reset_hx, its states follow along the batch
    c0: Tensor | None
    weights: list[list[Weights]]
    bias: bool
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    packed: PackedSequence | None = None
    batch_first: bool = False
    unbatched: bool = False
    zoneout: tuple[float, ...] = ()  # of each state the probability to be kept

    @property
    def blocks(self) -> int:
        return block_count(self.weights[0][0].w_hh)

    def finish(self, y: Tensor, h_n: Tensor, c_n: Tensor | None, cells: Tensor | None = None):
        """The results in the layout the caller's input had."""
        if self.packed is not None:
            order = self.packed.unsorted_indices
            if order is not None:
                h_n, c_n = h_n.index_select(1, order), None if c_n is None else c_n.index_select(1, order)
        elif self.unbatched:
            h_n, c_n = h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
        state = h_n if c_n is None else (h_n, c_n)
        return (self._rows(y), state) if cells is None else (self._rows(y), state, self._rows(cells))

    def _rows(self, y: Tensor) -> Tensor | PackedSequence:
        if self.packed is not None:
            sizes, order = self.packed.batch_sizes, self.packed.unsorted_indices
            return PackedSequence(y, sizes, self.packed.sorted_indices, order)
        if self.unbatched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y
