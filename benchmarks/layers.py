"""The layers under test, whoever provides them, and the check that they are right before they are timed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqcore.nn
from benchmarks.shapes import RECURRENCES, Case, Sizes
from seqcore.profiling import problems
from seqcore.testing.budget import assert_within_budget
from seqcore.testing.cases import floats_as

TORCH = "torch.nn"
# torch.nn has no block-diagonal weights: its layer with the same, and zeros around them, takes their place.
DENSE = "torch.nn, dense"
# Nor does it know lengths of a padded batch, or episodes: this is what its users write.
PADDED, SEGMENTS = "torch.nn, packed and padded", "torch.nn, episode by episode"
TORCHS = (TORCH, DENSE, PADDED, SEGMENTS)
MODULES = {**problems.MODULES, "attention": "MultiheadAttention"}


def make(provider: str, name: str, *arguments, **options) -> nn.Module:
    """The module of that name from ``torch.nn``, or from seqcore on the backend that ``provider`` names."""
    if provider == TORCH:
        return getattr(nn, name)(*arguments, **options)
    return getattr(seqcore.nn, name)(*arguments, backend=provider, **options)


def plain(module: nn.Module, x: Tensor, **inputs: Tensor) -> Tensor:
    """Ours also with ``lengths`` or ``reset``, which torch's do not know."""
    return module(x, **inputs)[0]


def packed(module: nn.Module, x: Tensor, batch_sizes: Tensor) -> Tensor:
    return module(PackedSequence(x, batch_sizes))[0].data


def padded_by_packing(module: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Lengths as torch.nn's users give them: packed first, and padded afterwards."""
    rows = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    return pad_packed_sequence(module(rows)[0], total_length=x.shape[0])[0]


def in_segments(module: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    """Episodes as torch.nn's users run them: cut where any of them begins, its states set to zero there."""
    begins = reset.any(1).nonzero().flatten().tolist()
    cuts = [0, *(t for t in begins if t), x.shape[0]]
    outputs, hx = [], None
    for first, last in pairwise(cuts):
        if hx is not None:
            going = ~reset[first, :, None]
            hx = tuple(state * going for state in hx) if isinstance(hx, tuple) else hx * going
        y, hx = module(x[first:last], hx)
        outputs.append(y)
    return torch.cat(outputs)


def attend(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    # torch asks for the mask beside the hint, and with the hint never reads it.
    return module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


@dataclass
class Layer:
    """One layer as a function of [T, B, H], or of packed rows [R, H], with what it takes to differentiate it."""

    module: nn.Module
    # How the module is called: with x, and with ``inputs`` by name.
    call: Callable[..., Tensor] = plain
    # The causal "mask", the packed "batch_sizes", or the "lengths" or "reset" of a padded batch.
    inputs: dict[str, Tensor] = field(default_factory=dict)
    # Whose recurrent weights are dense only because the module knows no others.
    dense_blocks: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(self.module, x, **self.inputs)

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
        if "batch_sizes" not in self.inputs:
            sequences = spread(x.shape[1], B).to(x.device)
            parts = {
                "mask": lambda mask: mask[:T, :T],
                "lengths": lambda lengths: lengths[sequences.to(lengths.device)].clamp(max=T),
                "reset": lambda reset: reset[:T, sequences],
            }
            inputs = {name: parts[name](tensor) for name, tensor in self.inputs.items()}
            return replace(self, inputs=inputs), (slice(T), sequences)
        sizes = self.inputs["batch_sizes"][:T]
        sequences = spread(int(sizes[0]), B)
        present = sequences < sizes[:, None]  # [T, B]
        rows = (sizes.cumsum(0) - sizes)[:, None] + sequences
        return replace(self, inputs={"batch_sizes": present.sum(1)}), (rows[present].to(x.device),)

    def in_float64(self) -> "Layer":
        return replace(self, module=copy.deepcopy(self.module).double(), inputs=floats_as(torch.float64, self.inputs))


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
    arguments, options, ours_alone = (case.H, case.heads), {}, {}
    if case.op in RECURRENCES:
        arguments = (case.H, case.H)
        options = {"num_layers": case.layers, "bidirectional": case.directions == 2}
        ours_alone = {"blocks": case.blocks, "recompute": case.recompute}
    call, inputs = ways(case, sizes.device)
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
            layers[DENSE] = Layer(module, call, inputs, case.blocks)
        else:
            module.load_state_dict(weights)
            name, its_call = torchs_way(case) if provider == TORCH else (provider, call)
            layers[name] = Layer(module, its_call, inputs)
    return layers


def ways(case: Case, device: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """How ours is called in the case, and with what beside x."""
    if case.op not in RECURRENCES:
        return attend, {"mask": causal_mask(case.T, device, getattr(torch, case.dtype))}
    if case.packed:
        return packed, {"batch_sizes": torch.tensor(case.batch_sizes)}
    if case.ragged:
        return plain, {"lengths": torch.tensor(case.lengths, device=device)}
    if case.reset_every:
        generator = torch.Generator().manual_seed(2)
        return plain, {"reset": (torch.rand(case.T, case.B, generator=generator) < 1 / case.reset_every).to(device)}
    return plain, {}


def torchs_way(case: Case) -> tuple[str, Callable[..., Tensor]]:
    """How torch.nn's layer is called in the case, and what it is then called in tables."""
    if case.ragged:
        return PADDED, padded_by_packing
    if case.reset_every:
        return SEGMENTS, in_segments
    return TORCH, ways(case, "cpu")[0]


def make_data(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Input, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(1)
    rows, dtype = (case.tokens,) if case.packed else (case.T, case.B), getattr(torch, case.dtype)
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
