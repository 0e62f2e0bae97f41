"""The models that the experiments train: one body each, and of about equal size where they are compared."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import seqcore
from benchmarks.models import nearest_width
from seqcore.nn import GRU, LSTM, RNN, SinusoidalPositions

RECURRENT = {"rnn": RNN, "gru": GRU, "lstm": LSTM}
BODIES = (*RECURRENT, "attention")
HEADS = 2
ATTENTION_LAYERS = 2


def causal_mask(T: int, device: torch.device | str) -> Tensor:
    """torch.nn's: True where a position may not look."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def has_library_layers(device: str) -> bool:
    """Whether torch has an LSTM in one operator, oneDNN's, but runs its RNN and GRU as loops over steps."""
    return device == "cpu" and torch.backends.mkldnn.is_available()


@contextmanager
def loop() -> Iterator[None]:
    """In it torch on a CPU runs all recurrent layers as its own loop, so that they are alike but for their cell."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def transformer_layers(width: int, layers: int, heads: int) -> nn.TransformerEncoder:
    """torch.nn's, normalised first, without dropout; with a causal mask they are what is called decoder-only."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, norm_first=True)
    stack = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    # Its layers are copies of one; as torch.nn.Transformer does, each draws weights of its own.
    for weight in stack.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    return stack


class Decoder(nn.Module):
    """Causal self-attention over sinusoidal positions: torch.nn's Transformer layers on seqcore's attention."""

    def __init__(self, width: int):
        super().__init__()
        self.positions = SinusoidalPositions(width)
        self.layers = transformer_layers(width, ATTENTION_LAYERS, HEADS)
        seqcore.replace(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, width] to the same."""
        return self.layers(self.positions(x), causal_mask(len(x), x.device), is_causal=True)


class SequenceModel(nn.Module):
    """[T, B] tokens of an alphabet, or [T, B, inputs] numbers, through one body to [T, B, outputs].

    Args:
        op: a key of ``RECURRENT``, or "attention".
        alphabet: the number of tokens, 0 for numbers.
    """

    def __init__(self, op: str, inputs: int, outputs: int, width: int, alphabet: int = 0, **options):
        super().__init__()
        self.enter = nn.Embedding(alphabet, width) if alphabet else nn.Linear(inputs, width)
        self.body = Decoder(width) if op == "attention" else RECURRENT[op](width, width, **options)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the body makes of the sequence, [T, B, width]."""
        y = self.body(self.enter(x))
        return y if isinstance(y, Tensor) else y[0]


@functools.cache
def width_for(op: str, inputs: int, outputs: int, parameters: int, alphabet: int = 0) -> int:
    """The width at which a ``SequenceModel`` has most nearly that many parameters; heads divide it."""
    build = lambda width: SequenceModel(op, inputs, outputs, width, alphabet)
    return nearest_width(build, parameters, 2 * HEADS if op == "attention" else 1)
