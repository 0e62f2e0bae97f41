"""Dropout between recurrent layers, as a module."""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from ..functional.arguments import check_flags, check_probability


class LockedDropout(nn.Module):
    """Locked (variational) dropout: one mask per sequence and feature, the same at every step, drawn anew each call.

    Before, between and after recurrent modules; ``locked=True`` of ``seqcore.nn.LSTM`` and its siblings is the same
    between a module's own layers. Within the recurrence nothing is dropped: for AWD-LSTM's DropConnect, parametrize
    the recurrent weights, ``torch.nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", Dropout(p))``.

    Args:
        p: probability of a feature to be zeroed; the others are scaled by 1 / (1 - p). In evaluation nothing changes.
        batch_first: padded batches are [B, T, F] and not [T, B, F].

    Raises:
        InvalidInput: for a p outside 0 … 1.

    Source: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks" (2016);
    Merity et al., "Regularizing and Optimizing LSTM Language Models" (2018), AWD-LSTM, for the name.
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        check_probability("LockedDropout", p)
        check_flags("LockedDropout", batch_first=batch_first)
        self.p, self.batch_first = p, batch_first

    def forward(self, input: Tensor | PackedSequence) -> Tensor | PackedSequence:
        """``input``, [T, B, F], [B, T, F], [T, F] or packed, masked; see ``seqcore.functional.locked_dropout``."""
        return functional.locked_dropout(input, self.p, self.training, self.batch_first)

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}"
