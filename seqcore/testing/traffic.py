"""How many bytes this process sends to others, counted where ``torch.distributed`` hands them over."""

from collections import Counter

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Within it, ``sent`` counts the bytes of each kind of message this process sends, forward and backward.

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
        if function.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(function.name().split("::")[1].strip("_").split(".")[0], args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        for kind, (of_tensor, argument) in _MESSAGES.items():
            if name.startswith(kind):
                whole = sum(t.nbytes for t in tree_leaves(args[argument]) if isinstance(t, Tensor))
                self.sent[kind] += whole * of_tensor(dist.get_world_size())


# By the beginning of the operator's name: what is sent of a tensor among W processes, and which argument that is.
_MESSAGES = {
    "send": (lambda W: 1, 0),
    "alltoall_base": (lambda W: (W - 1) / W, 1),
    "allreduce": (lambda W: 2 * (W - 1) / W, 0),
    "allgather_base": (lambda W: (W - 1) / W, 0),
    "reduce_scatter_base": (lambda W: (W - 1) / W, 1),
}
