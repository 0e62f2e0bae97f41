"""RNN, GRU, LSTM and their Cells, with the constructors, parameters and outputs of ``torch.nn``'s.

The three sequence modules derive from ``torch.nn.RNNBase``, not from ``torch.nn.LSTM`` and its siblings: Dynamo
refuses every instance of those. So ``isinstance(module, torch.nn.LSTM)`` is False, and all else is as it was.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from ..backends import check_backend
from ..cells import find
from ..errors import InvalidInput
from ..functional.arguments import check_clip, check_flags
from ..functional.dropout import check_locked
from ..functional.zoneout import Zoneout, probabilities
from .scripting import NotScriptable

_BEYOND_TORCH = ("blocks", "grad_clip", "recompute", "locked", "zoneout", "backend")


class _Recurrent(NotScriptable, nn.RNNBase):
    # Class-level defaults, so that an instance made by torch.nn and given this class works.
    backend: str | None = None
    blocks: int = 1
    grad_clip: float | None = None
    recompute: bool = False
    locked: bool = False
    zoneout: Zoneout = 0.0

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: str | None = None,
        blocks: int = 1,
        grad_clip: float | None = None,
        recompute: bool = False,
        locked: bool = False,
        zoneout: Zoneout = 0.0,
        **kwargs: Any,
    ) -> None:
        if backend is not None:
            check_backend(backend)
        super().__init__(mode, *args, **kwargs)
        name = mode.partition("_")[0]
        check_locked(name, locked)
        check_clip(name, grad_clip)
        check_flags(name, recompute=recompute)
        probabilities(name, find(mode.lower()), zoneout, projected=self.proj_size > 0)
        self.backend, self.grad_clip, self.recompute = backend, grad_clip, recompute
        self.locked, self.zoneout = locked, zoneout
        if not isinstance(blocks, int) or blocks != 1:
            self._divide(blocks)

    def _divide(self, blocks: int) -> None:
        """Make the recurrent weights block-diagonal: [G, blocks, H/blocks, H/blocks] in place of [G*H, H]."""
        if not isinstance(blocks, int) or blocks < 1 or self.hidden_size % blocks:
            raise InvalidInput(
                f"blocks must divide hidden_size {self.hidden_size}, got {blocks!r}; pass 1 for weights that are whole"
            )
        if self.proj_size:
            raise InvalidInput(
                f"blocks and proj_size do not go together, got {blocks} and {self.proj_size}; leave one out"
            )
        self.blocks = blocks
        units = self.hidden_size // blocks
        for names in self._all_weights:
            whole = getattr(self, names[1])
            shape = (whole.shape[0] // self.hidden_size, blocks, units, units)
            setattr(self, names[1], nn.Parameter(torch.empty(shape, dtype=whole.dtype, device=whole.device)))
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """As torch's, for weights that cuDNN knows."""
        if self.blocks == 1:
            super().flatten_parameters()

    def _options(self) -> dict[str, Any]:
        return {
            # By attribute, not from a cached list: parametrizations and sharding replace the attributes.
            "weights": [getattr(self, name) for names in self._all_weights for name in names],
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "training": self.training,
            "bidirectional": self.bidirectional,
            "grad_clip": self.grad_clip,
            "recompute": self.recompute,
            "locked": self.locked,
            "zoneout": self.zoneout,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        changed = (name for name in _BEYOND_TORCH if getattr(self, name) != getattr(_Recurrent, name))
        return super().extra_repr() + "".join(f", {name}={getattr(self, name)!r}" for name in changed)


class RNN(_Recurrent):
    """``torch.nn.RNN`` with a choice of backend: h_t = tanh or relu of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.

    Args:
        *args, **kwargs: those of ``torch.nn.RNN`` (input_size, hidden_size, num_layers=1, nonlinearity="tanh",
            bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None).
        blocks: N makes the recurrent weights block-diagonal: N independent recurrences of H/N units side by side,
            ``weight_hh_l*`` being [1, N, H/N, H/N].
        grad_clip: bound on each element of the gates' gradients, at every step, inside the backward.
        recompute: keep only y for backward and make the gates again there, which saves memory.
        locked: draw one mask of ``dropout`` per sequence and feature, for all time steps (Gal & Ghahramani, 2016);
            without effect where there is no ``dropout``, or one layer.
        zoneout: probability of each unit to keep its state in a step; its expectation in evaluation (Krueger et al.,
            2017).
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """y and h_n; see ``seqcore.functional.rnn`` for shapes, ``lengths``, ``reset`` and errors."""
        nonlinearity = self.mode.removeprefix("RNN_").lower()
        return functional.rnn(
            input, hx, nonlinearity=nonlinearity, lengths=lengths, reset=reset, reset_hx=reset_hx, **self._options()
        )


class GRU(_Recurrent):
    """``torch.nn.GRU`` with a choice of backend: h_t = (1 - z) n + z h_{t-1}, reset applied after the product.

    Args:
        *args, **kwargs: those of ``torch.nn.GRU`` (input_size, hidden_size, num_layers=1, bias=True,
            batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None).
        blocks: N makes the recurrent weights block-diagonal: N independent recurrences of H/N units side by side,
            ``weight_hh_l*`` being [3, N, H/N, H/N].
        grad_clip: bound on each element of the gates' gradients, at every step, inside the backward.
        recompute: keep only y for backward and make the gates again there, which saves memory.
        locked: draw one mask of ``dropout`` per sequence and feature, for all time steps (Gal & Ghahramani, 2016);
            without effect where there is no ``dropout``, or one layer.
        zoneout: probability of each unit to keep its state in a step; its expectation in evaluation (Krueger et al.,
            2017).
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """y and h_n; see ``seqcore.functional.gru`` for shapes, ``lengths``, ``reset`` and errors."""
        return functional.gru(input, hx, lengths=lengths, reset=reset, reset_hx=reset_hx, **self._options())


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` with a choice of backend: c_t = f c_{t-1} + i g, h_t = o tanh(c_t), projected if asked.

    Args:
        *args, **kwargs: those of ``torch.nn.LSTM`` (input_size, hidden_size, num_layers=1, bias=True,
            batch_first=False, dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None).
        blocks: N makes the recurrent weights block-diagonal: N independent recurrences of H/N units side by side,
            ``weight_hh_l*`` being [4, N, H/N, H/N].
        grad_clip: bound on each element of the gates' gradients, at every step, inside the backward.
        recompute: keep only y and c for backward and make the gates again there, which saves memory.
        locked: draw one mask of ``dropout`` per sequence and feature, for all time steps (Gal & Ghahramani, 2016);
            without effect where there is no ``dropout``, or one layer.
        zoneout: probability of each unit to keep h, and c, in a step, or a pair of probabilities (h, c); their
            expectation in evaluation (Krueger et al., 2017). Not with ``proj_size``.
        backend: "triton", "aten", "reference" or "auto"; None follows ``seqcore.use_backend``.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: tuple[Tensor, Tensor] | None = None,
        return_cells: bool = False,
    ):
        """y and (h_n, c_n), and every step's c if ``return_cells``; see ``seqcore.functional.lstm``."""
        return functional.lstm(
            input, hx, lengths=lengths, reset=reset, reset_hx=reset_hx, return_cells=return_cells, **self._options()
        )


class _Backend(NotScriptable):
    """The ``backend`` option of the Cells, whose constructors are otherwise torch's."""

    backend: str | None = None

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        if backend is not None:
            check_backend(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend is None else f", backend={self.backend!r}")


class RNNCell(_Backend, nn.RNNCell):
    """``torch.nn.RNNCell`` with a choice of backend. Source: torch's page of the same name."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h; input [B, I] or [I], hx [B, H] or [H]."""
        return functional.rnn_cell(input, hx, *self._weights(), nonlinearity=self.nonlinearity, backend=self.backend)


class GRUCell(_Backend, nn.GRUCell):
    """``torch.nn.GRUCell`` with a choice of backend. Source: torch's page of the same name."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h; input [B, I] or [I], hx [B, H] or [H]."""
        return functional.gru_cell(input, hx, *self._weights(), backend=self.backend)


class LSTMCell(_Backend, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with a choice of backend. Source: torch's page of the same name."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next (h, c); input [B, I] or [I], hx a pair of [B, H] or [H]."""
        return functional.lstm_cell(input, hx, *self._weights(), backend=self.backend)
