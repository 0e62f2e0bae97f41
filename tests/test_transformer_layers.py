"""seqcore.nn.MultiheadAttention inside torch's Transformer layers, which have ways past a module's forward."""

import copy

import pytest
import torch
from torch import Tensor, nn

import seqcore
from seqcore import functional
from seqcore.testing.budget import assert_within_budget

from .attention_twins import doubled
from .comparisons import assert_equal_in_float64, assert_within
from .transformer_twins import causal_mask, layer_results, may_not, swapped

BACKENDS = ["aten", "auto"]
MISMATCHED = pytest.mark.filterwarnings("ignore:Support for mismatched .*key_padding_mask:UserWarning")
B, S, T, E = 2, 5, 3, 8


@pytest.fixture
def calls(monkeypatch):
    """How often our forward ran."""
    counted, forward = [], seqcore.nn.MultiheadAttention.forward

    def counting(self, *arguments, **keywords):
        counted.append(self.backend)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(seqcore.nn.MultiheadAttention, "forward", counting)
    return counted


LAYERS = {
    "encoder": lambda **options: nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, **options),
    "decoder": lambda **options: nn.TransformerDecoderLayer(E, 2, 16, dropout=0.0, **options),
}


def encoder(**options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(LAYERS["encoder"](**options), 2, nn.LayerNorm(E), enable_nested_tensor=False)


def decoder(**options) -> nn.TransformerDecoder:
    return nn.TransformerDecoder(LAYERS["decoder"](**options), 2, nn.LayerNorm(E))


def transformer(**options) -> nn.Transformer:
    return nn.Transformer(E, 2, custom_encoder=encoder(**options), custom_decoder=decoder(**options), **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "norm_first": True}], ids=["", "first"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformer_layers_with_gradients(backend, kind, options, training, calls):
    theirs = LAYERS[kind](**options).double().train(training)
    given = torch.randn(1 if kind == "encoder" else 2, T, T, E, dtype=torch.float64)
    causal = causal_mask(T, torch.float64)
    masks = (
        {"src_mask": causal, "is_causal": True} if kind == "encoder" else {"tgt_mask": causal, "tgt_is_causal": True}
    )
    module = swapped(theirs, backend)
    assert_equal_in_float64(layer_results(module, *given, **masks), layer_results(theirs, *given, **masks))
    assert len(calls) == (1 if kind == "encoder" else 2)


def padding(*lengths: int) -> Tensor:
    """True past each sequence's length."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


# The model, how often it attends, and its masks, in float32.
MODELS = {
    "encoder": (encoder, 2, lambda: {}),
    "encoder, mask": (encoder, 2, lambda: {"mask": may_not(S, S)}),
    "encoder, causal mask to detect": (encoder, 2, lambda: {"mask": causal_mask(S)}),
    "encoder, causal": (encoder, 2, lambda: {"mask": causal_mask(S), "is_causal": True}),
    "encoder, padding": (encoder, 2, lambda: {"src_key_padding_mask": padding(S, 3)}),
    "encoder, causal and padding": (
        encoder, 2, lambda: {"mask": causal_mask(S), "src_key_padding_mask": padding(S, 3), "is_causal": True}
    ),
    "decoder": (decoder, 4, lambda: {}),
    "decoder, causal": (decoder, 4, lambda: {"tgt_mask": causal_mask(T), "memory_key_padding_mask": padding(S, 2)}),
    "decoder, masks": (
        decoder, 4,
        lambda: {
            "tgt_mask": causal_mask(T), "tgt_key_padding_mask": padding(2, T), "memory_mask": may_not(T, S),
            "memory_key_padding_mask": padding(S, 2), "tgt_is_causal": True,
        },
    ),
    "transformer": (transformer, 6, lambda: {"tgt_mask": causal_mask(T), "tgt_is_causal": True}),
    "transformer, masks": (
        transformer, 6,
        lambda: {
            "src_mask": may_not(S, S), "tgt_mask": causal_mask(T), "memory_mask": may_not(T, S),
            "src_key_padding_mask": padding(4, S), "tgt_key_padding_mask": padding(T, 2),
            "memory_key_padding_mask": padding(4, S),
        },
    ),
}  # fmt: skip


def model_case(name: str, batch_first: bool, device: torch.device):
    """Torch's model, how often it attends, its inputs and its masks."""
    make, count, masks = MODELS[name]
    torch.manual_seed(0)
    lengths = {"encoder": (S,), "decoder": (T, S), "transformer": (S, T)}[name.split(",")[0]]
    given = [torch.randn((B, length, E) if batch_first else (length, B, E)).to(device) for length in lengths]
    on_device = {name: mask if mask is True else mask.to(device) for name, mask in masks().items()}
    return make(batch_first=batch_first).to(device), count, given, on_device


@MISMATCHED
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "backend, training",
    [("auto", True), ("auto", False), ("reference", True), pytest.param("triton", True, marks=pytest.mark.kernels)],
)
def test_models_with_gradients(backend, training, name, calls, device):
    theirs, count, given, masks = model_case(name, training, device)
    theirs.train(training)
    double, doubles = copy.deepcopy(theirs).double(), [t.double() for t in given]
    masks_double = {name: doubled(mask) for name, mask in masks.items()}
    exact = layer_results(double, *doubles, **masks_double)
    if backend == "triton":
        actual, eager = (layer_results(model, *given, **masks) for model in (swapped(theirs, backend), theirs))
        assert_within(actual, exact, eager)
    else:
        assert_equal_in_float64(layer_results(swapped(double, backend), *doubles, **masks_double), exact)
    assert calls == [backend] * count


