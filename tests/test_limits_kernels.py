"""Interpreted kernels on tensors of more than 2^31 elements, nearly all of which nobody touches and take no memory.

A launch has billions of programs, of which the last few run; they are to do what they do in a small problem.
"""

import contextlib
import mmap
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from seqcore.devices import INTERPRETED
from seqcore.kernels import floors, tuning
from seqcore.kernels.recurrence import pointwise
from seqcore.kernels.recurrence.cells import gru_step, lstm_step
from seqcore.kernels.recurrence.products import gate_weights, unit_weights
from seqcore.ops import attention_arguments, attention_launch
from seqcore.ops import recurrence as recurrence_ops

from .attention_twins import kernels, operands, qkv
from .attention_twins import results as attention_results
from .effort import effort
from .exhaustion import failures
from .recurrence_twins import differing, mapped, masks, ours, problem, tensors
from .recurrence_twins import results as recurrence_results

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="the memory that nobody touches would have to be there"),
]

# Of mmap(2) on Linux: nobody counts what is not touched.
NORESERVE = 0x4000
FAR = 2**31


@pytest.fixture(autouse=True)
def _unfilled(_poisoned):
    """Nobody fills what is allocated here."""
    torch.use_deterministic_algorithms(False)


def vast(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros, of which only those that are touched take memory."""
    shape = torch.Size(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, max(1, shape.numel()) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[: shape.numel()].view(shape)


def at_the_end(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """``tensor`` as the last corner of zeros of this shape."""
    found = vast(*shape, dtype=tensor.dtype)
    corner(found, tensor.shape).copy_(tensor)
    return found


def corner(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The last corner of ``tensor``, of this shape."""
    return tensor[tuple(slice(have - size, None) for have, size in zip(tensor.shape, shape, strict=True))]


@contextlib.contextmanager
def running(programs: Callable[[int], list[int]]):
    """Within the block only those programs of a launch run that are named, given how many there are.

    Yields the names of the kernels that are launched.
    """
    from triton.runtime import interpreter

    builder, run = interpreter.interpreter_builder, interpreter.InterpretedFunction.run
    dim, idx, launched = builder.set_grid_dim, builder.set_grid_idx, set()

    def run_some(kernel, *arguments, grid, **keywords):
        (count,) = grid
        launched.add(kernel.fn.__name__)
        chosen = programs(count)
        with mock.patch.multiple(
            builder,
            set_grid_dim=lambda *_: dim(count, 1, 1),
            set_grid_idx=lambda x, y, z: idx(chosen[x], 0, 0),
        ):
            return run(kernel, *arguments, grid=(len(chosen),), **keywords)

    with mock.patch.object(interpreter.InterpretedFunction, "run", run_some):
        yield launched


def at_both_ends(count: int) -> list[int]:
    """Some tiles are taken last first."""
    return list(range(count)) if count < 8 else [*range(4), *range(count - 4, count)]


# --- attention --------------------------------------------------------------------------------------------------------

# Of no whole units of 16 bytes, which would divide strides by four.
m, n, D = 3, 5, 5
# Batch, heads, queries and keys, one of them so many that offsets along it pass 2^31 elements.
VAST = {
    "batch": (2**28 + 1, 3, m, n),
    "heads": (3, 2**28 + 1, m, n),
    "queries": (1, 2, 2**29 + m, n),
    "keys": (1, 2, m, 2**29 + n),
}
# Decoding numbers rows in 32 bits, and the parts of them in 64.
DECODED = {"batch": (2**27 + 1, 3, m, n), "heads": (3, 2**27 + 1, m, n), "keys": VAST["keys"]}
# So that of many queries and keys only the last meet.
LAST_MEET = {"causal": "lower_right", "window": (1, 0)}


@pytest.fixture
def small():
    """q, k, v, the gradients of out and lse, and a mask, of one head."""
    q, k, v = qkv(1, 1, M=m, N=n, D=D)
    return q, k, v, torch.randn(1, 1, m, D), torch.randn(1, 1, m), torch.randn(1, 1, m, n)


@pytest.fixture
def far_allocations(monkeypatch):
    """What attention's operators allocate is zeros that nobody has touched."""

    def empty(*shape, dtype, device):
        return vast(*(shape[0] if isinstance(shape[0], tuple) else shape), dtype=dtype)

    namespace = SimpleNamespace(**vars(torch) | {"empty": empty, "full": lambda shape, fill, **o: empty(shape, **o)})
    monkeypatch.setattr(attention_launch, "torch", namespace)
    monkeypatch.setattr(attention_arguments, "torch", namespace)


def trained(q, k, v, dout, dlse, mask=None, **options):
    """Everything that the operators return, by name; of the mask's gradient what was made."""
    settings, tensors = operands(q, k, v, attn_mask=mask, **LAST_MEET, **options)
    out, lse, rows = attention_launch.forward(*tensors, *settings)
    wanted = [True, True, True, mask is not None, False]
    gradients = attention_launch.backward(dout, dlse, out, rows, wanted, *tensors, *settings)
    return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv", "dmask"), gradients[:4], strict=True))


def assert_same_corners(found, expected):
    for name, tensor in expected.items():
        if tensor is not None:
            assert tensor.any() and torch.equal(corner(found[name], tensor.shape), tensor), name


CASES = [(size, way) for way, sizes in (("forward", VAST), ("decode", DECODED)) for size in sizes]


@pytest.mark.parametrize("size, way", CASES, ids=map("-".join, CASES))
def test_attention(size, way, small, far_allocations, monkeypatch):
    (B, H, M, N), (q, k, v, dout, dlse, mask) = (VAST if way == "forward" else DECODED)[size], small
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: 0 if way == "forward" else 2)
    expected = trained(*small)
    tensors = [at_the_end(t, B, H, N, D) for t in (k, v)]
    far = (at_the_end(q, B, H, M, D), *tensors, at_the_end(dout, B, H, M, D), at_the_end(dlse, B, H, M))
    with running(at_both_ends) as launched:
        found = trained(*far, at_the_end(mask, B, H, M, N))
    assert f"attention_{way}_kernel" in launched
    assert any(t is not None and t.numel() > FAR for t in found.values())
    assert_same_corners(found, expected)


