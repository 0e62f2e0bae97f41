"""How much work a layer is: floating-point operations, bytes, steps that must wait for each other, and launches.

A multiplication with its addition counts two. Pointwise mathematics (gates, softmax, biases) is left out, as is
usual: it is a few operations for each element, where the products do thousands. All counts are those of the
definition, not of an implementation, so that faster code shows as a higher rate.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True)
class Work:
    """What one pass through one layer has to do, whoever does it."""

    flops: float
    bytes: float
    dependent_steps: int
    # The same chain with all steps of a recurrence in one: no fewer kernels must follow each other on a GPU.
    launches: int


def work(op: str, pass_: str, shape: dict[str, int], element_size: int) -> Work:
    """The work of one layer, ``op`` being rnn, gru, lstm or attention, and ``pass_`` forward or training.

    A recurrence's shape may also tell ``directions``, ``blocks`` of its recurrent weights, how many ``layers`` stand on
    each other, and, if not every sequence has T steps, how many ``tokens`` there are.
    """
    T, B, I, H = (shape[name] for name in "TBIH")
    tokens, directions = shape.get("tokens", T * B), shape.get("directions", 1)
    if op == "attention":
        flops = attention_flops(T, B, H, pass_)
        weights = 4 * H * H
    else:
        flops = recurrence_flops(GATES[op], shape, pass_)
        recurrent = shape.get("layers", 1) * (H // shape.get("blocks", 1))
        weights = directions * GATES[op] * H * (_input_columns(shape) + recurrent)
    # Input read and output written once, weights read once. Training also reads dy, writes dx and writes the
    # gradients of the weights: each tensor a second time.
    tensors = tokens * (I + directions * H) + weights
    traffic = tensors * element_size * (2 if pass_ == "training" else 1)
    steps, launches = (shape.get("layers", 1) * dependent_steps(op, count, pass_) for count in (T, 1))
    return Work(flops, traffic, steps, launches)


def recurrence_flops(gates: int, shape: dict[str, int], pass_: str) -> float:
    """Products of one layer, or of several.

    Each step multiplies [B, I] and [B, H] with G·H columns: 2·B·G·H·(I + H). Backward multiplies once for the
    gradient of the input and state and once for that of the weights, each as large as the forward product.
    """
    T, H = shape["T"], shape["H"]
    tokens, directions = shape.get("tokens", T * shape["B"]), shape.get("directions", 1)
    of_input = 2 * tokens * gates * H * _input_columns(shape) * directions
    return (of_input + T * recurrent_flops(gates, shape)) * (3 if pass_ == "training" else 1)


def _input_columns(shape: dict[str, int]) -> int:
    """Widths of what all layers take in: I for the first, D·H for each that stands on another."""
    return shape["I"] + (shape.get("layers", 1) - 1) * shape.get("directions", 1) * shape["H"]


def recurrent_flops(gates: int, shape: dict[str, int]) -> float:
    """The product with the state, in one step (the average one, if not all have B rows): 2·B·G·H·H/N, N blocks; of
    all layers and directions."""
    T, H = shape["T"], shape["H"]
    rows = shape.get("tokens", T * shape["B"]) / T
    copies = shape.get("layers", 1) * shape.get("directions", 1)
    return 2 * rows * gates * H * (H // shape.get("blocks", 1)) * copies


def attention_flops(T: int, B: int, E: int, pass_: str, causal: bool = True) -> float:
    """Products of a self-attention layer of width E, projections included.

    The projections to queries, keys, values and output are four products [T·B, E]·[E, E]: 8·T·B·E². Each visible
    pair of positions costs 2·E for its score and 2·E for its share of the output, over all heads together;
    causal attention sees T·(T + 1)/2 pairs. Backward costs the projections twice more, and the pairs 2.5 times:
    five products where forward has two, since the scores are recomputed rather than stored.
    """
    projections = 8 * T * B * E * E
    scores = score_flops(B * visible_pairs(T, T, causal), E, E, pass_)
    return (projections if pass_ == "forward" else 3 * projections) + scores


def visible_pairs(M: int, N: int, causal: bool = False, window: int | None = None) -> int:
    """Of M queries and N keys, how many pairs may attend: query m sees keys n <= m, if causal, and of those the last
    ``window``, if there is one."""
    return banded_pairs(M, N, window - 1 if window else None, 0 if causal else None)


@functools.lru_cache(maxsize=256)
def banded_pairs(M: int, N: int, left: int | None = None, right: int | None = None, diagonal: int = 0) -> int:
    """How many pairs have -left <= n - m - diagonal <= right, as the kernels of attention count; None is open."""
    first = (0 if left is None else max(m + diagonal - left, 0) for m in range(M))
    last = (N - 1 if right is None else min(m + diagonal + right, N - 1) for m in range(M))
    return sum(max(end - begin + 1, 0) for begin, end in zip(first, last, strict=True))


def score_flops(pairs: float, D: int, DV: int, pass_: str) -> float:
    """Products of attention itself: for every visible pair 2·D for its score and 2·DV for its share of the output;
    backward the score again, the gradients of the weight, 2·DV, and of value, query and key. With D = DV that is
    4·D, and 2.5 times as much."""
    forward = 2 * (D + DV)
    return pairs * (forward if pass_ == "forward" else forward + 2 * (3 * D + 2 * DV))


# Of each attention kernel, how many products as wide as a key and as wide as a value it makes for a visible pair.
# Backward's two kernels both need the score and the gradient of the weight, which one kernel would make once: together
# they do 2·(D + DV) more than ``score_flops`` counts.
PAIR_PRODUCTS = {
    "attention_forward_kernel": (1, 1),
    "attention_decode_kernel": (1, 1),
    "attention_weights_kernel": (1, 0),
    "attention_backward_dkdv_kernel": (2, 2),
    "attention_backward_dq_kernel": (2, 1),
    "attention_backward_bias_kernel": (1, 1),
}


def attention_work(
    sequences: Iterable[tuple[int, int]],
    heads: tuple[int, int],
    D: int,
    pass_: str,
    element_size: int,
    causal: bool = False,
    window: int | None = None,
    bias_elements: int = 0,
) -> Work:
    """The work of attention by itself, without projections.

    ``sequences`` holds the queries and visible keys of each, ``heads`` how many of queries and of keys there are.
    Queries, visible keys and values, and a bias are read once and the output is written once; training does all that
    a second time, to gradients. One fused attention is one step, and so is its backward.
    """
    sequences = list(sequences)
    pairs = sum(visible_pairs(M, N, causal, window) for M, N in sequences)
    queries, keys = (sum(counts) for counts in zip(*sequences, strict=True))
    elements = 2 * D * (queries * heads[0] + keys * heads[1]) + bias_elements
    passes = 2 if pass_ == "training" else 1
    return Work(heads[0] * score_flops(pairs, D, D, pass_), passes * elements * element_size, passes, passes)


def dependent_steps(op: str, T: int, pass_: str) -> int:
    """Length of the longest chain of operations each of which needs the one before.

    One library product, one fused attention, or one time step of a recurrence counts one: on a machine without
    limits to its width, that is what remains. A recurrence projects its whole input first and then takes T
    steps, layer after layer; its backward takes T steps and then one product. Attention projects, attends,
    projects; its backward does the same in reverse.
    """
    forward = 3 if op == "attention" else T + 1
    return forward * (2 if pass_ == "training" else 1)


def model_flops(parameters: int, tokens: int, attention: float = 0.0) -> float:
    """One training step of a model: every weight takes part in one product forward and two backward, for each
    token; ``attention`` is the share of the scores, which belong to no weight."""
    return 6 * parameters * tokens + attention
