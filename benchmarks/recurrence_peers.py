"""Who runs a recurrence besides ours and torch.nn's: loops over time in Python, and FlashRNN.

Each is a way to call torch.nn's module of the case, so that its weights, and the names of their gradients, are the
same for everybody.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.layers import TORCHS, Layer, blocks_of
from benchmarks.peers import Absent, take_part
from benchmarks.shapes import Case
from seqcore.reference import cells
from seqcore.testing.cases import dtype_name

LOOP, COMPILED_LOOP = "Python loop of cells", "compiled loop"
# Its kernels by what they are written in.
FLASHRNN = {"FlashRNN triton": "triton_fused", "FlashRNN cuda": "cuda_fused"}
# Where loops take part on a GPU, whose launches from Python take long, and FlashRNN's CUDA, compiled for each case.
LOOPED_SWEEPS, LOOPED = ("persistent", "reset"), (1024, 16)
# Of the output, by which a peer may differ from torch.nn's in 16 bits before it counts as another problem.
MOST_DIFFERENCE = 0.05


def recurrence_peers(case: Case, torchs: Layer, x: Tensor) -> tuple[dict[str, Layer], dict[str, str]]:
    """Those that take part beside torch.nn, and why the others do not; each has run once, and done the same job."""
    expected = torchs.forward(x)

    def run(peer: Layer) -> None:
        difference = (peer.forward(x) - expected).float().norm() / expected.float().norm()
        # NaN is no small difference.
        if not difference <= MOST_DIFFERENCE:
            raise Absent(f"computes something else: differs from {TORCHS[0]} by {difference:.2g} of its norm")

    builders = {name: functools.partial(build, case, torchs) for name, build in PEERS.items()}
    return take_part(builders, run, x.is_cuda)


def looped(case: Case, torchs: Layer) -> Layer:
    """Steps of torch's own cell, in Python."""
    _one_layer_forward_in_time(case)
    if torchs_device(torchs).type == "cuda":
        _where_loops_take_part(case)
    return replace(torchs, call=cell_loop)


def compiled_loop(case: Case, torchs: Layer) -> Layer:
    """The whole input projected at once, then a compiled step T times."""
    if torchs_device(torchs).type != "cuda":
        raise Absent("measured on a GPU only")
    _one_layer_forward_in_time(case)
    _where_loops_take_part(case)
    return replace(torchs, call=functools.partial(step_loop, torch.compile(one_step, dynamic=False)))


def flashrnn(case: Case, torchs: Layer, backend: str) -> Layer:
    """FlashRNN's operator, behind a product that projects the input."""
    import flashrnn as package

    _one_layer_forward_in_time(case)
    if case.reset_every:
        raise Absent("knows no resets")
    if backend == "cuda_fused" and case.sweep not in ("persistent", "blocks"):
        raise Absent("left out, to save the time of compiling it; is there at the shapes of its published figures")
    call = functools.partial(flash, operator=package.flashrnn, backend=backend, blocks=case.blocks)
    return replace(torchs, call=call)


PEERS: dict[str, Callable[[Case, Layer], Layer]] = {
    LOOP: looped,
    COMPILED_LOOP: compiled_loop,
    **{name: functools.partial(flashrnn, backend=backend) for name, backend in FLASHRNN.items()},
}


def torchs_device(torchs: Layer) -> torch.device:
    return next(torchs.module.parameters()).device


def _one_layer_forward_in_time(case: Case) -> None:
    if case.layers > 1 or case.directions > 1 or case.packed or case.ragged:
        raise Absent("written for one layer in one direction over sequences of one length")


def _where_loops_take_part(case: Case) -> None:
    H, B = LOOPED
    if case.sweep not in LOOPED_SWEEPS and not (case.sweep == "grid" and (case.H, case.B) == LOOPED):
        sweeps = " and ".join(LOOPED_SWEEPS)
        raise Absent(f"left out, to save its time; is there at H = {H:,}, B = {B} and in the sweeps {sweeps}")


def weights_of(module: nn.Module) -> list[Tensor]:
    """w_ih, w_hh, b_ih and b_hh of its one layer."""
    return [getattr(module, name) for name in module._all_weights[0]]


def cell_loop(module: nn.Module, x: Tensor, reset: Tensor | None = None) -> Tensor:
    """What a Cell in a loop does."""
    cell = {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell}[module.mode]
    weights, outputs = weights_of(module), []
    for x_t, state in entering_states(module, x, reset, outputs):
        new = cell(x_t, state if len(state) > 1 else state[0], *weights)
        outputs.append(new if isinstance(new, tuple) else (new,))
    return torch.stack([state[0] for state in outputs])


def step_loop(step: Callable, module: nn.Module, x: Tensor, reset: Tensor | None = None) -> Tensor:
    """``step``, which is ``one_step`` or what a compiler made of it, T times."""
    w_ih, w_hh, b_ih, b_hh = weights_of(module)
    x_gates, outputs = nn.functional.linear(x, w_ih, b_ih), []
    for x_gates_t, state in entering_states(module, x_gates, reset, outputs):
        outputs.append(step(module.mode.lower(), x_gates_t, state, w_hh, b_hh))
    return torch.stack([state[0] for state in outputs])


def one_step(mode: str, x_gates: Tensor, state: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, ...]:
    """The product with the state and the pointwise mathematics."""
    gates = w_hh.shape[0] // w_hh.shape[1]
    h_gates = nn.functional.linear(state[0], w_hh, b_hh)
    return getattr(cells, mode)(x_gates.chunk(gates, 1), h_gates.chunk(gates, 1), state)[0]


def entering_states(
    module: nn.Module, x: Tensor, reset: Tensor | None, outputs: list[tuple[Tensor, ...]]
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Each step's part of x and the state that enters it: zeros at first and where an episode begins, else the last
    of ``outputs``."""
    zero = x.new_zeros(x.shape[1], module.hidden_size)
    state = (zero,) * (2 if module.mode == "LSTM" else 1)
    for t, x_t in enumerate(x):
        if outputs:
            state = outputs[-1]
        if reset is not None:
            state = tuple(part * ~reset[t, :, None] for part in state)
        yield x_t, state


def flash(module: nn.Module, x: Tensor, operator: Callable, backend: str, blocks: int = 1) -> Tensor:
    """FlashRNN with the module's weights; of dense ones in blocks only what stands on the diagonal.

    Its GRU has four gates: the recurrent part of n, apart; r and z; and the input's part of n.
    """
    function = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "elman"}[module.mode]
    w_ih, w_hh, b_ih, b_hh = weights_of(module)
    T, B, _ = x.shape
    units = module.hidden_size // blocks
    recurrent = blocks_of(w_hh, blocks)  # [G, N, H/N, H/N]
    from_x, from_h = (b.view(-1, blocks, units) for b in (b_ih, b_hh))
    if function == "gru":
        recurrent = recurrent[[2, 0, 1]]
        bias = torch.stack([from_h[2], from_x[0] + from_h[0], from_x[1] + from_h[1], from_x[2]])
    else:
        bias = from_x + from_h
    x_gates = nn.functional.linear(x, w_ih).view(T, B, -1, blocks, units).transpose(0, 1)
    # Of all states [S, B, T, N, H/N] the first is h.
    states = operator(x_gates, recurrent, bias, function=function, backend=backend, dtype=dtype_name(x.dtype))[0]
    return states[0].transpose(0, 1).flatten(2)
