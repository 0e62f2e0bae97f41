"""Character models of about equal size, and how one of them is trained by two libraries in alternation."""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers import MODULES, causal_mask, make
from benchmarks.shapes import ModelSizes, Sizes
from benchmarks.text import Corpus
from seqcore.kernels.work import attention_flops, model_flops
from seqcore.testing.budget import assert_within_budget

MODELS = ("lstm", "gru", "transformer")
CHECKED_SEQUENCES = 4
LAST_STEPS = 5


class Recurrent(nn.Module):
    """Embedding, recurrent layers, and a projection to the alphabet."""

    def __init__(self, provider: str, op: str, alphabet: int, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.body = make(provider, MODULES[op], width, width, layers)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(characters))[0])


class Transformer(nn.Module):
    """A decoder-only Transformer: learned positions, torch's layers, and causal attention from ``provider``."""

    def __init__(self, provider: str, alphabet: int, width: int, layers: int, heads: int, T: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.positions = nn.Parameter(torch.randn(T, 1, width) * 0.02)
        self.body = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, norm_first=True) for _ in range(layers)
        )
        for layer in self.body:
            layer.self_attn = make(provider, "MultiheadAttention", width, heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)
        self.register_buffer("mask", causal_mask(T, "cpu", torch.float32), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.positions
        for layer in self.body:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


def build_model(provider: str, op: str, alphabet: int, width: int, sizes: ModelSizes) -> nn.Module:
    torch.manual_seed(0)
    if op == "transformer":
        return Transformer(provider, alphabet, width, sizes.layers, sizes.heads, sizes.T)
    return Recurrent(provider, op, alphabet, width, sizes.layers)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def choose_width(op: str, alphabet: int, sizes: ModelSizes) -> int:
    """The width, a multiple of 8 (for a Transformer of 4 for each head), nearest to the parameters asked for."""

    build = lambda width: build_model("torch.nn", op, alphabet, width, sizes)
    return nearest_width(build, sizes.parameters, 4 * sizes.heads if op == "transformer" else 8)


def nearest_width(build: Callable[[int], nn.Module], parameters: int, step: int) -> int:
    """The multiple of ``step`` at which what ``build`` makes has most nearly that many parameters, as a ratio."""

    def distance(width: int) -> float:
        with torch.device("meta"):
            return abs(math.log(count_parameters(build(width)) / parameters))

    width = step
    while distance(width + step) < distance(width):
        width += step
    return width


def training_flops(op: str, model: nn.Module, width: int, sizes: ModelSizes) -> float:
    """One training step; looking up embeddings and adding positions multiplies nothing."""
    idle = {"embedding.weight", "positions"}
    weights = sum(value.numel() for name, value in model.named_parameters() if name not in idle)
    scores = 0.0
    if op == "transformer":
        with_scores = attention_flops(sizes.T, sizes.B, width, "training")
        scores = sizes.layers * (with_scores - 3 * 8 * sizes.T * sizes.B * width**2)
    return model_flops(weights, sizes.T * sizes.B, scores)


@dataclass
class Trainer:
    """One model in training, and its losses over the seconds it has spent."""

    model: nn.Module
    corpus: Corpus
    sizes: Sizes
    dtype: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    held_out: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.sizes.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.sizes.models.learning_rate)

    def step(self) -> None:
        """One batch: forward, backward, clip, update; timed."""
        characters, following = self.batch(len(self.losses))
        begin = time.perf_counter()
        loss = self.loss(self.logits(characters), following)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # item() waits for the device, so the clock stops when the step has really ended.
        self.losses.append(loss.item())
        self.step_ms.append((time.perf_counter() - begin) * 1e3)

    def evaluate(self) -> None:
        """Loss on text that is never trained on, always the same excerpts; its time does not count."""
        characters, following = self.batch(0, held_out=True)
        with torch.no_grad():
            loss = self.loss(self.logits(characters), following).item()
        self.held_out.append({"step": len(self.losses), "wall_s": sum(self.step_ms) / 1e3, "loss": loss})

    def first_results(self) -> dict[str, Tensor]:
        """Logits and gradients of a few sequences of the first batch; the weights stay as they are."""
        characters, following = (part[:, :CHECKED_SEQUENCES] for part in self.batch(0))
        logits = self.logits(characters)
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(self.loss(logits, following), parameters.values())
        return {"logits": logits.detach(), **dict(zip(parameters, gradients, strict=True))}

    def batch(self, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        T, B = self.sizes.models.T, self.sizes.models.B
        characters, following = self.corpus.batch(T, B, seed, held_out)
        return characters.to(self.sizes.device), following.to(self.sizes.device)

    def logits(self, characters: Tensor) -> Tensor:
        # Half precision by autocast, the weights staying in float32, as one trains; else in the weights' own.
        half = self.dtype in {"bfloat16", "float16"}
        dtype = getattr(torch, self.dtype)
        with torch.autocast(self.sizes.device, dtype) if half else contextlib.nullcontext():
            return self.model(characters)

    def loss(self, logits: Tensor, following: Tensor) -> Tensor:
        wide = logits.double() if self.dtype == "float64" else logits.float()
        return F.cross_entropy(wide.flatten(0, 1), following.flatten())

    @property
    def curve(self) -> dict:
        return {"train_loss": self.losses, "step_ms": self.step_ms, "held_out": self.held_out}


def check(ours: Trainer, torchs: Trainer) -> None:
    """Raise AssertionError unless logits and gradients of a small batch are within the error budget."""
    exact = replace(torchs, model=copy.deepcopy(torchs.model).double(), dtype="float64")
    found, eager = ours.first_results(), torchs.first_results()
    for name, value in exact.first_results().items():
        assert_within_budget(found[name], value, eager[name], f"{name} of the first batch")


def train_in_turn(benchmark, ours: Trainer, torchs: Trainer) -> None:
    """Train both on the same batches in alternation, for the steps asked for, or less if the time is spent before.

    ``benchmark`` is pytest-benchmark's fixture, which must know its rounds beforehand: it takes the last few steps.
    """
    sizes = ours.sizes.models
    end = time.perf_counter() + sizes.seconds
    while len(ours.losses) + LAST_STEPS < sizes.steps and time.perf_counter() < end:
        if len(ours.losses) % sizes.evaluate_every == 0:
            ours.evaluate(), torchs.evaluate()
        torchs.step(), ours.step()
    benchmark.pedantic(ours.step, setup=torchs.step, rounds=LAST_STEPS, iterations=1)
    ours.evaluate(), torchs.evaluate()
