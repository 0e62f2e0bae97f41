"""Functions over tensors: they check their arguments, follow autocast, pick a backend and apply it."""

from .attention import attention, scaled_dot_product_attention
from .recurrence import gru, gru_cell, lstm, lstm_cell, recurrence, rnn, rnn_cell

__all__ = [
    "attention",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "recurrence",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
