"""Modules that take the place of ``torch.nn``'s, and what goes with them."""

from . import init
from .attention import MultiheadAttention
from .cache import KVCache
from .dropout import LockedDropout
from .positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from .recurrence import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LearnedPositions",
    "LockedDropout",
    "MultiheadAttention",
    "RNNCell",
    "RotaryPositions",
    "SinusoidalPositions",
    "init",
]
