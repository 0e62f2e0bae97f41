"""How the operators divide when they are given ``torch.distributed.tensor.DTensor``s.

The sequences of a batch are independent, and so are heads. So along a dimension of the mesh over which an input is
divided by batch or by heads, every process runs the operator on what it has, and none waits for another. What stands
for the whole batch or for all heads (weights, slopes, a broadcast mask, the one key head of many queries') is whole
everywhere, and its gradient a partial sum. All else is made whole first: a recurrence cannot be divided along time, nor
by hidden units without talking at every step; for queries and keys there is ``seqcore.distributed.ring_attention``.

Importing this module tells DTensor. Plain tensors among the inputs are taken to be the same on all processes, as
DTensor's ``implicit_replication`` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._redistribute import redistribute_local_tensor

from ..errors import InvalidInput, UnsupportedInput

Given = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What the dimensions of one operator's tensors are, a letter each: B batch, R rows of a batch, H heads.

    ``results`` are the dimensions of each result, or, with ``gradients``, the input each is the gradient of.
    ``divisible(given)`` says which letters may be divided in this call. A tensor without dimensions is whole.
    Which letter is divided, ``_DECIDING`` tensors decide: those that forward was given too, so that backward divides as
    forward did, however the gradients come.
    """

    inputs: dict[str, str]
    results: tuple[str, ...]
    divisible: Callable[[Given], str]
    gradients: bool = False


_ATTENTION = {
    "q": "BHMD", "k": "BHND", "v": "BHND", "mask": "BHMN", "slopes": "H", "sinks": "H", "q_lengths": "B",
    "k_lengths": "B", "out": "BHMD", "dout": "BHMD", "dlse": "BHM", "rows": ".BHM",
}  # fmt: skip
_DECIDING = {
    "q", "k", "v", "mask", "slopes", "sinks", "q_lengths", "k_lengths", "x", "h0", "c0", "lengths", "reset",
}  # fmt: skip
_RECURRENCE = {
    "x": "TBI", "h0": "DBH", "c0": "DBH", "lengths": "B", "reset": "TB", "y": "TBH", "dy": "TBH", "dh_n": "DBH",
    "dc_n": "DBH", "saved": ".RS", "cells": "RH", "dcells": "RH", "hidden": "RH", "extra": ".TBE",
}  # fmt: skip


def _of_attention(given: Given) -> str:
    # Sequences laid end to end are one batch of one.
    return "H" if given["packed"] else "BH"


def _of_weights(given: Given) -> str:
    if given["dropout_p"] and "H" in _Division(RULES["attention_forward"], given).by:
        raise UnsupportedInput(
            "averaged weights of heads that are divided among processes, which drop apart, cannot be given; divide by "
            "batch, or pass dropout_p=0"
        )
    return "" if given["packed"] else "B"


def _of_recurrence(given: Given) -> str:
    # Packed rows are not laid out by sequence, and states to reset to stand behind the batch's own.
    whole = given["batch_sizes"] is not None or given["h0"].shape[1] != given["x"].shape[1]
    return "" if whole else "B"


RULES = {
    "attention_forward": Rule(_ATTENTION, ("BHMD", "BHM", ".BHM"), _of_attention),
    "attention_backward": Rule(_ATTENTION, ("q", "k", "v", "mask", "sinks"), _of_attention, gradients=True),
    "attention_weights": Rule(_ATTENTION, ("BMN",), _of_weights),
    "attention_weights_backward": Rule(
        _ATTENTION | {"dweights": "BMN"}, ("q", "k", "v", "mask", "sinks"), _of_weights, gradients=True
    ),
    "recurrence_forward": Rule(_RECURRENCE, ("TBH", "DBH", "DBH", ".RS", "RH", "RH"), _of_recurrence),
    "recurrence_backward": Rule(_RECURRENCE, ("x", "h0", "c0", "weights"), _of_recurrence, gradients=True),
}


