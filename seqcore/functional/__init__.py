"""Functions over tensors: they check their arguments, follow autocast, pick a backend and apply it."""

from .attention import attention, scaled_dot_product_attention
from .dropout import locked_dropout
from .positions import alibi_slopes, rotary, sinusoidal_positions
from .recurrence import gru, gru_cell, lstm, lstm_cell, recurrence, rnn, rnn_cell

__all__ = [
    "alibi_slopes",
    "attention",
    "gru",
    "gru_cell",
    "locked_dropout",
    "lstm",
    "lstm_cell",
    "recurrence",
    "rnn",
    "rnn_cell",
    "rotary",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
]
