"""seqcore.nn.MultiheadAttention against torch's, flag by flag."""

import copy
import pickle

import pytest
import torch
from torch import nn

import seqcore
from seqcore.testing.budget import assert_within_budget

from .attention_twins import doubled
from .comparisons import assert_within
from .transformer_twins import (
    HEADS,
    B,
    E,
    M,
    N,
    additive,
    assert_like_torch,
    inputs,
    may_not,
    results,
    swapped,
    torch_module,
)

INFINITY = float("inf")
BACKENDS = ["aten", "reference", "auto"]
OURS = ["reference", "auto"]
SERVING = [*OURS, pytest.param("triton", marks=pytest.mark.kernels)]

FLAGS = {
    "plain": {},
    "bias": {"bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "kdim": {"kdim": 4},
    "vdim": {"vdim": 5},
    "batch_first": {"batch_first": True},
    "dropout": {"dropout": 0.5},
    "one head": {"num_heads": 1},
    "all": {"bias": False, "add_bias_kv": True, "add_zero_attn": True, "kdim": 4, "vdim": 5, "batch_first": True},
}
WEIGHTS = {
    "no weights": {"need_weights": False},
    "averaged": {"need_weights": True},
    "per head": {"need_weights": True, "average_attn_weights": False},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("backend", SERVING)
def test_every_constructor_flag(backend, flags, weights, device):
    theirs = torch_module(**flags).to(device)
    assert_like_torch(theirs, backend, inputs(theirs), **weights)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_aten_is_torchs_own_to_the_last_bit(flags):
    theirs = torch_module(**flags)
    given, padding = inputs(theirs), may_not(B, N)
    actual, expected = (results(m, given, key_padding_mask=padding) for m in (swapped(theirs, "aten"), theirs))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("weights", [WEIGHTS["no weights"], WEIGHTS["averaged"]], ids=["no weights", "averaged"])
@pytest.mark.parametrize("flags", [{}, {"batch_first": True}], ids=["", "batch_first"])
@pytest.mark.parametrize("kind", ["self", "memory", "unbatched"])
@pytest.mark.parametrize("backend", OURS)
def test_every_way_to_call_it(backend, kind, flags, weights):
    theirs = torch_module(**flags)
    assert_like_torch(theirs, backend, inputs(theirs, kind), **weights)


def masks(mask, padding, batch=B):
    """The keywords for one of each kind of mask; None for none."""
    shapes = {"2-D": (M, N), "3-D": (batch * HEADS, M, N)}
    padded = (N,) if batch == 1 else (batch, N)
    found = {
        "attn_mask": mask and (may_not if "bool" in mask else additive)(*shapes[mask[:3]]),
        "key_padding_mask": padding and (may_not if padding == "bool" else additive)(*padded),
    }
    return {name: value for name, value in found.items() if value is not None}


KINDS_OF_MASK = [
    ("2-D bool", None),
    ("2-D float", None),
    ("3-D bool", None),
    ("3-D float", None),
    (None, "bool"),
    (None, "float"),
    ("2-D bool", "bool"),
    ("3-D float", "float"),
]


@pytest.mark.parametrize("weights", [{"need_weights": False}, {"need_weights": True}], ids=["no weights", "weights"])
@pytest.mark.parametrize("mask, padding", KINDS_OF_MASK)
@pytest.mark.parametrize("backend", SERVING)
def test_masks(backend, mask, padding, weights, device):
    theirs = torch_module().to(device)
    given = {name: value.to(device) for name, value in masks(mask, padding).items()}
    assert_like_torch(theirs, backend, inputs(theirs), **given, **weights)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("mask, padding", [("2-D bool", "float"), ("3-D float", "bool")])
@pytest.mark.parametrize("backend", OURS)
def test_masks_of_two_kinds_join(backend, mask, padding):
    theirs = torch_module()
    assert_like_torch(theirs, backend, inputs(theirs), **masks(mask, padding))


@pytest.mark.parametrize("mask, padding", [("2-D bool", "bool"), ("3-D float", "float")])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_masks_with_extra_keys_and_no_batch(backend, weights, mask, padding):
    theirs = torch_module(add_bias_kv=True, add_zero_attn=True)
    assert_like_torch(theirs, backend, inputs(theirs, "unbatched"), **masks(mask, padding, batch=1), **weights)


@pytest.mark.parametrize("padding", [None, "float"])
@pytest.mark.parametrize("weights", [WEIGHTS["no weights"], WEIGHTS["averaged"]], ids=["no weights", "averaged"])
@pytest.mark.parametrize("flags", [{}, {"add_bias_kv": True}], ids=["", "add_bias_kv"])
@pytest.mark.parametrize("backend", OURS)
def test_is_causal(backend, flags, weights, padding):
    theirs = torch_module(**flags)
    x, mask = inputs(theirs, "self"), nn.Transformer.generate_square_subsequent_mask(M)
    padding = {"key_padding_mask": additive(B, M)} if padding else {}
    assert_like_torch(theirs, backend, x, attn_mask=mask, is_causal=True, **padding, **weights)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("mode", ["float32", "half", "autocast"])
def test_lower_precision_is_as_exact_as_torchs(mode, weights):
    theirs = torch_module(embed_dim=24)
    given = [torch.randn(rows, 4, 24) for rows in (33, 17, 17)]
    if mode == "half":
        theirs, given = theirs.half(), [t.half() for t in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        actual, eager = (results(module, given, **weights) for module in (swapped(theirs, "reference"), theirs))
    exact = results(copy.deepcopy(theirs).double(), [t.double() for t in given], **weights)
    assert_within(actual, exact, eager)


@pytest.mark.parametrize("weights", [WEIGHTS["no weights"], WEIGHTS["averaged"]], ids=["no weights", "averaged"])
@pytest.mark.parametrize("flags", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["", "extra keys"])
@pytest.mark.parametrize("backend", OURS)
def test_autocast_gives_torchs_dtypes(backend, flags, weights):
    theirs = torch_module(**flags)
    given, mask = inputs(theirs), torch.randn(M, N)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = (results(m, given, attn_mask=mask, **weights) for m in (swapped(theirs, backend), theirs))
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in expected.items()}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("backend", ["reference", "auto", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_sequence_of_padding_alone_gives_zeros_and_finite_gradients(backend, weights, kind, device):
    module = swapped(torch_module(), backend).to(device)
    padding = torch.zeros(B, N, dtype=torch.bool, device=device)
    padding[1] = True
    if kind == "float":
        padding = torch.zeros(B, N, device=device).masked_fill(padding, -INFINITY)
    found = results(module, inputs(module), key_padding_mask=padding, **weights)
    torch.testing.assert_close(found["out"][:, 1], module.out_proj.bias.expand(M, E))
    assert "weights" not in found or not found["weights"][1].any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_the_same_seed_makes_the_same_parameters(flags):
    flags = {"embed_dim": E, "num_heads": HEADS} | flags
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(**flags)
    torch.manual_seed(3)
    module = seqcore.nn.MultiheadAttention(**flags)
    assert list(module.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(4)
    theirs._reset_parameters()
    torch.manual_seed(4)
    module._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_state_dicts_load_both_ways(flags):
    theirs = torch_module(**flags)
    module = seqcore.nn.MultiheadAttention(**{"embed_dim": E, "num_heads": HEADS} | flags)
    module.load_state_dict(theirs.state_dict())
    back = torch_module(**flags)
    back.load_state_dict(module.state_dict())
    for parameters in zip(theirs.parameters(), module.parameters(), back.parameters(), strict=True):
        assert all(torch.equal(parameters[0], other) for other in parameters[1:])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_apart(duplicate):
    module = swapped(torch_module(), "reference")
    twin, given = duplicate(module), inputs(module)
    assert type(twin) is seqcore.nn.MultiheadAttention and twin.backend == "reference"
    assert torch.equal(twin(*given)[0], module(*given)[0])
    with torch.no_grad():
        module.in_proj_weight.zero_()
    assert twin.in_proj_weight.any()


def test_the_class_swaps_in_place_and_back():
    module = torch_module()
    before, given = dict(module.named_parameters()), inputs(module)
    expected = module(*given)
    module.__class__ = seqcore.nn.MultiheadAttention
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert module.backend is None and isinstance(module, nn.MultiheadAttention)
    torch.testing.assert_close(module(*given), expected)
    module.__class__ = nn.MultiheadAttention
    assert module._qkv_same_embed_dim
    assert all(torch.equal(a, b) for a, b in zip(module(*given), expected, strict=True))


def test_repr_names_a_backend_of_its_own():
    assert "backend='reference'" in repr(seqcore.nn.MultiheadAttention(E, HEADS, backend="reference"))
    assert "backend" not in repr(seqcore.nn.MultiheadAttention(E, HEADS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_in_training_keeps_the_expectation(backend):
    module = swapped(torch_module(dropout=0.5, batch_first=True), backend)
    query, key, value = (torch.randn(1, rows, E).expand(1000, -1, -1) for rows in (3, 5, 5))
    with torch.no_grad():
        expected, expected_weights = module(query[:1], key[:1], value[:1])
        module.train()
        for found, exact in zip(module(query, key, value), (expected, expected_weights), strict=True):
            deviation = found.std(0) / len(found) ** 0.5
            assert ((found.mean(0) - exact[0]).abs() < 5 * deviation).all()
        assert not torch.equal(module(query, key, value, need_weights=False)[0][0], expected[0])


@pytest.mark.parametrize("flags", [{}, {"add_bias_kv": True}], ids=["", "add_bias_kv"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_weights_returned_are_the_dropped_ones(backend, flags):
    """Values that are rows of the identity, projected by it, let the output show the weights that were used."""
    rows, keys = 5, 7
    identity, options = torch.eye(E), {"dropout": 0.5, "bias": False, "num_heads": 1, "batch_first": True}
    module = swapped(torch_module(**options, **flags), backend).train()
    with torch.no_grad():
        module.in_proj_weight[2 * E :] = identity
        module.out_proj.weight.copy_(identity)
        if flags:
            module.bias_v.copy_(identity[keys])
        value = identity[:keys].expand(B, keys, E)
        out, weights = module(torch.randn(B, rows, E), torch.randn(B, keys, E), value)
    assert (weights == 0).any() and (weights != 0).any()
    torch.testing.assert_close(out[..., : weights.shape[-1]], weights)


@pytest.mark.kernels
def test_the_kernels_drop_what_the_reference_drops(device):
    module = torch_module(dropout=0.5).to(device)
    given, outs = inputs(module), []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        outs.append(swapped(module, backend).train()(*given)[0])
    exact = swapped(module, "reference").double().train()
    torch.manual_seed(3)
    assert_within_budget(outs[0], exact(*[t.double() for t in given])[0], outs[1])
    assert not torch.allclose(outs[0], swapped(module, "triton").eval()(*given)[0])


@pytest.mark.kernels
def test_a_mask_takes_gradients_from_the_kernels(device):
    module, mask = torch_module().to(device), torch.randn(M, N, device=device)
    given = inputs(module)

    def gradient(module, given, mask):
        mask = mask.clone().requires_grad_()
        return torch.autograd.grad(module(*given, attn_mask=mask)[0].square().sum(), mask)[0]

    exact = gradient(swapped(module, "reference").double(), [t.double() for t in given], mask.double())
    eager = gradient(swapped(module, "reference"), given, mask)
    assert_within_budget(gradient(swapped(module, "triton"), given, mask), exact, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_takes_gradients(backend):
    theirs = torch_module().double()
    given, mask = [t.double() for t in inputs(theirs)], torch.randn(M, N, dtype=torch.float64, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(module(*given, attn_mask=mask)[0].square().sum(), mask)
        for module in (swapped(theirs, backend), theirs)
    )
    torch.testing.assert_close(actual, expected)


def wide_mask(*shape):
    """Of float32, in which scores so far below zero keep their differences, and with numbers that float16 has not."""
    mask = additive(*shape) - 300
    mask[3, 2] = 1e6
    return mask


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("padding", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS["no weights"], WEIGHTS["averaged"]], ids=["no weights", "averaged"])
@pytest.mark.parametrize("backend", OURS)
def test_a_float32_mask_of_a_half_module_stays_float32(backend, weights, half, padding):
    """Pytorch issue 191612, in a module. Torch's own returns no weights here: it raises."""
    theirs = torch_module().to(half)
    given, mask = [t.to(half) for t in inputs(theirs)], wide_mask(M, N)
    keywords = {"attn_mask": mask}
    if padding is not None:
        forbidden = may_not(B, N)
        keywords["key_padding_mask"] = forbidden if padding == torch.bool else forbidden * -1e6
    alone, doubles = {"weigh": ("out",), "need_weights": False}, {k: doubled(v) for k, v in keywords.items()}
    actual = results(swapped(theirs, backend), given, **keywords, weigh=("out",), **weights)
    eager = results(theirs, given, **keywords, **alone)
    exact = results(copy.deepcopy(theirs).double(), [t.double() for t in given], **doubles, **alone)
    actual.pop("weights", None)
    assert_within(actual, exact, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", OURS)
def test_a_mask_of_any_dtype_is_taken_for_its_numbers(backend, dtype):
    module = swapped(torch_module(), backend)
    given, mask = inputs(module), additive(M, N).to(dtype)
    found, expected = (results(module, given, attn_mask=m) for m in (mask, mask.float()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
