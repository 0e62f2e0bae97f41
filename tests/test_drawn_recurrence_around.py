"""What stands around the recurrences on whatever hypothesis draws: steps, dropout, chunks, gradients, first values."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import seqcore
from seqcore import functional
from seqcore.diagnostics import gradient_flow, step_jacobians
from seqcore.nn import init

from .comparisons import Results, assert_equal_in_float64, cotangents
from .effort import drawn
from .recurrence_twins import CELLS, SINGLE, packed, tensors
from .routes import by_the_operators

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

from .drawn_recurrence import LAYOUTS_IN_FULL, Call, Problem, calls

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DOUBLE = {"dtype": torch.float64}
layouts, seeds = st.sampled_from(list(LAYOUTS_IN_FULL)), st.integers(0, 2**32)


# --- single steps --------------------------------------------------------------------------------------------------


def step_results(step, leaves: Results) -> Results:
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    outputs = tensors(step(leaves))
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs), materialize_grads=True)
    return dict(enumerate(outputs)) | dict(zip(leaves, found, strict=True))


@drawn(
    40, 800, cell=st.sampled_from(list(SINGLE)), batch=st.none() | st.integers(0, 4), inputs=st.integers(0, 5),
    hidden=st.integers(0, 5), bias=st.booleans(), state=st.booleans(), by_module=st.booleans(),
    lying=st.tuples(layouts, layouts, layouts), seed=seeds,
)  # fmt: skip
def test_single_steps(cell, batch, inputs, hidden, bias, state, by_module, lying, seed):
    """Cells, which take sizes of 0 as torch's do, and every way a tensor may lie in memory."""
    torch.manual_seed(seed)
    theirs = SINGLE[cell][0](inputs, hidden, bias=bias, **SINGLE[cell][1], **DOUBLE)
    kind = cell.partition("_")[0]
    lead = () if batch is None else (batch,)
    shapes = {"x": (*lead, inputs)}
    shapes |= {name: (*lead, hidden) for name in ("h", "c")[: 1 + (kind == "lstm")] if state}
    leaves = {name: torch.randn(shape, **DOUBLE) for name, shape in shapes.items()}
    leaves |= {name: p.detach() for name, p in theirs.named_parameters()}
    for name, t in leaves.items():
        layout = lying[0] if name == "x" else lying[1] if name in ("h", "c") else lying[2]
        leaves[name] = LAYOUTS_IN_FULL[layout](t) if t.numel() else t
    names = [name for name, _ in theirs.named_parameters()]

    def ours(backend):
        def run(given):
            hx = None if not state else (given["h"], given["c"]) if kind == "lstm" else given["h"]
            if by_module:
                module = getattr(seqcore.nn, type(theirs).__name__)(
                    inputs, hidden, bias=bias, backend=backend, **SINGLE[cell][1], **DOUBLE
                )
                return torch.func.functional_call(module, {name: given[name] for name in names}, (given["x"], hx))
            options = {"nonlinearity": cell[4:]} if kind == "rnn" else {}
            step = getattr(functional, f"{kind}_cell")
            return step(given["x"], hx, *(given[name] for name in names), backend=backend, **options)

        return run

    def torchs(given):
        hx = None if not state else (given["h"], given["c"]) if kind == "lstm" else given["h"]
        return torch.func.functional_call(theirs, {name: given[name] for name in names}, (given["x"], hx))

    expected = step_results(torchs, {name: t.clone() for name, t in leaves.items()})
    for backend in ("reference", "aten"):
        assert_equal_in_float64(step_results(ours(backend), leaves), expected)
    with by_the_operators():
        assert_equal_in_float64(step_results(ours(None), leaves), expected)


# --- locked dropout ------------------------------------------------------------------------------------------------


