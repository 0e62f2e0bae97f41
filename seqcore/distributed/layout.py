"""Which part of a sequence each process has, and who its neighbours are.

"contiguous": process r of W has the r-th of W equal chunks. "zigzag": the r-th and the r-th from the end of 2 W chunks,
so that under a causal mask, where later queries see more keys, all have the same work (Brandon et al., "Striped
Attention", 2023; the two-ended form is Llama 3's, 2024).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InvalidInput
from ..functional.arguments import check_floating, shown
from ..functional.sharded import sharded

LAYOUTS = ("contiguous", "zigzag")
Group = dist.ProcessGroup | DeviceMesh | None


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group of a one-dimensional mesh; the default group for None."""
    if not dist.is_available() or not dist.is_initialized():
        raise InvalidInput(
            "seqcore.distributed: needs a process group, got none; call torch.distributed.init_process_group first, in "
            "processes started by torchrun"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InvalidInput(
                f"seqcore.distributed: group must be a one-dimensional DeviceMesh, got {group.ndim} dimensions; pass "
                "one of them, mesh['name']"
            )
        return group.get_group()
    group = dist.group.WORLD if group is None else group
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if not isinstance(group, dist.ProcessGroup) and not (type(group) is type(outside) and group == outside):
        raise InvalidInput(
            "seqcore.distributed: group must be a process group, a one-dimensional DeviceMesh, or None for the default "
            f"group, got {shown(group)}"
        )
    if dist.get_rank(group) < 0:
        raise InvalidInput(
            f"seqcore.distributed: this process, {dist.get_rank()}, is not in the group; call in its members only"
        )
    return group


def check_plain(name: str, *tensors: Tensor) -> None:
    """Raise for what is no tensor, and for DTensors, which know their layout themselves."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided:
            got = f"one of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidInput(f"{name}: takes a process's own part as a dense tensor, got {got}")
    if sharded(*tensors):
        raise InvalidInput(f"{name}: takes a process's own part as a plain tensor, got a DTensor; pass its to_local()")


def check_parts(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise for what is no process's part of attention's queries, keys and values."""
    check_plain(name, query, key, value)
    for what, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, what, tensor)
    if any(t.dim() != 4 for t in (query, key, value)):
        shapes = [list(t.shape) for t in (query, key, value)]
        raise InvalidInput(f"{name}: query, key and value must be [B, heads, rows, width], got {shapes}")


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise InvalidInput(f"seqcore.distributed: layout must be 'contiguous' or 'zigzag', got {layout!r}")


def _check_dim(name: str, tensor: Tensor, dim: int) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool) or not -tensor.dim() <= dim < tensor.dim():
        raise InvalidInput(
            f"{name}: dim must be an integer that names one of the dimensions of {list(tensor.shape)}, got {shown(dim)}"
        )


def _chunks(rank: int, ranks: int, layout: str) -> tuple[int, ...]:
    return (rank,) if layout == "contiguous" else (rank, 2 * ranks - 1 - rank)


def shard_sequence(tensor: Tensor, dim: int, group: Group = None, layout: str = "contiguous") -> Tensor:
    """This process's part of a tensor that all of them hold, along the sequence ``dim``; differentiable.

    Args:
        tensor: any shape; ``tensor.shape[dim]`` divides by the number of processes, twice that for "zigzag".
        group: a process group or one-dimensional DeviceMesh, the default group if None.
        layout: "contiguous" or "zigzag", see this module's head.

    Raises:
        InvalidInput: if the sequence does not divide.
    """
    check_layout(layout)
    check_plain("shard_sequence", tensor)
    _check_dim("shard_sequence", tensor, dim)
    group = group_of(group)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    count = ranks * (1 if layout == "contiguous" else 2)
    if tensor.shape[dim] % count:
        raise InvalidInput(
            f"shard_sequence: {ranks} processes in {layout!r} layout take a length that {count} divides, got "
            f"{tensor.shape[dim]}; pad it"
        )
    chunks = tensor.chunk(count, dim)
    return torch.cat([chunks[i] for i in _chunks(rank, ranks, layout)], dim)


def gather_sequence(tensor: Tensor, dim: int, group: Group = None, layout: str = "contiguous") -> Tensor:
    """The whole of what :func:`shard_sequence` divided, on every process; not differentiable."""
    check_layout(layout)
    check_plain("gather_sequence", tensor)
    _check_dim("gather_sequence", tensor, dim)
    group = group_of(group)
    ranks = dist.get_world_size(group)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    sent, received = tensor.detach().contiguous(), parts
    if tensor.itemsize == 1:
        # Not every backend knows float8; bytes all of them do.
        sent, *received = (t.view(torch.uint8) for t in (sent, *parts))
    dist.all_gather(received, sent, group)
    pieces = {}
    for rank, part in enumerate(parts):
        numbers = _chunks(rank, ranks, layout)
        pieces |= dict(zip(numbers, part.chunk(len(numbers), dim), strict=True))
    return torch.cat([pieces[i] for i in sorted(pieces)], dim)
