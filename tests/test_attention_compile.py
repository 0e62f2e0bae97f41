"""Attention in torch.compile(fullgraph=True) and torch.export: one operator in the graph, the same numbers."""

import pytest
import torch
from torch import nn

import seqcore
from seqcore import functional

from .attention_twins import ends, qkv, results
from .comparisons import assert_equal_in_float64
from .compile_twins import Capture

# Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

DOUBLE = {"dtype": torch.float64}
FORWARD, WEIGHTS = "attention_forward", "attention_weights"
B, H, M, N, E = 2, 4, 5, 7, 12


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function, capture=None, **options):
    """``function`` as one graph."""
    return torch.compile(function, backend=capture or Capture(), fullgraph=True, **options)


MASK = torch.linspace(-3, 3, M * N, **DOUBLE).reshape(M, N)
VECTORS = {"sinks": torch.linspace(-1, 1, H, **DOUBLE), "alibi_slopes": torch.linspace(0, 1, H, **DOUBLE)}
LENGTHS = {"query_lengths": torch.tensor([3, 5]), "key_lengths": torch.tensor([7, 2])}
ON_THE_OPERATOR = {
    "plain": {},
    "causal": {"causal": "top_left", "scale": 0.3},
    "bool mask": {"attn_mask": MASK < 1, "return_lse": True},
    "additive mask": {"attn_mask": MASK, "causal": "lower_right"},
    "groups": {"enable_gqa": True},
    "window": {"window": (2, 1), "softcap": 3.0},
    "lengths": {**LENGTHS, "causal": "lower_right"},
    "vectors": VECTORS,
    "gradients of sinks": {"sinks": VECTORS["sinks"].clone().requires_grad_()},
    "gradient of the mask": {"attn_mask": MASK.clone().requires_grad_(), "return_lse": True},
    "gradient of a broadcast mask": {"attn_mask": torch.randn(H, M, 1, **DOUBLE).requires_grad_()},
    "dropout": {"dropout_p": 0.5, "dropout_seed": 3},
    "weights": {"return_lse": True, "return_weights": "average", **VECTORS},
    "everything": {
        **VECTORS, **LENGTHS, "window": (3, None), "causal": "lower_right", "softcap": 2.0, "dropout_p": 0.3,
        "dropout_seed": 3, "attn_mask": MASK.clone().requires_grad_(), "return_lse": True, "enable_gqa": True,
    },
}  # fmt: skip
ON_THE_REFERENCE = {
    "named": {"backend": "reference", "return_lse": True},
}


@pytest.mark.parametrize("name", ON_THE_OPERATOR | ON_THE_REFERENCE)
def test_function_compiles_whole_with_its_backward(name):
    options = (ON_THE_OPERATOR | ON_THE_REFERENCE)[name]
    inputs, capture = qkv(B, H, heads_kv=2 if options.get("enable_gqa") else H, M=M, N=N, **DOUBLE), Capture()
    actual = results(compiled(functional.attention, capture), *inputs, **options)
    assert_equal_in_float64(actual, results(functional.attention, *inputs, **options))
    expected = [FORWARD] * (name in ON_THE_OPERATOR) + [WEIGHTS] * ("return_weights" in options)
    assert capture.forward == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_compiles_to_the_same_bits(dtype):
    inputs = qkv(B, H, dtype=dtype)
    actual = results(compiled(functional.attention), *inputs, return_lse=True, backend="reference")
    expected = results(functional.attention, *inputs, return_lse=True, backend="reference")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


FLAGS = {
    "plain": {},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 4, "vdim": 5, "batch_first": True},
}


def module_and_inputs(flags, backend=None):
    module = seqcore.nn.MultiheadAttention(E, H, backend=backend, **flags, **DOUBLE)
    shapes = ((M, B, E), (N, B, module.kdim), (N, B, module.vdim))
    inputs = [torch.randn(shape, **DOUBLE) for shape in shapes]
    return module, [t.transpose(0, 1) for t in inputs] if module.batch_first else inputs


