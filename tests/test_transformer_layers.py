"""seqcore.nn.MultiheadAttention inside torch's Transformer layers, which have ways past a module's forward."""

import copy

import pytest
import torch
from torch import Tensor, nn

import seqcore
from seqcore.testing.budget import assert_within_budget

from .attention_twins import Results, assert_equal_in_float64, cotangents

BACKENDS = ["aten", "auto"]


@pytest.fixture
def calls(monkeypatch):
    """How often our forward ran."""
    counted, forward = [], seqcore.nn.MultiheadAttention.forward

    def counting(self, *arguments, **keywords):
        counted.append(self.backend)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(seqcore.nn.MultiheadAttention, "forward", counting)
    return counted


def swapped(layer: nn.Module, backend: str) -> nn.Module:
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = seqcore.nn.MultiheadAttention
            module.backend = backend
    return layer


def layer_results(layer: nn.Module, *given: Tensor, **keywords) -> Results:
    leaves = [t.detach().requires_grad_() for t in given]
    out = layer(*leaves, **keywords)
    wanted = [*leaves, *layer.parameters()]
    gradients = torch.autograd.grad(out, wanted, cotangents([out]))
    return {"out": out} | {f"gradient {i}": g for i, g in enumerate(gradients)}


LAYERS = {
    "encoder": lambda **options: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options),
    "decoder": lambda **options: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, **options),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "norm_first": True}], ids=["", "first"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformer_layers_with_gradients(backend, kind, options, training, calls):
    theirs = LAYERS[kind](**options).double().train(training)
    given = torch.randn(1 if kind == "encoder" else 2, 3, 3, 8, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    masks = (
        {"src_mask": causal, "is_causal": True} if kind == "encoder" else {"tgt_mask": causal, "tgt_is_causal": True}
    )
    module = swapped(theirs, backend)
    assert_equal_in_float64(layer_results(module, *given, **masks), layer_results(theirs, *given, **masks))
    assert len(calls) == (1 if kind == "encoder" else 2)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_fast_path_of_evaluation_does_not_pass_us_by(backend, padded, calls):
    theirs = LAYERS["encoder"](batch_first=True).eval()
    module, x = swapped(theirs, backend), torch.randn(3, 4, 8)
    padding = torch.arange(4) > torch.tensor([[3], [0], [2]]) if padded else None
    with torch.no_grad():
        actual = module(x, src_key_padding_mask=padding)
        assert calls == [backend]
        eager = theirs(x, src_key_padding_mask=padding)
        exact = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=padding)
    assert_within_budget(actual, exact, eager)


def test_the_fast_path_is_torchs_own_under_aten(calls):
    theirs = LAYERS["encoder"](batch_first=True).eval()
    module, x = swapped(theirs, "aten"), torch.randn(3, 4, 8)
    with torch.no_grad():
        assert torch.equal(module(x), theirs(x))
        assert not calls
        with seqcore.use_backend("aten"):
            assert torch.equal(swapped(theirs, None)(x), theirs(x))
        assert not calls


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_whole_transformer(backend, calls):
    theirs = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    with torch.no_grad():
        actual, eager = (m(source, target, tgt_mask=mask) for m in (swapped(theirs, backend), theirs))
        exact = copy.deepcopy(theirs).double()(source.double(), target.double(), tgt_mask=mask.double())
    assert_within_budget(actual, exact, eager)
    assert len(calls) == 6


def test_an_encoder_made_of_our_layers_makes_no_nested_tensors():
    layer = swapped(LAYERS["encoder"](batch_first=True), "auto")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        out = encoder(torch.randn(2, 4, 8), src_key_padding_mask=padding)
    assert not out.is_nested and out.isfinite().all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_the_way_out():
    encoder = nn.TransformerEncoder(LAYERS["encoder"](batch_first=True), 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        encoder = swapped(encoder, "auto")
        with pytest.raises(seqcore.InvalidInput, match="use_nested_tensor"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        actual = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding])
