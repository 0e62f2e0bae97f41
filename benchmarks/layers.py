"""The layers under test, whoever provides them, and the check that they are right before they are timed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import seqcore.nn
from benchmarks.shapes import RECURRENCES, Case, Sizes
from seqcore.testing.budget import assert_within_budget

TORCH = "torch.nn"
MODULES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "attention": "MultiheadAttention"}


def make(provider: str, name: str, *arguments, **options) -> nn.Module:
    """The module of that name from ``torch.nn``, or from seqcore on the backend that ``provider`` names."""
    if provider == TORCH:
        return getattr(nn, name)(*arguments, **options)
    return getattr(seqcore.nn, name)(*arguments, backend=provider, **options)


@dataclass
class Layer:
    """One layer as a function of [T, B, H], with what it takes to differentiate it."""

    module: nn.Module
    mask: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return self.module(x)[0]
        # torch asks for the mask beside the hint, and with the hint never reads it.
        return self.module(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self(x)

    def gradients(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """Of the input and of every parameter, by name."""
        x = x.detach().requires_grad_()
        parameters = dict(self.module.named_parameters())
        found = torch.autograd.grad(self(x), [x, *parameters.values()], dy)
        return dict(zip(["x", *parameters], found, strict=True))

    def shortened(self, T: int) -> "Layer":
        return self if self.mask is None else Layer(self.module, self.mask[:T, :T])

    def in_float64(self) -> "Layer":
        mask = None if self.mask is None else self.mask.double()
        return Layer(copy.deepcopy(self.module).double(), mask)


def causal_mask(T: int, device: str, dtype: torch.dtype) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(T, device=device, dtype=dtype)


def build_layers(case: Case, sizes: Sizes) -> dict[str, Layer]:
    """The case's layer from every provider that takes part, ours first, all with the same weights."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    if case.op in RECURRENCES:
        arguments, mask = (case.H, case.H), None
    else:
        arguments, mask = (case.H, case.heads), causal_mask(case.T, sizes.device, dtype)
    layers, weights = {}, None
    for provider in (sizes.ours, *sizes.peers):
        if case.T > sizes.peer_limits.get(provider, case.T):
            continue
        module = make(provider, MODULES[case.op], *arguments, device=sizes.device, dtype=dtype)
        weights = module.state_dict() if weights is None else weights
        module.load_state_dict(weights)
        layers[provider] = Layer(module, mask)
    return layers


def make_data(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Input, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(1)
    shape, dtype = (case.T, case.B, case.H), getattr(torch, case.dtype)
    x, dy = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x, dy


def passes(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """What is timed: inference, or forward and backward together."""
    return (lambda: layer.forward(x)) if case.pass_ == "forward" else (lambda: layer.gradients(x, dy))


def check(case: Case, sizes: Sizes, ours: Layer, torchs: Layer, x: Tensor, dy: Tensor) -> dict[str, int]:
    """Raise AssertionError unless ours is within the error budget; say at which shape it was compared.

    float64 is slow, and at great length its scores fill the memory, so the comparison covers the first steps and
    rows only. All these layers are causal, so the beginning of ours at full size is compared; gradients depend
    on the whole sequence, so theirs are compared on the shorter one.
    """
    T, B = min(case.T, sizes.check_T), min(case.B, sizes.check_B)
    short_x, short_dy = x[:T, :B].contiguous(), dy[:T, :B].contiguous()
    exact_x, exact_dy = short_x.double(), short_dy.double()
    eager = torchs.shortened(T)
    exact = eager.in_float64()
    output = ours.forward(x)[:T, :B]
    assert_within_budget(output, exact.forward(exact_x), eager.forward(short_x), f"{case.id}: output")
    if case.pass_ == "training":
        found = ours.shortened(T).gradients(short_x, short_dy)
        plain = eager.gradients(short_x, short_dy)
        for name, value in exact.gradients(exact_x, exact_dy).items():
            assert_within_budget(found[name], value, plain[name], f"{case.id}: gradient of {name}")
    return {"T": T, "B": B}


class SavedBytes:
    """Counts the bytes that autograd keeps for backward, each storage once, the given tensors' apart."""

    def __init__(self, *not_counted: Tensor):
        self.sizes: dict[int, int] = {}
        self.not_counted = {tensor.untyped_storage().data_ptr() for tensor in not_counted}

    def __enter__(self) -> "SavedBytes":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.not_counted:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def memory(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> tuple[int | None, str | None]:
    """Bytes one pass needs beyond weights, input and gradient of the output, and how that was counted."""
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        passes(case, layer, x, dy)()
        return torch.cuda.max_memory_allocated() - before, "peak allocated"
    if case.pass_ == "forward":
        return None, None
    x = x.detach().requires_grad_()
    with SavedBytes(x, *layer.module.parameters()) as saved:
        layer(x)
    return saved.total, "saved for backward"
