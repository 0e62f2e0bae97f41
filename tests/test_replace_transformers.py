"""seqcore's attention in transformers' models, through their own registries: results, training, generation."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import seqcore
from seqcore.integrations.transformers import attention_forward, register

from .attention_twins import qkv
from .comparisons import Results, assert_equal_in_float64, cotangents
from .compile_twins import Capture
from .transformers_models import DECODERS, MODELS, B, T, given, model, transformers


def results(module: nn.Module, inputs: dict[str, Tensor]) -> Results:
    """The logits of what is not padding, the gradients of a weighing of them, and the parameters after a step."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    real = ... if "decoder_input_ids" in inputs else inputs["attention_mask"].bool()
    logits = module(**inputs, use_cache=False).logits[real]
    logits.backward(*cotangents([logits]))
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    optimizer.step()
    stepped = {f"stepped {n}": p.detach().clone() for n, p in module.named_parameters()}
    return {"logits": logits.detach()} | gradients | stepped


@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_results_and_a_step_of_training(name, backend, padded):
    theirs, inputs = model(name), given(name, padded)
    ours = copy.deepcopy(theirs)
    report = seqcore.replace(ours, backend=backend)
    assert report.swapped.keys() == {""} and not report.skipped
    assert_equal_in_float64(results(ours, inputs), results(theirs, inputs))
    report = seqcore.restore(ours)
    assert report.swapped.keys() == {""}
    assert ours.config._attn_implementation == MODELS[name][3]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache(name, cache):
    theirs, inputs = model(name), given("", "left")
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = theirs.generate(**inputs, **options)
    register()
    theirs.set_attn_implementation("seqcore")
    for backend in ("auto", "reference"):
        with seqcore.use_backend(backend):
            assert torch.equal(theirs.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt_oss"])
@torch.no_grad()
def test_weights_are_returned_where_a_model_asks_for_them(name):
    theirs, inputs = model(name), given(name, "")
    theirs.set_attn_implementation("eager")
    ours = copy.deepcopy(theirs)
    seqcore.replace(ours)
    for each in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        actual, expected = (m(**inputs, output_attentions=True).get(each) for m in (ours, theirs))
        assert (actual is None) == (expected is None)
        for i, (a, e) in enumerate(zip(actual or (), expected or (), strict=True)):
            assert_equal_in_float64({f"{each} {i}": a}, {f"{each} {i}": e})


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_dropout_is_torchs_under_the_same_seed(name):
    theirs = model(name).train()
    theirs.config.attention_dropout = 0.5
    for inner in theirs.modules():
        if "Attention" in type(inner).__name__:
            inner.attention_dropout = 0.5
            inner.attn_dropout = nn.Dropout(0.5)
    ours = copy.deepcopy(theirs)
    seqcore.replace(ours)

    def seeded(module, training=True):
        torch.manual_seed(1)
        return {"logits": module.train(training)(**given(name, "")).logits}

    assert_equal_in_float64(seeded(ours), seeded(theirs))
    assert not torch.equal(seeded(ours)["logits"], seeded(ours, training=False)["logits"])


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_masks_of_four_dimensions_are_taken_as_they_are(name, kind):
    theirs, inputs = model(name), given(name, "")
    mask = torch.rand(B, 1, T, T) < 0.6
    mask[..., 0] = True
    masks = {"bool": mask, "additive": torch.randn(B, 1, T, T, dtype=torch.float64)}
    inputs["decoder_attention_mask" if name == "t5" else "attention_mask"] = masks[kind]
    ours = copy.deepcopy(theirs)
    seqcore.replace(ours, backend="reference")
    actual, expected = ({"logits": m(**inputs, use_cache=False).logits} for m in (ours, theirs))
    assert_equal_in_float64(actual, expected)


# --- replace and restore -------------------------------------------------------------------------------------------


def test_models_inside_a_model_and_what_each_of_them_had():
    tagger = nn.ModuleDict({"words": model("t5"), "tags": nn.LSTM(16, 8)})
    tagger["words"].encoder.set_attn_implementation("eager")
    report = seqcore.replace(tagger)
    assert report.swapped == {
        "tags": "torch.nn.LSTM -> seqcore.nn.LSTM",
        "words": "T5ForConditionalGeneration's attention: sdpa -> seqcore",
    }
    parts = tagger["words"], tagger["words"].encoder, tagger["words"].decoder
    assert [part.config._attn_implementation for part in parts] == ["seqcore"] * 3
    assert seqcore.replace(tagger).skipped["words"] == "T5ForConditionalGeneration's attention: seqcore already"
    report = seqcore.restore(tagger, lambda name, _: name == "words")
    assert report.swapped == {"words": "T5ForConditionalGeneration's attention: seqcore -> sdpa"}
    assert [part.config._attn_implementation for part in parts] == ["sdpa", "eager", "sdpa"]
    assert not seqcore.restore(tagger, lambda name, _: name == "words").swapped
    assert not seqcore.replace(tagger, lambda name, _: name == "nothing").swapped


def test_restore_knows_what_was_before_several_replacements():
    module = model("bert")
    for backend in (None, "reference"):
        seqcore.replace(module, backend=backend)
    assert module.config._attn_implementation == "seqcore_reference"
    assert seqcore.restore(module).swapped == {"": "BertForMaskedLM's attention: seqcore_reference -> sdpa"}


def test_restore_leaves_what_was_chosen_since():
    module = model("bert")
    seqcore.replace(module)
    module.set_attn_implementation("eager")
    assert not seqcore.restore(module).swapped and module.config._attn_implementation == "eager"


def test_restore_says_that_a_model_was_made_with_seqcores_attention():
    register()
    module = model("bert")
    module.set_attn_implementation("seqcore_reference")
    skipped = seqcore.restore(module).skipped
    assert "seqcore_reference, and no other before it; call set_attn_implementation('sdpa')" in skipped[""]


def test_models_that_always_give_weights_are_skipped():
    module = model("bert")
    module.set_attn_implementation("eager")
    module.config.output_attentions = True
    assert "config.output_attentions" in seqcore.replace(module).skipped[""]


def test_models_that_do_not_go_through_the_registry_are_skipped():
    module = transformers.BloomModel(transformers.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    assert seqcore.replace(module).skipped == {
        "": "BloomModel's attention: does not go through transformers' AttentionInterface"
    }
    assert not seqcore.restore(module).swapped


def test_replace_leaves_a_registration_of_ones_own_alone():
    register("seqcore", backend="reference")
    module = model("bert")
    seqcore.replace(module)
    registered = transformers.AttentionInterface()["seqcore"]
    register()
    assert registered.keywords == {"backend": "reference"}
    seqcore.restore(module)


def test_a_backend_by_name_and_paged_caches_raise():
    module = model("gemma2")
    seqcore.replace(module, backend="aten")
    with pytest.raises(seqcore.UnsupportedInput, match="torch's attention has no softcap"):
        module(**given("gemma2", ""))
    with pytest.raises(seqcore.InvalidInput, match="unknown backend"):
        register("other", backend="cudnn")
    with pytest.raises(seqcore.UnsupportedInput, match="paged caches"):
        attention_forward(None, *qkv(2, 2), None, cache=object())


def test_aten_serves_position_biases_with_causality():
    theirs, inputs = model("t5"), given("t5", "")
    ours = copy.deepcopy(theirs)
    seqcore.replace(ours, backend="aten")
    assert_equal_in_float64(results(ours, inputs), results(theirs, inputs))


def test_without_transformers_registering_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers with AttentionInterface"):
        register()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_models_have_the_operator_in_one_graph():
    theirs, inputs = model("mistral"), given("mistral", "left")
    ours, capture, real = copy.deepcopy(theirs), Capture(), inputs["attention_mask"].bool()
    seqcore.replace(ours)
    whole = torch.compile(lambda: ours(**inputs, use_cache=False).logits[real], backend=capture, fullgraph=True)
    assert_equal_in_float64({"logits": whole()}, {"logits": theirs(**inputs, use_cache=False).logits[real]})
    assert capture.forward == [["attention_forward"] * 2]
