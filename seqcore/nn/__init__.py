"""Modules that take the place of ``torch.nn``'s."""

from .attention import MultiheadAttention
from .recurrence import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell"]
