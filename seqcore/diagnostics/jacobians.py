"""What one step of a recurrence does to its state: the Jacobians along a trajectory, and their products."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..functional import recurrence
from ..functional.arguments import FLOATS, check_decades, check_strided
from ..functional.recurrence import State
from ..functional.recurrence_checks import check_cell, check_sequence
from ..functional.recurrence_problem import Options
from ..reference.recurrence import Weights
from .magnitude import DECADES, change, verdict, wide
from .products import log10_singular_values
from .recording import plain, time_dim

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Entries of the state that are differentiated at a time: rows of it, in as many copies as it has elements.
ENTRIES = 2**22
# The shapes of a Cell's state do not depend on the nonlinearity.
CELLS = {nn.RNNCell: "rnn_tanh", nn.GRUCell: "gru", nn.LSTMCell: "lstm"}
# More lags than a plot shows apart.
DRAWN = 200

# (x_t [N, I], the parts of the state [N, *]) -> the next parts
Advance = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class StepJacobians:
    """J_t = ∂s_t/∂s_{t-1} for every step of a trajectory; s is h, or h and c joined.

    Attributes:
        matrices: [T, B, S, S] float64; ``[t, b, i, j]`` is the derivative of element i after step t by element j
            before it.
        decades: how far the largest singular value of the whole product may be from 1 and still be called steady.
    """

    matrices: Tensor
    decades: float = DECADES

    @cached_property
    def singular_values(self) -> Tensor:
        """[T, B, S] float64, largest first: the factors by which a step stretches; NaN where a J_t is not finite."""
        return torch.where(self._finite[..., None], torch.linalg.svdvals(self._safe), math.nan)

    @cached_property
    def spectral_radius(self) -> Tensor:
        """[T, B] float64: the largest absolute eigenvalue of each J_t; NaN where it is not finite."""
        return torch.where(self._finite, torch.linalg.eigvals(self._safe).abs().amax(-1), math.nan)

    def products(self, lags: Sequence[int] | None = None) -> Tensor:
        """log10 of the singular values, largest first, of J_T J_{T-1} … J_{T-k+1}: what is left after k steps back.

        Those above 1e-7 of the largest are exact to rounding. Smaller ones are within 1e-4 decades where neighbours
        differ by a factor of two, and within 0.05 where by less, as measured for S up to 128. Products may be thousands
        long and span any number of decades. Where a J_t is singular, the smallest are zero or what rounding made of it.

        Args:
            lags: which k, from 1 to T; all of them if None. Each costs an SVD and some QR factorisations for each b.

        Returns:
            [T, B, S] float64, lag k at index k - 1, or [len(lags), B, S]. -inf for an exact zero; NaN for a sequence
            with a J_t that is not finite.

        Raises:
            InvalidInput: for a lag that is no integer in 1 … T.
        """
        steps = len(self.matrices)
        try:
            chosen = range(1, steps + 1) if lags is None else [operator.index(lag) for lag in lags]
        except TypeError as error:
            raise InvalidInput(f"products: lags must be a list of integers in 1 … {steps}, got {lags}") from error
        if not all(1 <= lag <= steps for lag in chosen):
            raise InvalidInput(f"products: lags must lie in 1 … {steps}, the steps there are, got {chosen}")
        found = log10_singular_values(self._safe, chosen)
        return torch.where(self._finite.all(0)[:, None], found, math.nan)

    @cached_property
    def growth(self) -> float:
        """The factor a step by which the product of all steps stretches at most: the geometric mean over sequences for
        which it is not zero."""
        return 10 ** (self._decades / len(self.matrices))

    @property
    def verdict(self) -> str:
        """ "vanishing" or "exploding" if the product of all steps changes what it stretches most by more than
        ``decades``, else "steady"; exploding if a J_t is not finite."""
        return verdict(self._decades, self.decades)

    @property
    def sentence(self) -> str:
        """The same in words, with numbers."""
        if not self._finite.all():
            t = int((~self._finite).any(1).nonzero()[0])
            return f"∂s_t/∂s_(t-1) is not finite at t = {t:,}"
        if not len(self._largest):
            return "there is no sequence, and so no product of J_t"
        said, dead = "the largest singular value of the product of J_t", int((self._largest == -math.inf).sum())
        if dead < len(self._largest):
            said += " " + change(self._decades, self.growth, len(self.matrices), self.decades)
        if dead:
            said += f"{',' * (dead < len(self._largest))} is zero for {dead} of {len(self._largest)} sequences"
        low, high = float(self.spectral_radius.min()), float(self.spectral_radius.max())
        return f"{said}; spectral radii of single steps lie in {low:.3g} … {high:.3g}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the largest, middle and smallest singular value of the products over lags; needs matplotlib.

        Means over the batch, of their logarithms; without those that are zero.

        Args:
            ax: where to draw; a new figure if None.

        Returns:
            The axes drawn on.
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        steps, _, size, _ = self.matrices.shape
        lags = torch.linspace(1, steps, min(steps, DRAWN)).round().int().tolist()
        decades = self.products(lags).cpu()
        decades = torch.where(decades.isfinite(), decades, math.nan).mean(1)
        for label, index in {"largest": 0, "middle": size // 2, "smallest": size - 1}.items():
            ax.plot(lags, decades[:, index].tolist(), label=label)
        ax.set(xlabel="lag", ylabel="log10 of the singular values of the product")
        ax.legend()
        return ax

    @cached_property
    def _finite(self) -> Tensor:
        return self.matrices.isfinite().all(-1).all(-1)

    @property
    def _safe(self) -> Tensor:
        return torch.where(self._finite[..., None, None], self.matrices, 0)

    @cached_property
    def _largest(self) -> Tensor:
        """[B]: log10 of the largest singular value of the product of all."""
        return self.products([len(self.matrices)])[0, :, 0]

    @cached_property
    def _decades(self) -> float:
        """The mean of ``_largest`` over sequences for which it is not zero."""
        alive = self._largest[self._largest != -math.inf]
        return float(alive.mean()) if len(alive) else -math.inf


def step_jacobians(
    step: nn.Module | Callable[[Tensor, State], State],
    x: Tensor,
    state: State | None = None,
    *,
    decades: float = DECADES,
) -> StepJacobians:
    """Find J_t = ∂s_t/∂s_{t-1} for every step of a recurrence along its own trajectory over ``x``.

    A gradient goes back through a step as ∂L/∂s_{t-1} = J_t^T ∂L/∂s_t, so products of these say how much of it can
    arrive, whatever the loss. Each sequence is stepped in S copies, from whose outputs one backward gives a row of J_t
    each; many t at a time, in bounded memory beside the T · B · S² results.

    Args:
        step: an RNN, GRU or LSTM of one layer in one direction or a Cell, of ``seqcore.nn`` or ``torch.nn``; or a
            function (x_t [N, …], state) -> state for any number of rows N, which does not mix rows. grad_clip of a
            module is left out; zoneout has its expectation, in evaluation.
        x: [T, B, …]; [B, T, I] for a module with batch_first=True; [T, I] for a module without a batch.
        state: before the first step; of a module as it takes it, None for zeros; of a function [B, S] or a tuple of
            such, as it returns them.
        decades: what the product of all steps may change by and still be called "steady".

    Returns:
        A ``StepJacobians``: ``matrices`` [T, B, S, S], S joining the parts of the state, and what follows from them.

    Raises:
        InvalidInput: for a recurrence of several layers or directions, with a forward or hooks of its own, or in
            training with zoneout; for wrong ranks or sizes, or no step; for a function without ``state`` or which
            returns another one.

    Source: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    check_decades("step_jacobians", decades)
    advance, x, parts = _prepared(getattr(step, "_orig_mod", step), x, state)
    if not sum(part.shape[-1] for part in parts):
        raise InvalidInput(
            "step_jacobians: the state must have at least one element, got a width of 0; give it a hidden size above 0"
        )
    # In which autograd records nothing. What was made in it is only read here, and copied before it is recorded.
    with torch.inference_mode(False):
        before = _trajectory(advance, x, parts)
        return StepJacobians(_differentiated(advance, x, before), decades)


