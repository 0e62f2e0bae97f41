"""The tensors of an attention case, who may see whom, and the check that a result is right before it is timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import AttentionCase
from benchmarks.layers import SavedBytes, peak_allocated, spread
from benchmarks.shapes import Sizes
from seqcore.testing.budget import assert_within_budget

NAMES = ("query", "key", "value", "bias")
# Of batch and heads each: the float64 comparison takes the first and the last.
SAMPLED = 2


@dataclass(frozen=True)
class Data:
    """query [B, H, M, D], key and value [B, H_kv, N, D]; packed, B is 1 and the sequences lie end to end."""

    case: AttentionCase
    query: Tensor
    key: Tensor
    value: Tensor
    # Gradient of the output.
    dout: Tensor
    # [1, H, M, N], and takes a gradient.
    bias: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What takes a gradient."""
        return (self.query, self.key, self.value, *(() if self.bias is None else (self.bias,)))

    @property
    def device(self) -> torch.device:
        return self.query.device

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor(self.case.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """[B + 1]: where the packed sequences begin, and the last one ends."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def sequence(self) -> Tensor:
        """Which packed sequence each token belongs to."""
        return torch.arange(self.case.B, device=self.device).repeat_interleave(self.lengths)

    @cached_property
    def slopes(self) -> Tensor:
        """[H], as in Press et al. (2022): 2^(-8/H), 2^(-16/H), …"""
        H = self.case.H
        return torch.exp2(-8 / H * torch.arange(1, H + 1, dtype=torch.float32, device=self.device))

    def visible(self, rows: Tensor) -> Tensor:
        """Whether these queries may see each key, [B or 1, 1, R, N]."""
        case, row, column = self.case, rows[:, None], torch.arange(self.key.shape[2], device=self.device)
        seen = torch.ones(1, 1, len(rows), len(column), dtype=torch.bool, device=self.device)
        if case.causal:
            seen = seen & (column <= row)
        if case.window:
            seen = seen & (row - column < case.window)
        if case.packed:
            return seen & (self.sequence[row] == self.sequence)
        return seen & (column < self.lengths[:, None, None, None]) if case.lengths else seen

    def additive(self, rows: Tensor, heads: Tensor, dtype: torch.dtype) -> Tensor:
        """What these queries' scores get added but the bias: -inf where they may not see, ALiBi elsewhere."""
        distance = (rows[:, None] - torch.arange(self.key.shape[2], device=self.device)).abs()
        slopes = self.slopes if self.case.alibi else torch.zeros_like(self.slopes)
        scores = -slopes[heads, None, None].to(dtype) * distance
        return torch.where(self.visible(rows), scores, float("-inf"))

    @property
    def masked(self) -> bool:
        """Whether torch's operator, which knows causal and nothing else, must be given a mask."""
        case = self.case
        # Right of the causal diagonal no query looks, and there lies all padding behind its own sequence.
        return bool(case.bias or case.alibi or case.window or (case.lengths and not case.causal))

    @cached_property
    def mask(self) -> Tensor | None:
        """That mask, unless it is the bias; as small as it may be."""
        case, rows = self.case, torch.arange(self.case.M, device=self.device)
        if case.bias or not self.masked:
            return None
        if case.alibi:
            return self.additive(rows, torch.arange(case.H, device=self.device), self.query.dtype)
        # Lengths hide the same keys from every query.
        return self.visible(rows if case.window else rows[:1])

    @cached_property
    def unpacked(self) -> "Data":
        """The same sequences as a padded batch; those that are no packed ones as they are."""
        if not self.case.packed:
            return self
        inner = [padded(tensor, self.case.lengths) for tensor in (*self.inputs, self.dout)]
        return Data(replace(self.case, packed=False), *inner)


def padded(tensor: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[1, H, tokens, D] of packed sequences as [B, H, the longest, D], zeros behind the shorter."""
    sequences = [part.transpose(0, 1) for part in tensor[0].split(lengths, dim=1)]
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2).contiguous()


def make_data(case: AttentionCase, device: str) -> Data:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    B, M, N = (1, case.tokens, case.tokens) if case.packed else (case.B, case.M, case.N)
    query, dout = (randn(B, case.H, M, case.D) for _ in range(2))
    key, value = (randn(B, case.key_heads, N, case.D) for _ in range(2))
    return Data(case, query, key, value, dout, randn(1, case.H, M, N) if case.bias else None)


@dataclass(frozen=True)
class Contestant:
    """One implementation of a case: a function of tensors [B, H, M, D] and what else takes a gradient."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    dout: Tensor

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def gradients(self, dout: Tensor | None = None) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        return torch.autograd.grad(self.call(*leaves), leaves, self.dout if dout is None else dout)

    def run(self, pass_: str) -> object:
        """What is timed: inference, or forward and backward together."""
        return self.forward() if pass_ == "forward" else self.gradients()

    def memory(self, pass_: str) -> int | None:
        """Bytes beyond the inputs and the gradient of the output, counted as those of layers are."""
        if self.dout.is_cuda:
            return peak_allocated(lambda: self.run(pass_))
        if pass_ == "forward":
            return None
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        with SavedBytes(*leaves) as saved:
            self.call(*leaves)
        return saved.total


@dataclass(frozen=True)
class Sample:
    """Some queries of some heads of some of the batch; ``keys`` are the key heads they look at."""

    batch: Tensor
    heads: Tensor
    rows: Tensor
    keys: Tensor
    # Which of ``keys`` each of ``heads`` looks at.
    key_of: Tensor

    @classmethod
    def of(cls, data: Data, rows: int) -> "Sample":
        B, H, M, _ = data.query.shape
        batch, heads, rows = (spread(n, most).to(data.device) for n, most in ((B, SAMPLED), (H, SAMPLED), (M, rows)))
        keys, key_of = (heads // (H // data.case.key_heads)).unique(return_inverse=True)
        return cls(batch, heads, rows, keys, key_of)

    @property
    def queries(self) -> tuple[Tensor, ...]:
        """The index of their part of query, output and their gradients."""
        return self.batch[:, None, None], self.heads[:, None], self.rows

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """Their part of an input or of its gradient."""
        if name == "query":
            return tensor[self.queries]
        if name == "bias":
            return tensor[:, self.heads[:, None], self.rows]
        return tensor[self.batch[:, None], self.keys]

    def plain(self, data: Data, dtype: torch.dtype) -> Contestant:
        """The sampled queries alone, by torch's own mathematics."""
        constant = data.additive(self.rows, self.heads, dtype)
        constant = constant[self.batch] if len(constant) > 1 else constant

        def call(query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
            key, value = (tensor[:, self.key_of] for tensor in (key, value))
            with sdpa_kernel([SDPBackend.MATH]):
                return F.scaled_dot_product_attention(query, key, value, sum(bias, constant))

        inputs = (self.take(name, tensor).to(dtype) for name, tensor in zip(NAMES, data.inputs, strict=False))
        return Contestant(call, tuple(inputs), data.dout[self.queries].to(dtype))


def check(data: Data, ours: Contestant, sizes: Sizes) -> dict[str, int]:
    """Raise AssertionError unless ours is within the error budget; say how much of it was compared.

    float64 is slow, so the comparison covers some queries, from the first to the last. Ours always runs at full
    size, as it is timed: where only those queries have a gradient, all gradients are those of the short problem.
    """
    case, sample = data.case, Sample.of(data, sizes.check_T)
    exact, eager = (sample.plain(data, dtype) for dtype in (torch.float64, data.query.dtype))
    found = ours.forward()[sample.queries]
    assert_within_budget(found, exact.forward(), eager.forward(), f"{case.id}: output")
    if case.pass_ == "training":
        only = torch.zeros_like(data.dout)
        only[sample.queries] = data.dout[sample.queries]
        gradients = zip(NAMES, ours.gradients(only), exact.gradients(), eager.gradients(), strict=False)
        for name, whole, right, plain in gradients:
            assert_within_budget(sample.take(name, whole), right, plain, f"{case.id}: gradient of {name}")
    return {"B": len(sample.batch), "H": len(sample.heads), "M": len(sample.rows)}
