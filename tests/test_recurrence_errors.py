"""Bad input to the recurrences raises before anything runs, wherever torch.nn raises, and says what was wrong.

Torch itself is not given bad states for packed input: it accepts some, and others make it write where it must not.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import seqcore
from seqcore import InvalidInput, UnsupportedInput, functional

from .recurrence_twins import CELLS, SINGLE, initial_state, mapped, ours, packed, torch_module

T, B, I, H = 3, 5, 4, 7
X = torch.zeros(T, B, I)


def assert_torch_refuses(module, *inputs):
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)):
        module(*inputs)


# What it is, the input, and what the message must say of what it got.
BAD_INPUTS = {
    "0-D": (X[0, 0, 0], "2D or 3D, got 0D"),
    "1-D": (X[0, 0], "2D or 3D, got 1D"),
    "4-D": (X[None], "2D or 3D, got 4D"),
    "too narrow": (X[..., :3], "Expected 4, got 3"),
    "no width": (X[..., :0], "Expected 4, got 0"),
    "no steps": (X[:0], r"sequence length to be larger than 0, got input \[0, 5, 4\]"),
    "no steps, unbatched": (X[:0, 0], r"sequence length to be larger than 0, got input \[0, 4\]"),
    "float64": (X.double(), r"input dtype \(torch.float64\) does not match weight dtype \(torch.float32"),
    "float16": (X.half(), r"input dtype \(torch.float16\) does not match weight dtype \(torch.float32"),
    "integers": (X.long(), "needs floating point, got input torch.int64"),
    "complex": (X.to(torch.complex64), "needs floating point, got input torch.complex64"),
    "elsewhere": (X.to("meta"), "must be on one device, got input on meta and w_ih of layer 0 on cpu"),
    "None": (None, "a Tensor or a PackedSequence, got NoneType"),
    "list": ([[0.0]], "a Tensor or a PackedSequence, got list"),
    "packed, too narrow": (packed(X[..., :3], [3, 2, 2, 1, 1]), "Expected 4, got 3"),
    "packed, float64": (packed(X.double(), [3, 2, 2, 1, 1]), r"dtype \(torch.float64\) does not match"),
    "packed, 1-D": (PackedSequence(X.flatten(), torch.tensor([5, 5, 5])), "must have 2 dimensions, got 1"),
    "packed, too few rows": (PackedSequence(X[0], torch.tensor([5, 5])), r"5 rows of data, got \[5, 5\] \(sum 10\)"),
    "packed, growing": (PackedSequence(X.flatten(0, 1), torch.tensor([4, 5, 6])), r"not increase.* got \[4, 5, 6\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_bad_input(cell, case):
    x, message = BAD_INPUTS[case]
    twin = torch_module(cell, I, H)
    if not isinstance(x, PackedSequence):
        assert_torch_refuses(twin, x)
    for backend in ("aten", "reference", "auto"):
        with pytest.raises(InvalidInput, match=message):
            ours(twin, backend)(x)


# What is done to each tensor of a good hx, and what the message must say.
BAD_STATES = {
    "1-D": (lambda t: t[0, 0], "should also be 3-D but got 1-D"),
    "2-D": (lambda t: t[0], "should also be 3-D but got 2-D"),
    "4-D": (lambda t: t[None], "should also be 3-D but got 4-D"),
    "smaller batch": (lambda t: t[:, :4], r"size \(1, 5, .\), got \[1, 4, .\]"),
    "batch to broadcast": (lambda t: t[:, :1], r"size \(1, 5, .\), got \[1, 1, .\]"),
    "more layers": (lambda t: torch.cat([t, t]), r"size \(1, 5, .\), got \[2, 5, .\]"),
    "narrower": (lambda t: t[..., :-1], r"size \(1, 5, .\), got \[1, 5, .\]"),
    "float64": (lambda t: t.double(), r"\(torch.float32\) does not match hx dtype \(torch.float64"),
    "integers": (lambda t: t.long(), "needs floating point, got input torch.float32 and hidden.* torch.int64"),
    "elsewhere": (lambda t: t.to("meta"), "got input on cpu and hidden.* on meta"),
    "no tensor": (lambda t: "h", "hx must be a"),
}


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("case", BAD_STATES)
@pytest.mark.parametrize("cell", CELLS)
def test_bad_state(cell, case, form):
    spoil, message = BAD_STATES[case]
    twin = torch_module(cell, I, H)
    x, hx = X if form == "padded" else packed(X, [3, 1, 2, 3, 1]), initial_state(twin, B)
    spoilt = [mapped(spoil, hx)]
    if twin.mode == "LSTM":
        spoilt = [(spoil(hx[0]), hx[1]), (hx[0], spoil(hx[1]))]
    for state in spoilt:
        if form == "padded" and case != "integers":
            assert_torch_refuses(twin, x, state)
        with pytest.raises(InvalidInput, match=message):
            ours(twin, "reference")(x, state)


@pytest.mark.parametrize("cell", CELLS)
def test_bad_state_for_unbatched_input(cell):
    twin = torch_module(cell, I, H)
    hx = initial_state(twin, B)
    for module, error in ((twin, RuntimeError), (ours(twin, "reference"), InvalidInput)):
        with pytest.raises(error, match=r"For unbatched 2-D input, .* should also be 2-D but got .*3-D"):
            module(X[:, 0], hx)


@pytest.mark.parametrize("cell, wrap, got", [
    ("gru", lambda h, c: (h,), "must be a Tensor, got tuple"),
    ("lstm", lambda h, c: h, r"must be a pair \(h_0, c_0\) of Tensors, got Tensor"),
    ("lstm", lambda h, c: torch.stack([h, c]), "got Tensor"),
    ("lstm", lambda h, c: (h,), r"got tuple of \(Tensor\)"),
    ("lstm", lambda h, c: (h, c, c), r"got tuple of \(Tensor, Tensor, Tensor\)"),
    ("lstm", lambda h, c: (h, None), r"got tuple of \(Tensor, NoneType\)"),
])  # fmt: skip
def test_state_of_the_wrong_kind(cell, wrap, got):
    for twin, x, lead in ((torch_module(cell, I, H), X, (1, B)), (SINGLE[cell][0](I, H), X[0], (B,))):
        state = wrap(torch.zeros(*lead, H), torch.zeros(*lead, H))
        assert_torch_refuses(twin, x, state)
        with pytest.raises(InvalidInput, match=got):
            ours(twin, "reference")(x, state)


BAD_STEPS = {
    "0-D": (X[0, 0, 0], None, "1D or 2D, got 0D"),
    "3-D": (X, None, "1D or 2D, got 3D"),
    "too narrow": (X[0, :, :3], None, "Expected 4, got 3"),
    "float64": (X[0].double(), None, r"input dtype \(torch.float64\) does not match weight dtype"),
    "integers": (X[0].long(), None, "needs floating point, got input torch.int64"),
    "elsewhere": (X[0].to("meta"), None, "got input on meta"),
    "None": (None, None, "a Tensor, got NoneType"),
    "3-D state": (X[0], torch.zeros(1, B, H), r"size \(5, 7\), got \[1, 5, 7\]"),
    "unbatched state": (X[0], torch.zeros(H), r"size \(5, 7\), got \[7\]"),
    "batched state": (X[0, 0], torch.zeros(1, H), r"size \(7,\), got \[1, 7\]"),
    "smaller batch": (X[0], torch.zeros(4, H), r"size \(5, 7\), got \[4, 7\]"),
    "batch to broadcast": (X[0], torch.zeros(1, H), r"size \(5, 7\), got \[1, 7\]"),
    "narrower state": (X[0], torch.zeros(B, 6), r"size \(5, 7\), got \[5, 6\]"),
    "float64 state": (X[0], torch.zeros(B, H).double(), r"does not match hx dtype \(torch.float64"),
    "state elsewhere": (X[0], torch.zeros(B, H, device="meta"), "got input on cpu and hidden.* on meta"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
@pytest.mark.parametrize("cell", SINGLE)
def test_bad_step(cell, case):
    x, h, message = BAD_STEPS[case]
    kind, options = SINGLE[cell]
    twin = kind(I, H, **options)
    hx = (h, h) if cell == "lstm" and h is not None else h
    assert_torch_refuses(twin, x, hx)
    with pytest.raises(InvalidInput, match=message):
        ours(twin, "reference")(x, hx)


# --- weights, and what torch.nn has no counterpart of --------------------------------------------------------------


def run(weights=None, cell="lstm", x=X, **keywords):
    module = torch_module(cell, I, H)
    weights = module._flat_weights if weights is None else weights(*module._flat_weights)
    return getattr(functional, cell.partition("_")[0])(x, None, weights, **{"backend": "reference", **keywords})


@pytest.mark.parametrize("weights, message", [
    (lambda *w: [], r"expected 4 weights \(1 layers x 1 directions x w_ih, w_hh, b_ih, b_hh\), got 0"),
    (lambda *w: w[:3], "expected 4 weights .*, got 3"),
    (lambda *w: (*w, *w), "expected 4 weights .*, got 8"),
    (lambda i, h, *b: (i, h, b[0], None), "weights must be Tensors, got NoneType"),
    (lambda i, h, *b: (i[0, 0], h, *b), r"w_ih must be \[28, input_size\], got \[\]"),
    (lambda i, h, *b: (i[0], h, *b), r"w_ih must be \[28, input_size\], got \[4\]"),
    (lambda i, h, *b: (i[:27], h, *b), r"needs w_ih \[28, 4\], got \[27, 4\]"),
    (lambda i, h, *b: (i, h[:, 0], *b), r"w_hh must be \[4 \* hidden_size, .*\], got \[28\]"),
    (lambda i, h, *b: (i, h[:27], *b), r"w_hh must be \[4 \* hidden_size, .*\], got \[27, 7\]"),
    (lambda i, h, *b: (i, h[:, :6], *b), r"w_hh must be \[28, 7\], got \[28, 6\]"),
    (lambda i, h, *b: (i, h, b[0][:27], b[1]), r"needs b_ih \[28\], got \[27\]"),
    (lambda i, h, *b: (i, h, *b, h[:3]), r"needs w_hr \[7, 7\], got \[3, 7\]"),
    (lambda i, h, *b: (i, h, b[0].double(), b[1]), r"weight dtype \(torch.float64, b_ih of layer 0\)"),
    (lambda i, h, *b: (i, h, b[0].to("meta"), b[1]), "got input on cpu and b_ih of layer 0 on meta"),
])  # fmt: skip
def test_bad_weights(weights, message):
    with pytest.raises(InvalidInput, match=message):
        run(weights)


@pytest.mark.parametrize("keywords, message", [
    ({"num_layers": 0}, "num_layers must be greater than zero, got 0"),
    ({"num_layers": 2}, "expected 8 weights .*, got 4"),
    ({"bidirectional": True}, "expected 8 weights .* 2 directions .*, got 4"),
    ({"bias": False}, "expected 2 weights .*, got 4"),
    ({"dropout": 1.5}, "has to be between 0 and 1, but got 1.5"),
    ({"dropout": -0.5}, "has to be between 0 and 1, but got -0.5"),
    ({"backend": "cudnn"}, "unknown backend: got 'cudnn', allowed are 'auto', 'triton', 'aten', 'reference'"),
    ({"cell": "rnn", "nonlinearity": "selu"}, "unknown nonlinearity: got 'selu', allowed are 'tanh' and 'relu'"),
])  # fmt: skip
def test_bad_options(keywords, message):
    if keywords.get("cell") == "rnn":
        with pytest.raises(InvalidInput, match=message):
            functional.rnn(X, None, [], nonlinearity=keywords["nonlinearity"])
    else:
        with pytest.raises(InvalidInput, match=message):
            run(**keywords)


@pytest.mark.parametrize("lengths, message", [
    (torch.ones(B), "must be integers, got torch.float32"),
    (torch.ones(B, dtype=torch.bool), "must be integers, got torch.bool"),
    ("long", "must be integers, got 'long'"),
    (torch.tensor(3), r"must be \[5\], one a sequence, got \[\]"),
    (torch.ones(B - 1, dtype=torch.long), r"must be \[5\], one a sequence, got \[4\]"),
    (torch.ones(B, 1, dtype=torch.long), r"must be \[5\], one a sequence, got \[5, 1\]"),
    (torch.tensor([1, 2, 3, 4, 0]), "must lie in 0 … 3, got 0 … 4"),
    (torch.tensor([1, 2, 3, 1, -1]), "must lie in 0 … 3, got -1 … 3"),
    (torch.ones(B, dtype=torch.long, device="meta"), "on the CPU or the input's device cpu, got meta"),
])  # fmt: skip
def test_bad_lengths(lengths, message):
    with pytest.raises(InvalidInput, match=message):
        run(lengths=lengths)


@pytest.mark.parametrize("reset, message", [
    (torch.ones(T, B), r"must be bool of shape \[3, 5\], got torch.float32 \[3, 5\]"),
    (torch.ones(B, T, dtype=torch.bool), r"must be bool of shape \[3, 5\], got torch.bool \[5, 3\]"),
    (torch.ones(B, dtype=torch.bool), r"must be bool of shape \[3, 5\], got torch.bool \[5\]"),
    (torch.ones(T, B, dtype=torch.bool, device="meta"), "on the input's device cpu, got meta"),
    ([[True] * B] * T, "must be a bool Tensor, got list"),
])  # fmt: skip
def test_bad_reset(reset, message):
    with pytest.raises(InvalidInput, match=message):
        run(reset=reset)
    if isinstance(reset, torch.Tensor) and reset.dim() == 2:
        allowed = r"must be bool of shape \[5, 3\]|on the input's device"
        with pytest.raises(InvalidInput, match=allowed):
            run(x=X.transpose(0, 1), batch_first=True, reset=reset.T)


@pytest.mark.parametrize("mask", [{"lengths": torch.ones(B).long()}, {"reset": torch.zeros(T, B).bool()}], ids=list)
def test_masks_need_a_padded_batch(mask):
    with pytest.raises(InvalidInput, match="go with a padded batch, got a PackedSequence"):
        run(x=packed(X, [3, 2, 1, 1, 1]), **mask)
    with pytest.raises(InvalidInput, match="need a batched 3-D input, got 2-D"):
        run(x=X[:, 0], **mask)


@pytest.mark.parametrize("cell", SINGLE)
def test_bad_weights_of_a_step(cell):
    kind, options = SINGLE[cell]
    module = kind(I, H, **options)
    step = getattr(functional, f"{cell.partition('_')[0]}_cell")
    with pytest.raises(InvalidInput, match="both biases or neither, got only b_ih"):
        step(X[0], None, module.weight_ih, module.weight_hh, module.bias_ih)
    with pytest.raises(InvalidInput, match="w_hh must be"):
        step(X[0], None, module.weight_ih, module.weight_hh[:, :3])
    with pytest.raises(InvalidInput, match="unknown backend: got 'cudnn'"):
        step(X[0], None, module.weight_ih, module.weight_hh, backend="cudnn")


def test_autocast_does_not_join_float64_to_other_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        run(x=X.half())
        with pytest.raises(InvalidInput, match=r"\(torch.float64\) does not match weight dtype \(torch.float32"):
            run(x=X.double())


# --- backends that cannot serve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_triton_on_a_cpu_says_what_it_needs(name, dtype):
    module = getattr(seqcore.nn, name)(I, H, dtype=dtype, backend="triton")
    with pytest.raises(UnsupportedInput, match=r"needs a GPU, got cpu tensors; .* set TRITON_INTERPRET=1") as raised:
        module(X[0].to(dtype))
    assert "Pass backend='auto'" in str(raised.value) and "reference: can" in str(raised.value)
    assert ("needs float32, float16 or bfloat16, got torch.float64" in str(raised.value)) == (dtype == torch.float64)


@pytest.mark.parametrize("mask", [{"lengths": torch.ones(B).long()}, {"reset": torch.zeros(T, B).bool()}], ids=list)
def test_aten_has_no_masks(mask):
    with pytest.raises(
        UnsupportedInput, match=f"backend 'aten' cannot serve this lstm: torch's lstm has no {next(iter(mask))}"
    ):
        run(backend="aten", **mask)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_backend_in_force_is_refused_as_one_by_name_is(name):
    module = getattr(seqcore.nn, name)(I, H)
    with seqcore.use_backend("triton"), pytest.raises(UnsupportedInput, match="needs a GPU"):
        module(X[0])


def test_errors_are_of_the_kinds_torch_raises():
    """Code that catches what torch.nn raises for the same mistakes goes on working."""
    assert issubclass(InvalidInput, ValueError) and issubclass(InvalidInput, RuntimeError)
    assert issubclass(UnsupportedInput, NotImplementedError)