@MISMATCHED
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=pytest.mark.kernels)])
@torch.no_grad()
def test_models_that_evaluate_without_gradients(backend, name, calls, device):
    """Batch first, in evaluation, without gradients: all that torch's fast path asks for."""
    theirs, count, given, masks = model_case(name, True, device)
    actual = swapped(theirs.eval(), backend)(*given, **masks)
    assert calls == [backend] * count
    eager = theirs(*given, **masks)
    exact = copy.deepcopy(theirs).double()(*(t.double() for t in given), **{n: doubled(m) for n, m in masks.items()})
    # Of what stands on padding torch's fast path makes something else.
    real = ~masks.get("src_key_padding_mask", torch.zeros(B, S, dtype=torch.bool)) if "encoder" in name else ...
    assert_within_budget(actual[real], exact[real], eager[real])


@MISMATCHED
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_causal_mask_is_detected_and_not_read(training, padded, monkeypatch):
    given, attention = [], functional.attention

    def recording(*tensors, **options):
        given.append(options)
        return attention(*tensors, **options)

    monkeypatch.setattr(functional, "attention", recording)
    masks = {"src_key_padding_mask": padding(S, 3)} if padded else {}
    model = swapped(encoder(batch_first=True).train(training), "auto")
    with torch.set_grad_enabled(training):
        model(torch.randn(B, S, E), mask=causal_mask(S), **masks)
    assert [options["causal"] for options in given] == ["top_left"] * 2
    shapes = {None if o["attn_mask"] is None else tuple(o["attn_mask"].shape) for o in given}
    assert shapes == {(B, 1, 1, S) if padded else None}


@pytest.mark.parametrize("options", [{"rotary": True}, {"alibi": True}], ids=["rotary", "alibi"])
@pytest.mark.parametrize("backend", ["aten", "auto"])
@torch.no_grad()
def test_the_fast_path_does_not_pass_positions_by(backend, options, calls):
    theirs = encoder(batch_first=True).eval()
    module, x = swapped(theirs, backend, **options), torch.randn(B, S, E)
    if options == {"alibi": True} and backend == "aten":
        with pytest.raises(seqcore.UnsupportedInput, match="has no alibi_slopes"):
            module(x)
        return
    assert not torch.allclose(module(x), theirs(x), atol=1e-2)
    assert len(calls) == 2
    # What torch's layer gives when it evaluates is what it gives when it trains.
    assert torch.equal(module(x), module.train()(x))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_fast_path_of_evaluation_does_not_pass_us_by(backend, padded, calls):
    theirs = LAYERS["encoder"](batch_first=True).eval()
    module, x = swapped(theirs, backend), torch.randn(3, 4, 8)
    mask = torch.arange(4) > torch.tensor([[3], [0], [2]]) if padded else None
    with torch.no_grad():
        actual = module(x, src_key_padding_mask=mask)
        assert calls == [backend]
        eager = theirs(x, src_key_padding_mask=mask)
        exact = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=mask)
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


def test_an_encoder_made_of_our_layers_makes_no_nested_tensors():
    layer = swapped(LAYERS["encoder"](batch_first=True), "auto")
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        encoder = nn.TransformerEncoder(layer, 2).eval()
    assert not encoder.use_nested_tensor
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
