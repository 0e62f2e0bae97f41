"""Small Transformers of the three kinds, of torch.nn's layers on seqcore's attention, and a task for each kind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

import seqcore
from benchmarks.study.models import causal_mask, transformer_layers
from benchmarks.study.tasks import generator
from benchmarks.study.training import Batch
from seqcore.nn import SinusoidalPositions

ENCODER, DECODER, BOTH = "encoder-only", "decoder-only", "encoder-decoder"
# Their rivals, on the same task: the same layers under the other mask, or with nothing to read in the source.
BLIND, CHEATING = "encoder-only, causal mask", "decoder-only, no mask"
SOURCELESS = "encoder-decoder, source hidden"
RIVALS = {ENCODER: BLIND, DECODER: CHEATING, BOTH: SOURCELESS}
MODELS = tuple(model for pair in RIVALS.items() for model in pair)


class Shape(Protocol):
    """What a model's size is told by; ``symbols`` of an alphabet."""

    symbols: int
    width: int
    layers: int
    heads: int


class Stack(nn.Module):
    """torch.nn.TransformerEncoder over tokens: with a causal mask it is what is called decoder-only."""

    def __init__(self, shape: Shape, causal: bool):
        super().__init__()
        # One symbol more: where one is hidden, or where a sequence begins.
        self.embedding, self.positions = nn.Embedding(shape.symbols + 1, shape.width), SinusoidalPositions(shape.width)
        self.body = transformer_layers(shape.width, shape.layers, shape.heads)
        self.head, self.causal = nn.Linear(shape.width, shape.symbols), causal

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outputs(self.embedding(tokens))

    def outputs(self, x: Tensor) -> Tensor:
        mask = causal_mask(len(x), x.device) if self.causal else None
        return self.head(self.body(self.positions(x), mask, is_causal=self.causal))


class EncoderDecoder(nn.Module):
    """torch.nn.Transformer over tokens: the source without a mask, what is made of it with a causal one."""

    def __init__(self, shape: Shape):
        super().__init__()
        encoder = transformer_layers(shape.width, shape.layers, shape.heads)
        options = {"dim_feedforward": 4 * shape.width, "dropout": 0.0, "norm_first": True}
        self.embedding, self.positions = nn.Embedding(shape.symbols + 1, shape.width), SinusoidalPositions(shape.width)
        self.body = nn.Transformer(shape.width, shape.heads, 0, shape.layers, custom_encoder=encoder, **options)
        self.head = nn.Linear(shape.width, shape.symbols)

    def forward(self, tokens: tuple[Tensor, Tensor]) -> Tensor:
        return self.outputs(*map(self.embedding, tokens))

    def outputs(self, source: Tensor, given: Tensor) -> Tensor:
        mask = causal_mask(len(given), given.device)
        y = self.body(self.positions(source), self.positions(given), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


def hidden_tokens(symbols: int, T: int, B: int, device: str, *seeds: int) -> Batch:
    """A half and the same again; of half of the pairs one token is hidden, to be found where its twin stands."""
    random = generator(device, *seeds)
    half = torch.randint(symbols, (T // 2, B), generator=random, device=device)
    chosen = torch.rand(T // 2, B, generator=random, device=device) < 0.5
    first = torch.rand(T // 2, B, generator=random, device=device) < 0.5
    # One at least.
    chosen[0] |= ~chosen.any(0)
    target = torch.cat([half, half])
    hidden = torch.cat([chosen & first, chosen & ~first])
    return Batch(target.masked_fill(hidden, symbols), target, hidden)


def motifs(symbols: int, T: int, B: int, device: str, *seeds: int) -> Batch:
    """A few tokens over and over, 2 of them to T/4; the second half is to be told token by token."""
    random = generator(device, *seeds)
    period = torch.randint(2, max(T // 4, 2) + 1, (B,), generator=random, device=device)
    tokens = torch.randint(symbols, (T, B), generator=random, device=device)
    steps = torch.arange(T, device=device)[:, None]
    target = tokens.gather(0, steps % period)
    return Batch(begun(target, symbols), target, (steps >= T // 2).expand(T, B))


def sorting(symbols: int, T: int, B: int, device: str, *seeds: int) -> Batch:
    """Half as many tokens, to be put out in order."""
    source = torch.randint(symbols, (T // 2, B), generator=generator(device, *seeds), device=device)
    target = source.sort(0).values
    return Batch((source, begun(target, symbols)), target)


def without_source(batch: Batch) -> Batch:
    """The same with each token of the source hidden; what stands for the beginning stands for that too."""
    source, given = batch.x
    return replace(batch, x=(given[:1].expand_as(source), given))


def begun(target: Tensor, symbols: int) -> Tensor:
    """What a decoder is given: a beginning, and all but the last of what it is to put out."""
    return torch.cat([torch.full_like(target[:1], symbols), target[:-1]])


TASKS: dict[str, Callable[..., Batch]] = {ENCODER: hidden_tokens, DECODER: motifs, BOTH: sorting}
TASK_NAMES = {ENCODER: "hidden tokens", DECODER: "motifs continued", BOTH: "sorting"}


def kind_of(model: str) -> str:
    return next(kind for kind in TASKS if model.startswith(kind))


def make(model: str, shape: Shape) -> nn.Module:
    body = EncoderDecoder(shape) if kind_of(model) == BOTH else Stack(shape, causal=model in (BLIND, DECODER))
    seqcore.replace(body)
    return body


@torch.no_grad()
def use(kind: str, model: nn.Module, asked: Batch) -> Tensor:
    """The likeliest symbols; a decoder's one after the other, blanks standing where it has told none yet."""
    if kind == ENCODER:
        return model(asked.x).argmax(-1)
    told, blank = asked.target.clone(), asked.x[0, 0] if kind == DECODER else asked.x[1][0, 0]
    first = 0 if asked.counts is None else int(asked.counts[:, 0].long().argmax())
    given = (asked.x if kind == DECODER else asked.x[1]).clone()
    given[first + 1 :] = blank
    for t in range(first, len(given)):
        told[t] = model(given if kind == DECODER else (asked.x[0], given))[t].argmax(-1)
        given[t + 1 : t + 2] = told[t]
    return told


def flows(model: nn.Module, batch: Batch) -> dict[str, list[list[float]]]:
    """Under "flow", and of an encoder-decoder "source_flow": norms of gradients, [outputs][inputs], of the largest."""
    tokens = batch.x if isinstance(batch.x, tuple) else (batch.x,)
    inputs = [model.embedding(each).detach().requires_grad_() for each in tokens]
    best = model.outputs(*inputs).max(-1).values.sum(1)
    gradients = [torch.autograd.grad(one, inputs, retain_graph=True) for one in best]
    found = {}
    for name, of_one in zip(("flow", "source_flow"), reversed(list(zip(*gradients, strict=True))), strict=False):
        norms = torch.stack([gradient.norm(dim=-1).mean(1) for gradient in of_one])
        # Not rounded to so few places that something becomes nothing.
        found[name] = [[float(f"{value:.3g}") for value in row] for row in (norms / norms.max()).tolist()]
    return found