@drawn(
    30, 400, sizes=st.tuples(*[st.integers(0, 4)] * 3),
    form=st.sampled_from(["padded", "batch first", "unbatched", "packed"]), p=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    training=st.booleans(), by_module=st.booleans(), layout=layouts, seed=seeds, data=st.data(),
)  # fmt: skip
def test_locked_dropout(sizes, form, p, training, by_module, layout, seed, data):
    """Each feature of a sequence is zeros at all steps, or all of it divided by 1 - p; packed as padded."""
    # torch packs nothing that is empty.
    T, B, F = sizes if form != "packed" else (*sizes[:2], max(sizes[2], 1))
    shape = {"unbatched": (T, F), "batch first": (B, T, F)}.get(form, (T, B, F))
    x = 1 + torch.rand(shape, **DOUBLE)
    x, given = LAYOUTS_IN_FULL[layout](x) if x.numel() else x, None
    if form == "packed":
        if not T or not B:
            return
        lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
        given = packed(x, lengths)
        x, _ = pad_packed_sequence(given, total_length=T)

    def run(value):
        torch.manual_seed(seed)
        if by_module:
            return seqcore.nn.LockedDropout(p, batch_first=form == "batch first").train(training)(value)
        return functional.locked_dropout(value, p, training, form == "batch first")

    y = run(x if given is None else given)
    if not training or p == 0:
        assert y is (x if given is None else given)
        return
    if isinstance(y, PackedSequence):
        y, _ = pad_packed_sequence(y, total_length=T)
        assert torch.equal(y, run(x))
    share = torch.where(x == 0, 0, y / torch.where(x == 0, 1, x))
    time = 1 if form == "batch first" else 0
    if not x.numel():
        assert y.shape == x.shape
        return
    allowed = torch.tensor([0.0] if p == 1 else [0.0, 1 / (1 - p)], **DOUBLE)
    assert (share[..., None] - allowed).abs().amin(-1).max() <= 8 * torch.finfo(torch.float64).eps
    counted = torch.where(x == 0, share.amax(time, keepdim=True), share)
    assert_equal_in_float64({"mask": counted}, {"mask": counted.amax(time, keepdim=True).expand_as(counted)})


# --- chunks --------------------------------------------------------------------------------------------------------


@drawn(25, 400, call=calls(most=6, dtypes=(torch.float64,), empty=False), steps=st.integers(1, 7))
def test_chunks_are_the_whole(call, steps):
    """Truncated, forward is what it is at once, with lengths of every integer dtype; each chunk has its own graph."""
    options = {name: value for name, value in call.options.items() if name in ("grad_clip", "recompute")}
    form = "padded" if call.form.startswith("packed") else call.form
    call = Call(**{**vars(call), "bidirectional": False, "form": form, "reset_hx": False, "options": options})
    problem = Problem(call)
    module, keywords = problem.module("reference", problem.leaves), problem.keywords(problem.leaves)
    x, hx = problem.leaves["x"], problem.state(problem.leaves)
    y, state = module(x, hx, **keywords)
    chunks = list(seqcore.truncated_bptt(module, x, steps, hx, **keywords))
    time = 1 if form == "batch first" else 0
    found = [torch.cat([chunk for chunk, _ in chunks], time), *tensors(chunks[-1][1])]
    expected = [y, *tensors(state)]
    assert_equal_in_float64(dict(enumerate(found)), dict(enumerate(expected)))
    chunks[-1][0].sum().backward()  # which a graph that was freed, or of another chunk, could not do


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_chunks_past_the_end_of_a_sequence_of_narrow_lengths(dtype):
    """What is left of the lengths is below 0 there, and may be below what the dtype holds."""
    module, x = seqcore.nn.GRU(2, 3, **DOUBLE), torch.randn(127, 2, 2, **DOUBLE)
    lengths = torch.tensor([1, 127], dtype=dtype)
    y, h_n = module(x, lengths=lengths)
    chunks = list(seqcore.truncated_bptt(module, x, 40, lengths=lengths))
    assert_equal_in_float64(
        {"y": torch.cat([chunk for chunk, _ in chunks]), "h_n": chunks[-1][1]}, {"y": y, "h_n": h_n}
    )


# --- diagnostics ---------------------------------------------------------------------------------------------------


@drawn(20, 300, call=calls(most=4, dtypes=(torch.float64,), empty=False))
def test_gradient_flow(call):
    """The loss, and the gradients of the input at every step, are those of the module by itself."""
    form = "padded" if call.form.startswith("packed") else call.form
    call = Call(**{**vars(call), "form": form, "options": {**call.options, "zoneout": 0.0, "training": False}})
    problem = Problem(call)
    module, keywords = problem.module("reference", problem.leaves), problem.keywords(problem.leaves)
    x = problem.leaves["x"].detach().requires_grad_()
    hx = problem.state(problem.leaves)

    def loss(outputs):
        outputs = tensors(outputs)
        return sum((out * weight).sum() for out, weight in zip(outputs, cotangents(outputs), strict=True))

    value = loss(module(x, hx, **keywords))
    [expected] = torch.autograd.grad(value, [x])
    flows = gradient_flow(module, x, hx, loss=loss, **keywords)
    letters = {"h", "c"} if module.mode == "LSTM" else {"h"}
    assert {name[0] for name in flows} == letters | {"i"}
    assert len(flows) == 1 + len(letters) * call.layers * (1 + call.bidirectional)
    rows = expected.transpose(0, 1) if form == "batch first" else expected
    assert_equal_in_float64(
        {"loss": torch.tensor(flows.loss, **DOUBLE), "input": flows["input"].norms},
        {"loss": value.detach(), "input": torch.linalg.vector_norm(rows.flatten(1), dim=1)},
    )