def test_packed_attention(small, far_allocations):
    """Two sequences end to end, of which the last begins far away."""
    H, M, N = 2, 2**29 + m, 2**29 + n
    *tensors, dlse, _ = small
    ends = {"cu_seqlens_q": torch.tensor([0, M - m, M]), "cu_seqlens_k": torch.tensor([0, N - n, N])}
    alone = {"cu_seqlens_q": torch.tensor([0, m]), "cu_seqlens_k": torch.tensor([0, n])}
    sizes = (M, N, N, M)
    expected = trained(*tensors, dlse, **alone)
    far = [at_the_end(t, 1, H, rows, D) for t, rows in zip(tensors, sizes, strict=True)]
    with running(at_both_ends):
        found = trained(*far, at_the_end(dlse, 1, H, M), **ends)
    assert_same_corners(found, expected)


@pytest.mark.parametrize("size", ["batch", "queries", "keys"])
def test_averaged_weights(size, small, far_allocations):
    (B, _, M, N), (q, k, v, *_) = VAST[size], small
    B = 3 * B

    def weights(q, k, v):
        settings, tensors = operands(q, k, v, **LAST_MEET)
        rows = attention_launch.forward(*tensors, *settings)[2]
        return {"weights": attention_launch.weights(rows, *tensors, *settings)}

    expected = weights(q, k, v)
    with running(at_both_ends):
        found = weights(at_the_end(q, B, 1, M, D), *(at_the_end(t, B, 1, N, D) for t in (k, v)))
    assert found["weights"].numel() > FAR
    assert_same_corners(found, expected)