def module_results(module, function, inputs, **keywords):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, weights = function(*leaves, **keywords)
    loss = out.square().sum() + (0 if weights is None else weights.square().sum())
    wanted = [*leaves, *module.parameters()]
    gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
    found = {"out": out} | ({} if weights is None else {"weights": weights})
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_module_compiles_whole_with_its_backward(flags, weights):
    module, inputs = module_and_inputs(flags)
    capture, padding = Capture(), torch.arange(N).expand(B, N) > torch.tensor([[3], [N]])
    keywords = {"need_weights": weights, "key_padding_mask": padding}
    actual = module_results(module, compiled(module, capture), inputs, **keywords)
    assert_equal_in_float64(actual, module_results(module, module, inputs, **keywords))
    assert capture.forward == [[FORWARD] + [WEIGHTS] * weights]


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_module_compiles_on_a_named_backend(backend):
    module, inputs = module_and_inputs({}, backend)
    capture = Capture()
    actual = module_results(module, compiled(module, capture), inputs)
    assert_equal_in_float64(actual, module_results(module, module, inputs))
    assert capture.forward == [[]]


def test_dropout_compiles_and_draws_anew():
    module, inputs = module_and_inputs({"dropout": 0.5})
    run = compiled(module)
    first, second = run(*inputs)[1], run(*inputs)[1]
    assert not torch.equal(first, second)
    assert (first == 0).any() and (first != 0).any()


def test_a_transformer_layer_compiles_whole():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, **DOUBLE)
    layer.self_attn.__class__ = seqcore.nn.MultiheadAttention
    x, capture = torch.randn(B, M, E, **DOUBLE), Capture()
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            torch.testing.assert_close(compiled(layer, capture)(x), layer(x))
    assert capture.forward == [[FORWARD]] * 2


def test_packed_sequences_compile_whole():
    inputs, capture = qkv(H, heads_kv=2, M=M, N=N, **DOUBLE), Capture()
    options = {"cu_seqlens_q": ends(2, 0, 3), "cu_seqlens_k": ends(3, 2, 2), "causal": "top_left", "enable_gqa": True}
    actual = results(compiled(functional.attention, capture), *inputs, **options)
    assert_equal_in_float64(actual, results(functional.attention, *inputs, **options))
    assert capture.forward == [[FORWARD]]


def test_one_compile_serves_every_length():
    capture = Capture()
    run = compiled(functional.attention, capture, dynamic=True)
    for m, n in ((5, 7), (9, 4), (33, 12), (2, 2)):
        inputs = qkv(B, H, M=m, N=n, **DOUBLE)
        torch.testing.assert_close(run(*inputs), functional.attention(*inputs))
    assert capture.forward == [[FORWARD]]


def test_under_autocast():
    inputs = qkv(B, H)
    with torch.autocast("cpu", torch.bfloat16):
        actual = compiled(functional.attention)(*inputs, return_lse=True)
        expected = functional.attention(*inputs, return_lse=True)
    assert [t.dtype for t in actual] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_export_with_a_dynamic_length():
    class Attend(nn.Module):
        def forward(self, query, key, value):
            return functional.attention(query, key, value, causal="lower_right")

    rows, keys = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("keys", min=2, max=64)
    shapes = ({2: rows}, {2: keys}, {2: keys})
    program = torch.export.export(Attend(), qkv(B, H, **DOUBLE), dynamic_shapes=shapes)
    inputs = qkv(B, H, M=11, N=9, **DOUBLE)
    torch.testing.assert_close(program.module()(*inputs), functional.attention(*inputs, causal="lower_right"))


def test_a_backend_that_cannot_serve_says_so_while_compiling():
    with pytest.raises(Exception, match="cannot serve this attention"):
        compiled(functional.attention)(*qkv(B, H), window=(1, 1), backend="aten")
