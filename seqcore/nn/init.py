"""Initial values for recurrences: in place, without gradients, on seqcore's modules and Cells and on ``torch.nn``'s."""

import sys

import torch
from torch import Tensor, nn

from ..errors import InvalidInput

# How many gates stand on each other in a weight, and which of them keeps the state.
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_KEEPING = {"GRU": 1, "LSTM": 1}


@torch.no_grad()
def orthogonal_recurrent_(
    module: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None
) -> nn.Module:
    """Make the recurrent matrix of every gate ``gain`` times a random orthogonal one: W W^T = gain² 1.

    With a gain of 1 each gate's own product W h keeps the length of h, and W^T that of a gradient; activations, and the
    sum of all gates' gradients, still change lengths.

    Args:
        module: RNN, GRU, LSTM or a Cell of these, of ``seqcore.nn`` or ``torch.nn``; all its layers and directions.
            With ``blocks`` each block is orthogonal; with ``proj_size`` the matrices [H, P] are semi-orthogonal,
            W^T W = gain² 1, and ``weight_hr`` stays as it is.
        gain: of all matrices.
        generator: to draw from, on the weights' device; torch's default if None.

    Returns:
        ``module``.

    Raises:
        InvalidInput: for other modules, a gain that is not finite, a generator for another device, or parametrized
            weights, which are computed.

    Source: Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks" (2014);
    for recurrences Le et al., "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units" (2015), where
    the matrix is the identity.
    """
    _check_number("orthogonal_recurrent_", "gain", gain)
    gates = _GATES[_kind("orthogonal_recurrent_", module)]
    weights = _parameters("orthogonal_recurrent_", module, "weight_hh")
    _check_generator("orthogonal_recurrent_", generator, weights)
    for weight in weights:
        blocks = weight.flatten(0, 1) if weight.dim() == 4 else weight.chunk(gates)
        for matrix in blocks:
            # The decomposition behind it takes no 16-bit numbers.
            drawn = torch.empty_like(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32))
            matrix.copy_(nn.init.orthogonal_(drawn, float(gain), generator=generator))
    return module


@torch.no_grad()
def forget_gate_bias_(module: nn.Module, value: float = 1.0) -> nn.Module:
    """Make the bias of the gate that keeps the state ``value``: above 0, memory lasts from the first step of training.

    That is f of an LSTM, and z of a GRU, by which torch's keeps the old state: h' = (1 - z) n + z h. Its part of
    ``bias_ih`` becomes ``value`` and that of ``bias_hh`` 0, since a step adds the two; other gates' biases stay.

    Args:
        module: GRU, LSTM or a Cell of these, of ``seqcore.nn`` or ``torch.nn``; all its layers and directions.
        value: the sum of both biases.

    Returns:
        ``module``.

    Raises:
        InvalidInput: for other modules, an RNN (it has no gates), ``bias=False``, a value that is not finite, or
            parametrized biases.

    Source: Gers et al., "Learning to Forget: Continual Prediction with LSTM" (2000); Jozefowicz et al., "An Empirical
    Exploration of Recurrent Network Architectures" (2015).
    """
    _check_number("forget_gate_bias_", "value", value)
    kind = _kind("forget_gate_bias_", module)
    if kind not in _KEEPING:
        raise InvalidInput("forget_gate_bias_: an RNN has no gate that keeps its state; use a GRU or an LSTM")
    if not _without_wrapper(module).bias:
        raise InvalidInput(f"forget_gate_bias_: needs biases, got {kind} with bias=False; make it with bias=True")
    of_input, of_state = (_parameters("forget_gate_bias_", module, name) for name in ("bias_ih", "bias_hh"))
    for biases, filling in ((of_input, value), (of_state, 0.0)):
        for bias in biases:
            bias.chunk(_GATES[kind])[_KEEPING[kind]].fill_(float(filling))
    return module


def _check_number(name: str, argument: str, number: float) -> None:
    # An int may be larger than any float is.
    if not isinstance(number, (int, float)) or not -sys.float_info.max <= number <= sys.float_info.max:
        raise InvalidInput(f"{name}: {argument} must be a finite number, got {number!r}; leave it out for 1.0")


def _check_generator(name: str, generator: torch.Generator | None, weights: list[Tensor]) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidInput(
            f"{name}: generator must be a torch.Generator, got {type(generator).__name__}; leave it out for torch's own"
        )
    others = {weight.device for weight in weights if generator and weight.device.type != generator.device.type}
    if others:
        raise InvalidInput(
            f"{name}: generator must be on the weights' device, got {generator.device} and {others.pop()}; make one "
            "with torch.Generator(device)"
        )


def _without_wrapper(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given."""
    return getattr(module, "_orig_mod", module)


def _kind(name: str, module: nn.Module) -> str:
    """ "RNN", "GRU" or "LSTM"."""
    module = _without_wrapper(module)
    if isinstance(module, nn.RNNBase):
        kind = module.mode.partition("_")[0]
    else:
        cells = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
        kind = next((kind for kind, cell in cells.items() if isinstance(module, cell)), None)
    if kind not in _GATES:
        raise InvalidInput(
            f"{name}: module must be an RNN, GRU, LSTM or a Cell of these, of seqcore.nn or torch.nn, got "
            f"{type(module).__name__}; of a whole model, pass its recurrent modules one by one"
        )
    return kind


def _parameters(name: str, module: nn.Module, prefix: str) -> list[Tensor]:
    """The parameters called ``prefix``, of every layer and direction."""
    module = _without_wrapper(module)
    names = [prefix]
    if isinstance(module, nn.RNNBase):
        names = [each for group in module._all_weights for each in group if each.startswith(prefix)]
    for each in names:
        if each not in module._parameters:
            raise InvalidInput(
                f"{name}: {each} is not a parameter but computed from others (parametrized, normalised or pruned); "
                "initialise the module before that"
            )
    return [module._parameters[each] for each in names]
