"""The layers under test, whoever provides them, and the check that they are right before they are timed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import seqcore.nn
from benchmarks.shapes import RECURRENCES, Case, Sizes
from seqcore.testing.budget import assert_within_budget

TORCH = "torch.nn"
# torch.nn has no block-diagonal weights: its layer with the same, and zeros around them, takes their place.
DENSE = "torch.nn, dense"
MODULES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "attention": "MultiheadAttention"}


def make(provider: str, name: str, *arguments, **options) -> nn.Module:
    """The module of that name from ``torch.nn``, or from seqcore on the backend that ``provider`` names."""
    if provider == TORCH:
        return getattr(nn, name)(*arguments, **options)
    return getattr(seqcore.nn, name)(*arguments, backend=provider, **options)


@dataclass
class Layer:
    """One layer as a function of [T, B, H], or of packed rows [R, H], with what it takes to differentiate it."""

    module: nn.Module
    mask: Tensor | None = None
    batch_sizes: Tensor | None = None
    # Whose recurrent weights are dense only because the module knows no others.
    dense_blocks: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        if self.batch_sizes is not None:
            return self.module(PackedSequence(x, self.batch_sizes))[0].data
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
        gradients = dict(zip(["x", *parameters], found, strict=True))
        if self.dense_blocks > 1:
            gradients |= {
                name: blocks_of(gradient, self.dense_blocks)
                for name, gradient in gradients.items()
                if name.startswith("weight_hh")
            }
        return gradients

    def sample(self, x: Tensor, T: int, B: int) -> tuple["Layer", tuple]:
        """The layer for the first T steps of B of x's sequences, spread over the batch, and the index that takes
        their part of x, y and their gradients."""
        if self.batch_sizes is None:
            sequences = spread(x.shape[1], B)
            mask = None if self.mask is None else self.mask[:T, :T]
            return replace(self, mask=mask), (slice(T), sequences.to(x.device))
        sizes = self.batch_sizes[:T]
        sequences = spread(int(sizes[0]), B)
        present = sequences < sizes[:, None]  # [T, B]
        rows = (sizes.cumsum(0) - sizes)[:, None] + sequences
        return replace(self, batch_sizes=present.sum(1)), (rows[present].to(x.device),)

    def in_float64(self) -> "Layer":
        mask = None if self.mask is None else self.mask.double()
        return replace(self, module=copy.deepcopy(self.module).double(), mask=mask)


def spread(count: int, wanted: int) -> Tensor:
    """At most ``wanted`` of ``count`` indices, from the first to the last, evenly spread."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def dense(w_hh: Tensor) -> Tensor:
    """Block-diagonal [G, N, H/N, H/N] as the [G*H, H] it stands for."""
    return torch.cat([torch.block_diag(*gate) for gate in w_hh])


def blocks_of(w_hh: Tensor, blocks: int) -> Tensor:
    """The reverse of ``dense``: the blocks on each gate's diagonal of [G*H, H]."""
    gates, units = w_hh.shape[0] // w_hh.shape[1], w_hh.shape[1] // blocks
    by_blocks = w_hh.view(gates, blocks, units, blocks, units)
    return by_blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def causal_mask(T: int, device: str, dtype: torch.dtype) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(T, device=device, dtype=dtype)


def build_layers(case: Case, sizes: Sizes) -> dict[str, Layer]:
    """The case's layer from every provider that takes part, ours first, all with the same weights."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    arguments, options, mask, ours_alone = (case.H, case.heads), {}, None, {}
    if case.op in RECURRENCES:
        arguments, options = (case.H, case.H), {"bidirectional": case.directions == 2}
        ours_alone = {"blocks": case.blocks, "recompute": case.recompute}
    else:
        mask = causal_mask(case.T, sizes.device, dtype)
    batch_sizes = torch.tensor(case.batch_sizes) if case.packed else None
    layers, weights = {}, None
    for provider in (sizes.ours, *sizes.peers):
        if case.T > sizes.peer_limits.get(provider, case.T):
            continue
        more = {} if provider == TORCH else ours_alone
        module = make(provider, MODULES[case.op], *arguments, device=sizes.device, dtype=dtype, **options, **more)
        weights = module.state_dict() if weights is None else weights
        if provider == TORCH and case.blocks > 1:
            fitting = {name: dense(w) if name.startswith("weight_hh") else w for name, w in weights.items()}
            module.load_state_dict(fitting)
            layers[DENSE] = Layer(module, mask, batch_sizes, case.blocks)
        else:
            module.load_state_dict(weights)
            layers[provider] = Layer(module, mask, batch_sizes)
    return layers


def make_data(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Input, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(1)
    rows, dtype = (sum(case.batch_sizes),) if case.packed else (case.T, case.B), getattr(torch, case.dtype)
    x, dy = (
        torch.randn(*rows, width, generator=generator, device=device, dtype=dtype)
        for width in (case.H, case.directions * case.H)
    )
    return x, dy


def passes(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """What is timed: inference, or forward and backward together."""
    return (lambda: layer.forward(x)) if case.pass_ == "forward" else (lambda: layer.gradients(x, dy))


def check(case: Case, sizes: Sizes, ours: Layer, torchs: Layer, x: Tensor, dy: Tensor) -> dict[str, int]:
    """Raise AssertionError unless ours is within the error budget; say at which shape it was compared.

    float64 is slow, and at great length its scores fill the memory, so the comparison covers some of the batch and,
    of causal layers, the first steps. Ours always runs at full size, as it is timed: where only those steps and
    sequences have a gradient, all gradients are those of the short problem.
    """
    causal = case.directions == 1
    T, B = min(case.T, sizes.check_T) if causal else case.T, min(case.B, sizes.check_B)
    eager, part = torchs.sample(x, T, B)
    exact = eager.in_float64()
    short_x, short_dy = x[part], dy[part]
    exact_x, exact_dy = short_x.double(), short_dy.double()
    assert_within_budget(
        ours.forward(x)[part], exact.forward(exact_x), eager.forward(short_x), f"{case.id}: output"
    )
    if case.pass_ == "training":
        only_part = torch.zeros_like(dy)
        only_part[part] = short_dy
        found = ours.gradients(x, only_part)
        found["x"] = found["x"][part]
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


def kept_bytes(layer: Layer, x: Tensor) -> int:
    """Bytes that forward leaves behind for backward: on a GPU all that stays allocated, its output included."""
    x = x.detach().requires_grad_()
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        y = layer(x)
        kept = torch.cuda.memory_allocated() - before
        del y
        return kept
    with SavedBytes(x, *layer.module.parameters()) as saved:
        layer(x)
    return saved.total


def peak_allocated(call: Callable[[], object]) -> int:
    """Bytes of the GPU's memory that a call takes at most, beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def memory(case: Case, layer: Layer, x: Tensor, dy: Tensor) -> tuple[int | None, str | None]:
    """Bytes one pass needs beyond weights, input and gradient of the output, and how that was counted."""
    if x.is_cuda:
        return peak_allocated(passes(case, layer, x, dy)), "peak allocated"
    if case.pass_ == "forward":
        return None, None
    return kept_bytes(layer, x), "saved for backward"