class _Division:
    """Of one call: by which letter each dimension of the mesh divides its tensors, if by any."""

    def __init__(self, rule: Rule, given: Given) -> None:
        named = [(dims, given[name]) for name, dims in rule.inputs.items() if name in _DECIDING & given.keys()]
        named = [(dims, tensor) for dims, tensor in named if tensor is not None and tensor.dim() == len(dims)]
        self.mesh = _mesh(given)
        self.sizes: dict[str, set[int]] = {}
        for dims, tensor in named:
            for letter, size in zip(dims, tensor.shape, strict=True):
                self.sizes.setdefault(letter, set()).add(size)
        if "T" in self.sizes:
            self.sizes["R"] = {max(self.sizes["T"]) * max(self.sizes["B"])}
        self.by: list[str | None] = []
        divisible = rule.divisible(given)
        for axis in range(self.mesh.ndim):
            placed = [(dims, tensor.placements[axis]) for dims, tensor in named if isinstance(tensor, DTensor)]
            letters = [dims[place.dim] for dims, place in placed if isinstance(place, Shard)]
            self.by.append(next((x for x in letters if x in divisible and self._fits(x, axis)), None))

    def _fits(self, letter: str, axis: int) -> bool:
        """A batch may be divided unevenly; heads may not, or queries would end up beside the keys of another group."""
        ranks = self.mesh.size(axis)
        for before, by in enumerate(self.by):
            ranks *= self.mesh.size(before) if by == letter else 1
        sizes = self.sizes[letter] - {1}
        return bool(sizes) and (letter == "B" or all(size % ranks == 0 for size in sizes))

    def _placements(self, dims: str, shape: torch.Size | None, whole: Placement) -> list[Placement]:
        """Where the parts of a tensor belong; dimensions of size 1 stay ``whole``, if a shape says which are."""
        if shape is not None and len(shape) != len(dims):
            dims = ""
        divided = {letter.replace("R", "B"): d for d, letter in enumerate(dims) if shape is None or shape[d] != 1}
        return [Replicate() if by is None else Shard(divided[by]) if by in divided else whole for by in self.by]

    def enter(self, dims: str, tensor: Any) -> Any:
        """This process's part of an input, or of each in a list."""
        if isinstance(tensor, (list, tuple)):
            return [self.enter(dims, each) for each in tensor]
        if not isinstance(tensor, Tensor):
            return tensor
        placements = self._placements(dims, tensor.shape, Replicate())
        if isinstance(tensor, DTensor):
            return _local(tensor, placements)
        spec = _spec(self.mesh, [Replicate()] * self.mesh.ndim, tensor)
        return redistribute_local_tensor(tensor, spec, _spec(self.mesh, placements, tensor))

    def leave(self, dims: str, part: Any, like: Any = None) -> Any:
        """The result that ``part`` is this process's part of; a gradient, if ``like`` is the input it belongs to."""
        if isinstance(part, (list, tuple)):
            return [self.leave(dims, *pair) for pair in zip(part, like, strict=True)]
        if like is not None and part.shape == (0,) != like.shape:
            return part  # in the place of a gradient that nobody wants
        found = self._placed(dims, part, like)
        # What came as a plain tensor gets a plain gradient.
        return found if like is None or isinstance(like, DTensor) else _local(found, [Replicate()] * self.mesh.ndim)

    def _placed(self, dims: str, part: Tensor, like: Tensor | None) -> DTensor:
        whole = Replicate() if like is None else Partial()
        if part.dim() != len(dims):
            return DTensor.from_local(part, self.mesh, self._placements("", None, whole), run_check=False)
        placements = self._placements(dims, None if like is None else like.shape, whole)
        shape = list(part.shape)
        for place in placements:
            if isinstance(place, Shard):
                shape[place.dim] = max(self.sizes[dims[place.dim]]) if like is None else like.shape[place.dim]
        strides = _strides(part, shape)
        return DTensor.from_local(part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)

    def shard_index(self) -> int:
        """A number of this process that differs from those whose part of the call is another."""
        index = 0
        for axis, by in enumerate(self.by):
            if by is not None:
                index = index * self.mesh.size(axis) + self.mesh.get_local_rank(axis)
        return index


def _mesh(given: Given) -> DeviceMesh:
    flat = [t for value in given.values() for t in (value if isinstance(value, (list, tuple)) else [value])]
    meshes = [t.device_mesh for t in flat if isinstance(t, DTensor)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise InvalidInput(
            "seqcore: the DTensors of one call must be on one mesh, got several; bring them onto one with "
            "torch.distributed.tensor.distribute_tensor"
        )
    return meshes[0]


def _local(tensor: DTensor, placements: list[Placement]) -> Tensor:
    """This process's part of ``tensor`` once it is placed so. Not ``redistribute``, which no dispatch rule may call."""
    spec = _spec(tensor.device_mesh, placements, tensor)
    return redistribute_local_tensor(tensor._local_tensor, tensor._spec, spec)


def _spec(mesh: DeviceMesh, placements: list[Placement], whole: Tensor) -> DTensorSpec:
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(whole.shape, whole.stride(), whole.dtype))


def _strides(part: Tensor, shape: list[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape whose dimensions lie in memory in the order that ``part``'s do."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (part.stride(dim), -dim)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _run(rule: Rule, cls: type, operator: torch._ops.OpOverload, types, args: tuple, keywords: Given | None) -> Any:
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | (keywords or {})
    division = _Division(rule, given)
    parts = {name: division.enter(rule.inputs.get(name, ""), value) for name, value in given.items()}
    if given.get("seed") is not None:
        # Dropout counts batch and heads from 0 on each process; they must not all drop alike.
        parts["seed"] = parts["seed"] + division.shard_index()
    found = operator(**parts)
    several = found if isinstance(found, tuple) else (found,)
    pairs = zip(rule.results, several, strict=True)
    if rule.gradients:
        results = [division.leave(rule.inputs.get(name, ""), part, given[name]) for name, part in pairs]
    else:
        results = [division.leave(dims, part) for dims, part in pairs]
    return tuple(results) if isinstance(found, tuple) else results[0]


for _name, _rule in RULES.items():
    torch.library.register_torch_dispatch(f"seqcore::{_name}", DTensor, partial(_run, _rule))
