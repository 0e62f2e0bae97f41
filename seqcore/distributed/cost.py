"""What a divided layer computes and what it sends, so that one can tell beforehand which of the two it waits for.

Bytes are those that one process sends, as ``seqcore.testing.traffic`` counts them; flops those of the busiest process.
W processes; letters as everywhere (B batch, H and H_kv heads, M queries, N keys, D and DV head dims; T time).
"""

from typing import NamedTuple

from ..kernels.work import score_flops, visible_pairs

# Ring attention sums the gradients of keys and values in float32.
_WIDE = 4


class Cost(NamedTuple):
    """Of one process, in one layer: floating-point operations, and bytes sent to other processes."""

    flops: float
    bytes: float

    def waiting(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds of sending for each second of computing, at these rates; below 1 sending can hide behind it."""
        return (self.bytes / bytes_per_second) / (self.flops / flops_per_second)


class Sequence(NamedTuple):
    """Attention over one whole sequence: B, heads of queries and keys, queries, keys, head dims, bytes an element."""

    B: int
    H: int
    H_kv: int
    M: int
    N: int
    D: int
    DV: int
    element_size: int

    def flops(self, pairs: float, pass_: str) -> float:
        return self.B * self.H * score_flops(pairs, self.D, self.DV, pass_)


def ring_attention(whole: Sequence, W: int, pass_: str, causal: bool = False, layout: str = "contiguous") -> Cost:
    """Keys and values go W - 1 steps forward; backward they do again, and their gradients all W steps, in float32.

    forward   (W - 1) B H_kv N/W (D + DV) e bytes
    training  as much again, and W B H_kv N/W (D + DV) 4 bytes
    """
    W_pairs = visible_pairs(whole.M, whole.N, causal) / W
    if causal and layout == "contiguous":
        # The last process has the queries that see most.
        rows = whole.M // W
        W_pairs = visible_pairs(rows, rows, True) + (W - 1) * rows * rows
    elements = whole.B * whole.H_kv * whole.N // W * (whole.D + whole.DV)
    sent = (W - 1) * elements * whole.element_size
    if pass_ == "training" and W > 1:
        sent = 2 * sent + W * elements * max(_WIDE, whole.element_size)
    return Cost(whole.flops(W_pairs, pass_), sent)


def ulysses_attention(whole: Sequence, W: int, pass_: str, causal: bool = False) -> Cost:
    """Queries, keys, values and the result are exchanged once forward, and their gradients once backward.

    forward   (W - 1)/W² B (H M (D + DV) + H_kv N (D + DV)) e bytes
    training  twice that
    """
    elements = whole.B * (whole.H * whole.M + whole.H_kv * whole.N) * (whole.D + whole.DV)
    sent = (W - 1) * elements * whole.element_size / W**2
    pairs = visible_pairs(whole.M, whole.N, causal)
    return Cost(whole.flops(pairs, pass_) / W, sent * (2 if pass_ == "training" else 1))


def time_pipeline(T: int, B: int, width: int, element_size: int, pass_: str, layer_flops: float) -> Cost:
    """What comes out of a process's layers goes to the next one, T B width e bytes; backward as much to the one before.

    So an inner process sends twice as much in training; the first does forward only and the last backward only.
    """
    sent = T * B * width * element_size
    return Cost(layer_flops, sent * (2 if pass_ == "training" else 1))


def pipeline_use(chunks: int, W: int) -> float:
    """The share of its time in which each of W processes has a chunk to work on: K / (K + W - 1)."""
    return chunks / (chunks + W - 1)


def data_parallel(parameters: int, element_size: int, W: int, layer_flops: float) -> Cost:
    """Gradients are all-reduced, 2 (W - 1)/W P e bytes of P parameters, whatever the batch."""
    return Cost(layer_flops, 2 * (W - 1) * parameters * element_size / W)


def fully_sharded(parameters: int, element_size: int, W: int, layer_flops: float, gathers: int = 2) -> Cost:
    """Weights are gathered for forward and again for backward, gradients reduced to their shards.

    (gathers + 1) (W - 1)/W P e bytes; the outermost module ``fully_shard`` was called on is gathered only once.
    """
    return Cost(layer_flops, (gathers + 1) * (W - 1) * parameters * element_size / W)
