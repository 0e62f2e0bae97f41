"""Which calls of a recurrent module are one sequence."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


class Sequences:
    """The sequences that a module went through, numbered from 1.

    A call goes on with the sequence whose last state its own is, or was computed from. Any other call, as one given
    none, zeros or a detached state, starts another: no gradient goes from it to what was before.
    """

    def __init__(self) -> None:
        self.count = 0
        self._ends: dict[Node, int] = {}

    def another(self) -> int:
        self.count += 1
        return self.count

    def entered(self, state: Sequence[Tensor]) -> int:
        """The number of the sequence that a call given ``state`` belongs to."""
        if self.count and state and not torch.is_grad_enabled():
            return self.count  # where there is no graph to tell
        number = self._reached(state) or self.another()
        self._ends = {node: other for node, other in self._ends.items() if other != number}
        return number

    def left(self, number: int, state: Sequence[Tensor]) -> None:
        """Note ``state``, which needs gradients, as the last one of its sequence, or as part of it."""
        self._ends |= {get_gradient_edge(part).node: number for part in state}

    def _reached(self, state: Sequence[Tensor]) -> int:
        """The sequence with the nearest end that ``state`` was computed from; 0 if there is none."""
        queue = deque(part.grad_fn for part in state if part.grad_fn is not None)
        seen = set(queue)
        while queue and self._ends:
            node = queue.popleft()
            if node in self._ends:
                return self._ends[node]
            before = {other for other, _ in node.next_functions if other is not None} - seen
            seen |= before
            queue.extend(before)
        return 0