@pytest.mark.parametrize("moved", range(5), ids=["query", "key", "value", "mask", "gradient"])
def test_strides(moved):
    """Each tensor in turn with steps of more than 2^31 elements along one dimension; of rows, steps of whole units."""
    tensors = [*qkv(2, 2, M=m, N=n, D=8), torch.randn(2, 2, m, n), torch.randn(2, 2, m, 8)]

    def run(q, k, v, mask, dout):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, mask)]
        out, lse = kernels(*leaves)
        return [out, lse, *torch.autograd.grad([out], leaves, [dout])]

    expected = run(*tensors)
    for dim in range(3):
        tensor, steps = tensors[moved], list(tensors[moved].stride())
        steps[dim] = FAR + (dim < 2)
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=True))
        far = vast(span).as_strided(tensor.shape, steps).copy_(tensor)
        found = run(*tensors[:moved], far, *tensors[moved + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"dimension {dim}"


# --- recurrences ------------------------------------------------------------------------------------------------------

# What each pointer of the sequence kernels points to; R rows are T steps of B sequences.
OF_ROWS = ("y_ptr", "cells_ptr", "dy_ptr", "dcells_ptr")
OF_DIRECTIONS_AND_ROWS = ("x_gates_ptr", "saved_ptr", "dx_gates_ptr", "dh_gates_ptr")
OF_SEQUENCES = ("h_init_ptr", "c_init_ptr", "h_n_ptr", "c_n_ptr", "dh_n_ptr", "dc_n_ptr", "dh_init_ptr", "dc_init_ptr")
# So many sequences before those of a test that steps of theirs, rows of states and what belongs to a direction are far.
BEFORE = 2**30


class FarBatch:
    """Launches of the sequence kernels for the last sequences of a batch of more than 2^30."""

    def __init__(self, run: Callable) -> None:
        self.run, self.largest = run, 0

    def __call__(self, kernel, *arguments, **keywords):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        if "first_group" not in given:
            return self.run(kernel, *arguments, **keywords)
        T, B, D = given["T"], given["B"], given["y_width"]
        batch = BEFORE + B
        numbers = {"B": batch, "R": T * batch, "first_group": BEFORE // given["BLOCK_B"]}
        numbers["initial_rows"] = given["initial_rows"] // B * batch
        if "saved_direction" in given:
            numbers["saved_direction"] = T * batch * given["saved_width"]
        # In the place of a tensor that is not there stands one of the first kind, and is to be taken for that.
        places = dict.fromkeys(OF_DIRECTIONS_AND_ROWS, (D, T, B, -1)) | dict.fromkeys(OF_ROWS, (T, B, -1))
        places |= dict.fromkeys(OF_SEQUENCES, (D, -1, B, given["UNITS"] * given["BLOCKS"]))
        moved = {}
        for name, place in places.items():
            tensor = given.get(name)
            if tensor is not None and tensor.numel() and tensor.data_ptr() not in moved:
                near = tensor.view(place)
                shape = [batch if size == B and dim == near.dim() - 2 else size for dim, size in enumerate(near.shape)]
                moved[tensor.data_ptr()] = near, at_the_end(near, *shape)
        self.largest = max(self.largest, *(far.numel() for _, far in moved.values()))
        tensors = {
            name: moved[value.data_ptr()][1]
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.data_ptr() in moved
        }
        if given["MAPPED"]:
            tensors |= self._map(given, T, B, D, batch)
        found = self.run(kernel, **given | numbers | tensors)
        for near, far in moved.values():
            near.copy_(corner(far, near.shape))
        return found

    @staticmethod
    def _map(given, T, B, D, batch):
        """The map of the rows, in their new places."""

        def row(at):
            initial = T * batch + (at - T * B) // B * batch + BEFORE + (at - T * B) % B
            return torch.where(at < 0, at, torch.where(at < T * B, at // B * batch + BEFORE + at % B, initial))

        return {
            "offset_ptr": torch.arange(T) * batch,
            "active_ptr": torch.full((T,), batch),
            "source_ptr": at_the_end(row(given["source_ptr"]).view(D, T, B), D, T, batch),
            "last_ptr": at_the_end(row(given["last_ptr"]), D, batch),
            "steps_ptr": at_the_end(given["steps_ptr"], BEFORE // given["BLOCK_B"] + len(given["steps_ptr"])),
        }


@pytest.mark.parametrize("form", ["padded", "masked", "reset to given states"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sequences(cell, form, monkeypatch):
    from triton.runtime import interpreter

    twin, x, hx = problem(cell, T=4, B=5, I=3, H=3, bidirectional=True)
    module = ours(twin, "triton")
    keywords = {} if form == "padded" else masks()

    def run():
        if form != "reset to given states":
            return recurrence_results(module, x, hx, **keywords)
        given = mapped(lambda t: t.detach().requires_grad_(), hx)
        outputs = module(x, hx, **keywords, reset_hx=given)
        gradients = torch.autograd.grad(outputs[0].sum(), [*tensors(given), module.weight_hh_l0_reverse])
        return dict(enumerate([*tensors(outputs), *gradients]))

    expected = run()
    launch = FarBatch(interpreter.InterpretedFunction.run)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *given, **named: launch(*given, **named))
    found = run()
    assert launch.largest > FAR
    assert not differing(found, expected)


def test_single_steps(monkeypatch):
    """Of the last sequences; one of the launch's numbers of programs is that of the slices, of which there are two."""
    B, I, H = 2**27 + 5, 3, 31
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **_: vast(*_sizes(shape), dtype=self.dtype))
    weights = [torch.randn(size) for size in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    near = [torch.randn(1, 5, width) for width in (I, H, H)]

    def step(x, h, c):
        with torch.no_grad():
            return recurrence_ops._forward("lstm", x, h, c, weights, 1, True, None, None, None, True, True)

    expected = step(*near)
    with running(lambda count: [count // 2 - 1, count - 1]):
        found = step(*(at_the_end(t, 1, B, t.shape[-1]) for t in near))
    assert found[0].numel() > FAR
    for far, tensor in zip(found[:5], expected[:5], strict=True):
        assert tensor.any() and torch.equal(corner(far, tensor.shape), tensor)


def _sizes(shape):
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


@pytest.mark.parametrize("step, gates, saved", [(lstm_step, 4, 4), (gru_step, 3, 4)], ids=["lstm", "gru"])
def test_pointwise_steps(step, gates, saved):
    H, few, many = 33, 5, 2**27 + 1
    x_gates, h_gates, h, c = (torch.randn(few, width * H) for width in (gates, gates, 1, 1))

    def run(x_gates, h_gates, h, c, kept):
        rows = h.shape[0]
        pointwise.pointwise_kernel[(-(-rows // 4) * 3,)](
            x_gates, h_gates, h, c, kept, rows, H, gates * H, saved * H,
            STEP=step, GATES=gates, EXTRA=0, SAVED=saved, HAS_C=step is lstm_step, BLOCK_B=4, BLOCK_H=16,
        )  # fmt: skip
        return kept

    expected = run(x_gates, h_gates, h, c, torch.zeros(few, saved * H))
    far = [at_the_end(t, many, t.shape[1]) for t in (x_gates, h_gates, h, c)]
    blocks = -(-many // 4)
    with running(lambda _: [column * blocks + block for column in range(3) for block in (blocks - 2, blocks - 1)]):
        found = run(*far, vast(many, saved * H))
    assert h.shape[1] * many > FAR and torch.equal(corner(found, expected.shape), expected)


@triton.jit
def weights_kernel(
    w_ptr, gate_ptr, unit_ptr, block, first_unit, tile, GATES: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """A tile of each kind, of 16 places of the contraction by 16 units."""
    gates = gate_weights(w_ptr, block, first_unit, tile, 1, GATES - 1, 1, GATES, BLOCKS, UNITS, UNITS, 16, 16, SWAP)
    units = unit_weights(w_ptr, block, first_unit, GATES * (tile + 1) - 1, 1, GATES, BLOCKS, UNITS, 16, 16, SWAP)
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(gate_ptr + offs, gates)
    tl.store(unit_ptr + offs, units)


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("gates, blocks, units", [(4, 1, 23184), (4, 3, 2**14)], ids=["one", "blocks"])
def test_weights(gates, blocks, units, swap):
    """The last tiles of W [gates, blocks, units, units]."""
    weights = vast(gates, blocks, units, units)
    assert weights.numel() > FAR
    there = weights[-1, -1, -16:, -16:].copy_(torch.arange(256.0).view(16, 16))
    found = torch.zeros(2, 16, 16)
    weights_kernel[(1,)](
        weights, *found, blocks - 1, units - 16, units // 16 - 1, GATES=gates, BLOCKS=blocks, UNITS=units, SWAP=swap
    )
    # The one kind stands along the places that lead to a unit, the other along the units that are led to.
    assert torch.equal(found[0], there if swap else there.T)
    assert torch.equal(found[1], there.T if swap else there)


def test_exchange():
    """The kernel that measures the least time of a step, with teams of one program."""
    teams, T, width, rows = 2**25, 2, 37, 2

    def run(teams):
        buffer = vast(T + 1, teams * rows, width, dtype=torch.int32)
        corner(buffer[:1], (1, rows, width)).copy_(torch.arange(rows * width).view(1, rows, width))
        counters = vast(teams * 32, dtype=torch.int32)
        floors.exchange_kernel[(teams,)](
            buffer, counters, T, teams, SLICES=1, WIDTH=width, SHARE=width, BLOCK_B=rows, BLOCK_K=64
        )
        return buffer

    expected = run(1)
    with running(lambda count: [count - 1]):
        found = run(teams)
    assert found.numel() > FAR and expected[-1].all()
    assert torch.equal(corner(found, expected.shape), expected)


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "recurrence"])
def test_what_ran_out_of_memory_runs_again(name, monkeypatch):
    from triton.runtime import interpreter

    twin, x, hx = problem("lstm", T=2, B=3, H=3, bidirectional=True)
    module, tensors = ours(twin, "triton", recompute=True), qkv(2, 2, M=m, N=n)
    run = {
        "attention": lambda: attention_results(kernels, *tensors, return_weights="average"),
        "recurrence": lambda: recurrence_results(module, x, hx),
    }[name]
    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
        assert failures(run, step=effort(4, 1)) > 20
    assert not differing(run(), expected)