def _prepared(step, x: Tensor, state: State | None) -> tuple[Advance, Tensor, tuple[Tensor, ...]]:
    """``step`` in one form, x [T, B, …] and the state's parts [B, …]."""
    batch_first = isinstance(step, nn.RNNBase) and step.batch_first
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.shape[time_dim(x, batch_first)]:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InvalidInput(f"step_jacobians: x must be a Tensor [T, B, …] of at least one step, got {got}")
    check_strided("step_jacobians", "x", x)
    if isinstance(step, nn.RNNBase):
        return _of_layer(step, x, state)
    if isinstance(step, tuple(CELLS)):
        return _of_cell(step, x, state)
    if not callable(step):
        raise InvalidInput(
            f"step_jacobians: step must be a recurrent module, a Cell or a function (x_t, state) -> state, got "
            f"{type(step).__name__}"
        )
    if state is None:
        raise InvalidInput("step_jacobians: a function needs state=, [B, S] or a tuple of such, got None")
    return _of_function(step), x, _parts(state, x.shape[1])


def _of_layer(module: nn.RNNBase, x: Tensor, hx: State | None) -> tuple[Advance, Tensor, tuple[Tensor, ...]]:
    if module.num_layers != 1 or module.bidirectional:
        raise InvalidInput(
            f"step_jacobians: needs one layer in one direction, whose step is a function of its own state, got "
            f"{module.num_layers} layers{', bidirectional' if module.bidirectional else ''}; take the layers one by one"
        )
    if not plain(module) or module._forward_pre_hooks or module._forward_hooks:
        raise InvalidInput(
            "step_jacobians: steps RNN, GRU and LSTM itself, which would leave out a forward or hooks of one's own (as "
            f"weight_norm's), got {type(module).__name__} with such; pass a function (x_t, state) -> state"
        )
    weights = [getattr(module, name) for name in module._all_weights[0]]
    zoneout = getattr(module, "zoneout", 0.0)
    given = Options(bias=module.bias, batch_first=module.batch_first, zoneout=zoneout)
    problem = check_sequence(module.mode.lower(), x, hx, weights, given)
    if problem.zoneout and module.training:
        raise InvalidInput(
            "step_jacobians: zoneout draws anew for each of the copies that a sequence is stepped in, got "
            f"{zoneout} in training; call eval() first, for its expectation"
        )
    options = {
        "cell": problem.cell, "bias": module.bias, "zoneout": zoneout, "backend": getattr(module, "backend", "aten"),
        # But for zoneout, which has its expectation then, as in training, or cuDNN would have no backward.
        "training": not problem.zoneout,
    }  # fmt: skip

    def advance(x_t, parts):
        packed = tuple(part[None] for part in parts)
        hx = packed if len(packed) > 1 else packed[0]
        _, new = recurrence(x_t[None], hx, weights, **options)
        return tuple(part[0] for part in ((new,) if isinstance(new, Tensor) else new))

    states = (problem.h0[0],) if problem.c0 is None else (problem.h0[0], problem.c0[0])
    return advance, problem.x, states


