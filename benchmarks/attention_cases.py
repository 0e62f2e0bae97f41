"""What the attention suite measures, the most valuable first: a budget of time that runs out cuts the tail."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.shapes import PASSES, Sizes, powers_of_two
from seqcore.kernels.work import Work, attention_work

# Sweeps in the order of the report, and how tables call what is special about them.
SWEEPS = {
    "plain": "as many queries as keys, tokens fixed",
    "grouped": "grouped heads",
    "padded": "key lengths, half of all keys filled",
    "window": "sliding window",
    "bias": "additive bias with gradient, broadcast over the batch",
    "alibi": "ALiBi",
    "packed": "packed sequences, lengths from N/4 to N",
    "decode": "one query against a long cache",
    "memory": "one head, length varied",
}
HALF, SINGLE = "bfloat16", "float32"
# Where FlexAttention takes part in the sweeps that are large: it is compiled anew for each case.
COMPILED_D, COMPILED_N = 128, 4096


@dataclass(frozen=True)
class AttentionCase:
    """One problem: one row of the suite. Letters as in CONTRIBUTING; value's head dim is D too."""

    sweep: str
    pass_: str
    dtype: str
    B: int
    H: int
    M: int
    N: int
    D: int
    # Key heads; 0 for as many as there are query heads.
    H_kv: int = 0
    causal: bool = False
    # How many keys a query sees, its own the last; needs ``causal``.
    window: int | None = None
    # Of the B sequences: their keys or, packed, their queries and keys.
    lengths: tuple[int, ...] = ()
    packed: bool = False
    bias: bool = False
    alibi: bool = False

    @property
    def key_heads(self) -> int:
        return self.H_kv or self.H

    @property
    def grouped(self) -> bool:
        return self.key_heads != self.H

    @property
    def tokens(self) -> int:
        """Queries of the whole batch."""
        return sum(self.lengths) if self.packed else self.B * self.M

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Queries and visible keys of each sequence."""
        if self.packed:
            return [(length, length) for length in self.lengths]
        return [(self.M, N) for N in self.lengths or [self.N] * self.B]

    @property
    def score_bytes(self) -> int:
        """Of all scores [B, H, M, N] in float32."""
        return 4 * self.B * self.H * self.M * self.N

    @property
    def id(self) -> str:
        heads = f"H{self.H}" + (f"x{self.H_kv}" if self.grouped else "")
        kind = "-causal" if self.causal else ""
        return f"{self.sweep}-{self.pass_}-{self.dtype}-D{self.D}-{heads}-B{self.B}-M{self.M}-N{self.N}{kind}"

    @property
    def shape(self) -> dict[str, int]:
        """T is the number of keys, as it is wherever time grows with something."""
        sizes = {"T": self.N, "B": self.B, "M": self.M, "N": self.N, "H": self.H, "H_kv": self.key_heads, "D": self.D}
        return sizes | {"tokens": self.tokens}


def score_work(case: AttentionCase, element_size: int) -> Work:
    """What the case has to do: attention by itself, without projections."""
    heads, bias = (case.H, case.key_heads), case.H * case.M * case.N if case.bias else 0
    return attention_work(case.sequences, heads, case.D, case.pass_, element_size, case.causal, case.window, bias)


def spread_lengths(first: int, last: int, count: int) -> tuple[int, ...]:
    """``count`` lengths, evenly from ``first`` to ``last``; of one, the middle."""
    if count == 1:
        return ((first + last) // 2,)
    return tuple(first + i * (last - first) // (count - 1) for i in range(count))


def attention_cases(sizes: Sizes) -> list[AttentionCase]:
    """The suite on a GPU, or what little of it a CPU can say something about."""
    return list(_gpu() if sizes.device == "cuda" else _cpu(sizes))


def _square(sweep: str, pass_: str, B: int, H: int, N: int, D: int, dtype: str = HALF, **more) -> AttentionCase:
    return AttentionCase(sweep, pass_, dtype, B, H, N, N, D, **more)


def _padded(pass_: str, B: int, H: int, N: int, D: int, dtype: str = HALF) -> AttentionCase:
    return _square("padded", pass_, B, H, N, D, dtype, lengths=spread_lengths(N // 4, N - N // 4, B))


def _packed(pass_: str, B: int, H: int, N: int, D: int, causal: bool, dtype: str = HALF) -> AttentionCase:
    lengths = spread_lengths(N // 4, N, B)
    return _square("packed", pass_, B, H, N, D, dtype, lengths=lengths, packed=True, causal=causal)


def _gpu() -> Iterator[AttentionCase]:
    tokens, width, causal = 16384, 2048, (True, False)

    def plain(N: int, D: int, causal: bool, pass_: str) -> AttentionCase:
        return _square("plain", pass_, tokens // N, width // D, N, D, causal=causal)

    for B in (16, 1):
        yield AttentionCase("decode", "forward", HALF, B, 32, 1, 65536, 128, H_kv=8)
    for pass_ in PASSES:
        yield _padded(pass_, 4, 16, 4096, 128)
        yield _square("window", pass_, 1, 16, 16384, 128, causal=True, window=512)
    yield _square("bias", "training", 4, 16, 4096, 128, bias=True)
    for N, pass_ in product((4096, 16384), PASSES):
        yield _square("alibi", pass_, tokens // N, 16, N, 128, causal=True, alibi=True)
    for N, D, seen, pass_ in product((16384, 4096), (128, 64, 256), causal, PASSES):
        yield plain(N, D, seen, pass_)
    # The shapes of NVIDIA's published table.
    for N, pass_ in product((16384, 8192, 4096, 2048), PASSES):
        yield _square("grouped", pass_, 1, 64, N, 128, H_kv=8, causal=True)
    for N, pass_ in product(powers_of_two(1024, 65536), PASSES):
        yield _square("memory", pass_, 1, 1, N, 128, causal=True)
    for seen, pass_ in product(causal, PASSES):
        yield _packed(pass_, 8, 16, 4096, 128, seen)
    for N, D, seen, pass_ in product((8192, 2048, 1024), (128, 64, 256), causal, PASSES):
        yield plain(N, D, seen, pass_)


def _cpu(sizes: Sizes) -> Iterator[AttentionCase]:
    B, H, N, D = sizes.batch, sizes.heads, 2 * sizes.check_T, sizes.width // sizes.heads
    yield AttentionCase("decode", "forward", SINGLE, B, H, 1, 4 * N, D, H_kv=H // 2)
    for pass_ in PASSES:
        yield _square("plain", pass_, B, H, N, D, SINGLE, causal=True)
        yield _square("plain", pass_, B, H, N, D, SINGLE)
        yield _square("grouped", pass_, B, H, N, D, SINGLE, H_kv=H // 2, causal=True)
        yield _padded(pass_, B, H, N, D, SINGLE)
        yield _square("window", pass_, B, H, N, D, SINGLE, causal=True, window=N // 8)
        yield _square("alibi", pass_, B, H, N, D, SINGLE, causal=True, alibi=True)
        yield _packed(pass_, B, H, N, D, False, SINGLE)
    yield _square("bias", "training", B, H, N, D, SINGLE, bias=True)
    for length in powers_of_two(N // 2, 4 * N):
        yield _square("memory", "training", 1, 1, length, D, SINGLE, causal=True)
