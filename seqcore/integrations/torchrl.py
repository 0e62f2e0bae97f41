"""TorchRL's LSTMModule and GRUModule around seqcore's recurrences.

Where episodes of different lengths stand in one batch, they pack sequences for ``torch.nn.LSTM`` and ``torch.nn.GRU``,
and call any other class with ``mask=``. The classes here take it.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import nn


class _Masked:
    def forward(self, input: Tensor, hx=None, mask: Tensor | None = None, **options):
        """As the class it extends; ``mask`` [B, T] ([T, B] unless batch_first) is True at the first steps of each
        sequence: those that count."""
        if mask is None:
            return super().forward(input, hx, **options)
        time = 1 if self.batch_first else 0
        # Packed, as TorchRL does it for torch's own, so that every backend can serve.
        lengths = mask.sum(time).cpu()
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=False)
        y, state = super().forward(packed, hx, **options)
        return pad_packed_sequence(y, self.batch_first, total_length=input.shape[time])[0], state


class LSTM(_Masked, nn.LSTM):
    """:class:`seqcore.nn.LSTM` with ``mask=``, for ``torchrl.modules.LSTMModule``."""


class GRU(_Masked, nn.GRU):
    """:class:`seqcore.nn.GRU` with ``mask=``, for ``torchrl.modules.GRUModule``."""


TORCHS = {LSTM: torch.nn.LSTM, GRU: torch.nn.GRU}
_MASKED = {nn.LSTM: LSTM, nn.GRU: GRU}


def class_for(ours: type, name: str, model: torch.nn.Module) -> type:
    """``ours``, or the class here that takes ``mask``, if TorchRL's module holds the module of this name."""
    if ours not in _MASKED:
        return ours
    holder = model.get_submodule(name.rpartition(".")[0])
    return _MASKED[ours] if type(holder).__module__.startswith("torchrl.") else ours
