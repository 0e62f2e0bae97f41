"""How many bytes this process sends to others, counted where ``torch.distributed`` hands them over."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Within it, ``sent`` counts the bytes of each kind of message this process sends, forward and backward.

    What DTensor sends by itself is not seen: ask ``torch.distributed.tensor.debug.CommDebugMode``.

    A collective counts what the bandwidth-optimal algorithm sends of its tensor: (W - 1)/W of all for an all-gather, a
    reduce-scatter or an all-to-all among W processes, twice that for an all-reduce (Thakur et al., "Optimization of
    Collective Communication Operations in MPICH", 2005).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> float:
        return sum(self.sent.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function.name().split("::")[1].strip("_"), args)
        elif function.namespace.startswith("_c10d_functional"):
            raise NotImplementedError(f"Traffic does not know how much {function} sends")
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in _SILENT:
            return
        if name not in _MESSAGES:
            raise NotImplementedError(f"Traffic does not know how much c10d::{name} sends")
        of_tensor, argument = _MESSAGES[name]
        whole = sum(t.nbytes for t in tree_leaves(args[argument]) if isinstance(t, Tensor))
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        self.sent[name] += whole * of_tensor(dist.ProcessGroup.unbox(group).size())


# Of an operator: what is sent of a tensor among W processes, and which argument that is.
_MESSAGES = {
    "send": (lambda W: 1, 0),
    "alltoall_base": (lambda W: (W - 1) / W, 1),
    "allreduce": (lambda W: 2 * (W - 1) / W, 0),
    "allgather_base": (lambda W: (W - 1) / W, 0),
    "reduce_scatter_base": (lambda W: (W - 1) / W, 1),
}
_SILENT = ("recv", "barrier")
