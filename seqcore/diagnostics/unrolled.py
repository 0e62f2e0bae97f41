"""RNN, GRU and LSTM step by step: T calls of one step where the module makes one call, so that every state is seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import InvalidInput
from ..functional import recurrence
from ..functional.recurrence import between_layers
from ..functional.recurrence_checks import check_sequence
from ..functional.recurrence_problem import Options, Problem
from ..reference.recurrence import Weights, cut_before, split_initial, stack


class Step(NamedTuple):
    """What a direction of a layer put out at a time step."""

    t: int
    state: tuple[Tensor, ...]  # h [B, P], and c [B, H] for an LSTM
    valid: Tensor | None  # [B] bool: not past a sequence's end


# (layer, direction, its steps in order of t)
See = Callable[[int, int, list[Step]], None]
# The input and hx of a call, to what its layers are shown to.
Begin = Callable[[Tensor, Any], See]


def kept(state: Tensor) -> Tensor:
    """``state`` as a tensor of its own, for what comes later to depend on, also where no parameter needs a gradient.

    Its own, so that an LSTM's h_t, which the same operator makes, does not depend on this c_t: whether it would is
    each backend's affair.
    """
    state = state.clone()
    return state if state.requires_grad else state.detach().requires_grad_()


def unrolled(module: nn.RNNBase, name: str, begin: Begin) -> Callable:
    """A forward for ``module``, of ``seqcore.nn`` or ``torch.nn``, that does the same and shows its states."""

    def forward(input, hx=None, *, lengths=None, reset=None, reset_hx=None, return_cells=False):
        if isinstance(input, PackedSequence):
            raise InvalidInput(
                f"gradient_flow: {name or 'the model'} was given a PackedSequence, got no padded Tensor to go through "
                "step by step; pad it (torch.nn.utils.rnn.pad_packed_sequence) and pass the lengths as lengths= to a "
                "module of seqcore.nn, which seqcore.replace(model) makes of torch.nn's"
            )
        options = Options(
            module.num_layers, module.bias, module.batch_first, module.dropout, module.training, module.bidirectional,
            lengths, reset, reset_hx, getattr(module, "grad_clip", None), False, return_cells,
            getattr(module, "locked", False), getattr(module, "zoneout", 0.0),
        )  # fmt: skip
        # By attribute, once a call: a parametrization computes them.
        weights = [getattr(module, weight) for names in module._all_weights for weight in names]
        problem = check_sequence(module.mode.lower(), input, hx, weights, options)
        walk = _Walk(problem, options, getattr(module, "backend", "aten"), begin(input, hx))
        between = between_layers(problem, options)
        y, h_n, c_n, cells = stack(walk.layer, problem.x, problem.h0, problem.c0, problem.weights, between)
        return problem.finish(y, h_n, c_n, cells if return_cells else None)

    return forward


class _Walk:
    """One call of a recurrent module; ``layer`` is what ``reference.recurrence.stack`` asks for."""

    def __init__(self, problem: Problem, options: Options, backend: str | None, see: See) -> None:
        self.problem, self.see, self.layers = problem, see, 0
        self.options = {
            "cell": problem.cell,
            "bias": problem.bias,
            "grad_clip": options.grad_clip,
            "zoneout": options.zoneout,
            # Which zoneout asks for; else as in training, or cuDNN would have no backward: one layer has no dropout.
            "training": options.training or not problem.zoneout,
            "backend": backend,
        }

    def layer(self, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Weights]):
        directions = []
        for d, own in enumerate(weights):
            states = (h0[d],) if c0 is None else (h0[d], c0[d])
            steps, last = self._direction(x, states, own, reverse=d == 1)
            self.see(self.layers, d, steps)
            directions.append([part for kind, state in enumerate(last) for part in (self._rows(steps, kind), state)])
        self.layers += 1
        y, h_n, *c = zip(*directions, strict=True)
        cells, c_n = (torch.cat(c[0], -1), torch.stack(c[1])) if c else (None, None)
        return torch.cat(y, -1), torch.stack(h_n), c_n, cells

    def _direction(
        self, x: Tensor, states: tuple[Tensor, ...], weights: Weights, reverse: bool
    ) -> tuple[list[Step], tuple[Tensor, ...]]:
        """The steps of one direction in order of t, and its last state."""
        time, batch = x.shape[:2]
        lengths, reset = self.problem.lengths, self.problem.reset
        flat = [w for w in weights if w is not None]
        state, by = zip(*(split_initial(s, batch) for s in states), strict=True)
        # All at once: the gradient of each of T slices would be as large as x.
        inputs = x.split(1)
        steps = []
        for t in reversed(range(time)) if reverse else range(time):
            given = {}
            valid = None if lengths is None else t < lengths
            if valid is not None:
                given["lengths"] = valid.long()
            cut = None if reset is None else cut_before(reset, lengths, t, reverse)
            if cut is not None:
                given |= {"reset": cut[None], "reset_hx": None if by[0] is None else _packed_state(by)}
            _, new = recurrence(inputs[t], _packed_state(state), flat, **self.options, **given)
            state = tuple(kept(s[0]) for s in ((new,) if isinstance(new, Tensor) else new))
            steps.append(Step(t, state, valid))
        return steps[::-1] if reverse else steps, state

    def _rows(self, steps: list[Step], kind: int) -> Tensor:
        """[T, B, *]: h (0) or c (1) of every step, zero past a sequence's end."""
        shown = (s.state[kind] if s.valid is None else torch.where(s.valid[:, None], s.state[kind], 0) for s in steps)
        return torch.stack(list(shown))


def _packed_state(state: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """[B, *] each, as the functions take one layer's hx."""
    return state[0][None] if len(state) == 1 else tuple(s[None] for s in state)