@drawn(
    20, 300, cell=st.sampled_from(list(SINGLE)), T=st.integers(1, 4), B=st.integers(0, 3), I=st.integers(1, 3),
    H=st.integers(1, 3), single=st.booleans(), layout=layouts, seed=seeds,
)  # fmt: skip
def test_step_jacobians(cell, T, B, I, H, single, layout, seed):
    """Their product takes a gradient of the last state to that of the first one, as autograd does."""
    torch.manual_seed(seed)
    kind, options = (SINGLE if single else CELLS)[cell]
    module = getattr(seqcore.nn, kind.__name__)(I, H, **options, **DOUBLE)
    x = torch.randn(T, B, I, **DOUBLE)
    x = LAYOUTS_IN_FULL[layout](x) if x.numel() else x
    lead = (B,) if single else (1, B)
    parts = [torch.randn(*lead, H, **DOUBLE, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    state = tuple(parts) if len(parts) == 2 else parts[0]
    found = step_jacobians(module, x, state)
    assert found.matrices.shape == (T, B, len(parts) * H, len(parts) * H)
    if single:
        for x_t in x:
            state = module(x_t, state)
    else:
        state = module(x, state)[1]
    weights = torch.randn(B, len(parts) * H, **DOUBLE)
    last = torch.cat(tensors(state), -1)
    expected = torch.autograd.grad(last, parts, weights.view(last.shape))
    for matrices in found.matrices.flip(0):
        weights = (weights[:, None] @ matrices)[:, 0]
    assert_equal_in_float64({"gradient": weights}, {"gradient": torch.cat(expected, -1).view(weights.shape)})
    assert found.verdict in ("vanishing", "exploding", "steady") and found.sentence


# --- initialisers --------------------------------------------------------------------------------------------------


@drawn(
    20, 300, call=calls(dtypes=(torch.float64,)), gain=st.sampled_from([0.0, 0.5, 1.0, 2]),
    value=st.sampled_from([-1, 0.0, 1.5]), single=st.booleans(),
)  # fmt: skip
def test_initialisers(call, gain, value, single):
    """W W^T = gain² 1 in each gate, or W^T W with a projection; the keeping gate's biases add up to the value."""
    problem = Problem(call)
    module = problem.module(None, None).double()
    if single and call.cell != "lstm_proj":
        kind, options = SINGLE[call.cell]
        module = getattr(seqcore.nn, kind.__name__)(call.I, call.H, bias=call.bias, **options, **DOUBLE)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert init.orthogonal_recurrent_(module, gain) is module
    gates = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3}.get(call.cell, 4)
    for name, p in module.named_parameters():
        if not name.startswith("weight_hh"):
            assert torch.equal(p, before[name])
            continue
        for matrix in p.flatten(0, 1) if p.dim() == 4 else p.chunk(gates):
            square = matrix.mT @ matrix
            assert_equal_in_float64({name: square.detach()}, {name: gain**2 * torch.eye(len(square), **DOUBLE)})
    if gates == 1 or not call.bias:
        with pytest.raises(seqcore.InvalidInput):
            init.forget_gate_bias_(module, value)
        return
    init.forget_gate_bias_(module, value)
    biases = {name: p.detach().chunk(gates) for name, p in module.named_parameters() if name.startswith("bias")}
    for name, parts in biases.items():
        if name.startswith("bias_ih"):
            both = parts[1] + biases[name.replace("_ih", "_hh")][1]
            assert_equal_in_float64({name: both}, {name: torch.full_like(both, value)})
        old = before[name].chunk(gates)
        assert all(torch.equal(parts[gate], old[gate]) for gate in range(gates) if gate != 1)