def _of_cell(cell: nn.RNNCellBase, x: Tensor, hx: State | None) -> tuple[Advance, Tensor, tuple[Tensor, ...]]:
    name = next(name for kind, name in CELLS.items() if isinstance(cell, kind))
    problem = check_cell(name, x[0], hx, Weights(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
    states = (problem.h0[0],) if problem.c0 is None else (problem.h0[0], problem.c0[0])
    return _of_function(cell), x[:, None] if problem.unbatched else x, states


def _of_function(function: Callable[[Tensor, State], State]) -> Advance:
    def advance(x_t, parts):
        new = function(x_t, parts if len(parts) > 1 else parts[0])
        new = tuple(new) if isinstance(new, (tuple, list)) else (new,)
        got = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in new]
        wanted = [list(part.shape) for part in parts]
        if got == wanted:
            got = [list(part.shape) if part.is_floating_point() else str(part.dtype) for part in new]
        if got != wanted:
            raise InvalidInput(
                f"step_jacobians: step must return a state like the one it is given, here {wanted}, got {got}; each "
                "row is a sequence, and there may be any number"
            )
        return new

    return advance


def _parts(state: State, batch: int) -> tuple[Tensor, ...]:
    parts = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    for part in parts or (None,):
        strided = isinstance(part, Tensor) and part.layout == torch.strided and part.dtype in FLOATS
        if not strided or part.dim() != 2 or len(part) != batch:
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise InvalidInput(
                f"step_jacobians: state must be floating point [{batch}, S] or a tuple of such, one row for each "
                f"sequence of x, got {got}"
            )
    return parts


def _trajectory(advance: Advance, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """[T, B, *] each: the state's parts before every step."""
    before = [parts]
    with torch.no_grad():
        for x_t in x[:-1]:
            before.append(advance(x_t, before[-1]))
    return tuple(torch.stack(part).detach() for part in zip(*before, strict=True))


def _differentiated(advance: Advance, x: Tensor, before: tuple[Tensor, ...]) -> Tensor:
    """[T, B, S, S] float64, a slice of its T · B · S rows at a time."""
    T, B = x.shape[:2]
    widths = [part.shape[-1] for part in before]
    size = sum(widths)
    x, before = x.detach().flatten(0, 1), tuple(part.flatten(0, 1) for part in before)
    every = torch.arange(T * B * size, device=x.device)
    found = []
    for rows in every.split(max(1, ENTRIES // max(size, 1))):
        sequence, element = rows // size, rows % size
        given = tuple(part[sequence].requires_grad_() for part in before)
        with torch.enable_grad():
            joined = torch.cat(advance(x[sequence], given), -1)
            picked = joined.gather(1, element[:, None]).sum()
        if not picked.requires_grad:
            raise InvalidInput(
                "step_jacobians: what step returns does not depend on the state through autograd; look for detach() "
                "and torch.no_grad() in it"
            )
        gradients = torch.autograd.grad(picked, given, materialize_grads=True)
        found.append(torch.cat([wide(gradient) for gradient in gradients], -1))
    return torch.cat(found).unflatten(0, (T, B, size))
