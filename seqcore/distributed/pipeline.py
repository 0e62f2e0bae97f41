"""A stack of recurrent layers divided among processes, the sequence passing through in chunks of time.

A recurrence waits for its own last step, but the next layer needs only what has come out so far. So with one layer (or
a few) on each process, process r works on chunk k while process r + 1 works on chunk k - 1, and with K chunks the W
processes are all at work but for W - 1 of K + W - 1 turns; forward, and once more backward, from the last chunk to the
first. Source: Huang et al., "GPipe" (2019), over time instead of over the batch, which a recurrence's causality allows
without changing the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InvalidInput
from ..functional.recurrence import State
from .layout import Group, group_of

# What goes before the first chunk: the shape of all of them together, their dtype, and the steps of a chunk.
HEADER = 5
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class PipelineResult(NamedTuple):
    """``output`` [T, B, …] and ``loss`` on the last process, None on others; ``hx`` the final state of own layers."""

    output: Tensor | None
    loss: Tensor | None
    hx: State


class TimePipeline:
    """Run recurrent layers that stand on W processes, layer after layer, over chunks of a sequence.

    Each chunk is a call of its own, so that masks of ``locked`` dropout are drawn anew for each.

    Args:
        module: this process's layers, a unidirectional ``seqcore.nn`` or ``torch.nn`` recurrent module. The first
            process's takes the input, each other's the output of the one before.
        steps: time steps in a chunk, the same on all processes. Many chunks keep all of them at work, long ones spend
            less on each.
        truncate: do not let gradients travel from one chunk to the one before (truncated backpropagation through time);
            False gives the exact gradients of the whole sequence.
        group: a process group or one-dimensional DeviceMesh, in the order of the layers; the default group if None. If
            one of its processes raises, the others wait for it until the group's timeout.

    Raises:
        InvalidInput: for a bidirectional module, or ``steps`` below 1.
    """

    def __init__(self, module: nn.Module, steps: int, *, truncate: bool = False, group: Group = None) -> None:
        if not isinstance(module, nn.RNNBase) or module.bidirectional:
            raise InvalidInput(
                f"TimePipeline: module must be a unidirectional recurrent module, got {module}; the reverse direction "
                "begins where the sequence ends, so nothing can pass on before all is there"
            )
        if not isinstance(steps, int) or steps < 1:
            raise InvalidInput(f"TimePipeline: steps must be a positive number of time steps, got {steps!r}")
        self.module, self.steps, self.truncate = module, steps, truncate
        self.group = group_of(group)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._time = 1 if module.batch_first else 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.ranks - 1

    def forward(self, input: Tensor | None = None, hx: State | None = None) -> PipelineResult:
        """The output without gradients: ``input`` on the first process; ``hx`` this process's initial state."""
        with torch.no_grad():
            chunks = self._run(input, hx)
        return PipelineResult(self._output(chunks), None, _leaves(chunks[-1].after, False))

    def step(
        self, input: Tensor | None = None, hx: State | None = None, *, loss: Callable[[Tensor], Tensor] | None = None
    ) -> PipelineResult:
        """Forward and backward: gradients are added to the parameters' ``grad``, and go on into ``input`` and ``hx``.

        Args:
            input: [T, B, I], in the module's layout, on the first process.
            hx: this process's initial state, zeros if None.
            loss: on the last process, the scalar loss of the whole output.

        Raises:
            InvalidInput: if input or loss is missing where it is needed.
        """
        if self.is_last and loss is None:
            raise InvalidInput("TimePipeline.step: the last process needs loss=, a function of the whole output")
        if not torch.is_grad_enabled():
            raise InvalidInput("TimePipeline.step: computes gradients, got called under no_grad; call forward there")
        chunks = self._run(input, hx)
        output, value, gradients = self._output(chunks), None, [None] * len(chunks)
        if self.is_last:
            leaf = output.detach().requires_grad_()
            value = loss(leaf)
            value.backward()
            value = value.detach()
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients = gradient.split(self.steps, self._time)
        self._run_back(chunks, gradients, input, hx)
        return PipelineResult(output, value, _leaves(chunks[-1].after, False))

    def _run(self, input: Tensor | None, hx: State | None) -> list["_Chunk"]:
        shape, dtype, device = self._incoming(input)
        pieces = None if input is None else input.detach().split(self.steps, self._time)
        train, chunks, sent, state = torch.is_grad_enabled(), [], [], hx
        for begin in range(0, shape[self._time], self.steps):
            if pieces is None:
                size = [min(self.steps, n - begin) if dim == self._time else n for dim, n in enumerate(shape)]
                x = torch.empty(size, dtype=dtype, device=device)
                dist.recv(x, group=self.group, group_src=self.rank - 1)
            else:
                x = pieces[begin // self.steps]
            x.requires_grad_(train and (pieces is None or input.requires_grad))
            inside = not self.truncate if begin else None
            state = _leaves(state, inside if train else False)
            y, after = self.module(x, state)
            if train:
                chunks.append(_Chunk(x, state, y, after))
            else:
                # Nothing goes back: of what has passed on only the last state is needed, and here the output.
                chunks = [*(chunks if self.is_last else ()), _Chunk(None, None, y, after)]
            if not self.is_last:
                if not begin:
                    sent.append(self._send(self._header(y, shape[self._time]), self.rank + 1))
                sent.append(self._send(y.detach(), self.rank + 1))
            state = after
        for work in sent:
            work.wait()
        return chunks

    def _run_back(self, chunks: list["_Chunk"], gradients: list, input: Tensor | None, hx: State | None) -> None:
        sent, dstate = [], None
        for chunk, dy in zip(reversed(chunks), reversed(gradients), strict=True):
            if dy is None:
                dy = torch.empty_like(chunk.output, memory_format=torch.contiguous_format)
                dist.recv(dy, group=self.group, group_src=self.rank + 1)
            pairs = [(chunk.output, dy)]
            if dstate is not None:
                pairs += [(t, g) for t, g in zip(_tensors(chunk.after), dstate, strict=True) if g is not None]
            pairs = [(t, g) for t, g in pairs if t.requires_grad]
            if pairs:
                torch.autograd.backward(*zip(*pairs, strict=True))
            if not self.is_first:
                dx = torch.zeros_like(chunk.input) if chunk.input.grad is None else chunk.input.grad
                sent.append(self._send(dx, self.rank - 1))
            dstate = None if self.truncate else [t.grad for t in _tensors(chunk.before)]
        for leaf, given in zip(_tensors(chunks[0].before), _tensors(hx), strict=True):
            _accumulate(given, leaf.grad)
        if input is not None and input.requires_grad:
            _accumulate(input, torch.cat([chunk.input.grad for chunk in chunks], self._time))
        for work in sent:
            work.wait()

    def _incoming(self, input: Tensor | None) -> tuple[list[int], torch.dtype, torch.device]:
        """Shape, dtype and device of all that this process's layers will be given."""
        device = next(self.module.parameters()).device
        if self.is_first:
            if not isinstance(input, Tensor) or input.dim() != 3 or not input.shape[self._time]:
                got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
                raise InvalidInput(
                    "TimePipeline: the first process needs a batched Tensor of 3 dimensions and at least one step, "
                    f"got {got}"
                )
            return list(input.shape), input.dtype, device
        if input is not None:
            raise InvalidInput(
                f"TimePipeline: process {self.rank} takes its input from the one before, got one; pass it to process 0"
            )
        header = torch.empty(HEADER, dtype=torch.int64, device=device)
        dist.recv(header, group=self.group, group_src=self.rank - 1)
        *shape, dtype, steps = header.tolist()
        if steps != self.steps:
            raise InvalidInput(f"TimePipeline: steps must be the same on all processes, got {steps} and {self.steps}")
        return shape, _DTYPES[dtype], device

    def _header(self, first: Tensor, length: int) -> Tensor:
        """What ``_incoming`` of the next process reads, before the ``first`` chunk of ``length`` steps in all."""
        whole = [length if dim == self._time else n for dim, n in enumerate(first.shape)]
        return torch.tensor([*whole, _DTYPES.index(first.dtype), self.steps], device=first.device)

    def _send(self, tensor: Tensor, to: int) -> "_Sent":
        tensor = tensor.contiguous()
        return _Sent(tensor, dist.isend(tensor, group=self.group, group_dst=to))

    def _output(self, chunks: list["_Chunk"]) -> Tensor | None:
        return torch.cat([chunk.output.detach() for chunk in chunks], self._time) if self.is_last else None


class _Chunk(NamedTuple):
    """What went through this process's layers: leaves of the graph, unless nothing goes back, and what came out."""

    input: Tensor | None
    before: State | None
    output: Tensor
    after: State


class _Sent(NamedTuple):
    """A message on its way; what it sends is kept until it has gone."""

    tensor: Tensor
    work: dist.Work

    def wait(self) -> None:
        self.work.wait()


def _tensors(state: State | None) -> tuple[Tensor, ...]:
    return () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)


def _leaves(state: State | None, requires_grad: bool | None) -> State | None:
    """``state`` as new leaves of the graph, which take gradients as told, or as before if not told."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach().requires_grad_(state.requires_grad if requires_grad is None else requires_grad)
    return tuple(_leaves(t, requires_grad) for t in state)


def _accumulate(tensor: Tensor, gradient: Tensor | None) -> None:
    if gradient is None or not tensor.requires_grad:
        return
    if tensor.is_leaf:
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
    else:
        tensor.backward(gradient)
