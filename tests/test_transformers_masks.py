"""What attention is given of the masks that transformers makes: causality, windows and padding, or a matrix."""

import pytest
import torch
from torch import Tensor

import seqcore
from seqcore import functional
from seqcore.integrations.transformers import attention_forward
from seqcore.integrations.transformers import mask as make_mask

from .attention_twins import qkv
from .comparisons import assert_equal_in_float64, assert_within
from .test_attention_compile import compiled
from .transformers_models import B, T, given, masking_utils, model, tokens

CAUSAL, SLIDING = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(3)
CHUNKED = masking_utils.chunked_causal_mask_function(3, torch.zeros(B, dtype=torch.long))


@pytest.fixture
def asked(monkeypatch):
    """The options of each call of attention."""
    options, attention = [], functional.attention

    def recording(*tensors, **given):
        options.append(given | {"keys": tensors[1].shape[2]})
        return attention(*tensors, **given)

    monkeypatch.setattr(functional, "attention", recording)
    return options


def shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


@pytest.mark.parametrize(
    "name, padded, expected",
    [
        ("bert", "", (None, None, None)),
        ("bert", "left", (None, None, (B, 1, 1, T))),
        ("gpt2", "", ("top_left", None, None)),
        ("gpt2", "left", ("lower_right", None, (B, 1, 1, T))),
        ("mistral", "", ("lower_right", (3, 0), (B, 1, 1, T))),
        ("mistral", "right", ("lower_right", (3, 0), (B, 1, 1, T))),
        ("t5", "left", ("top_left", None, (1, 2, T, T))),
    ],
)
@torch.no_grad()
def test_kernels_are_given_structure_and_not_a_matrix(name, padded, expected, asked):
    module = model(name)
    seqcore.replace(module, backend="reference")
    module(**given(name, padded))
    last = [o for o in asked if name != "t5" or o["causal"]][-1]
    assert (last["causal"], last["window"], shape(last["attn_mask"])) == expected
    if name == "mistral":
        assert last["enable_gqa"]


SECOND = (torch.arange(9) > 4).expand(B, 9)

# The mask function, what else transformers says, and the options that attention gets; None for the matrix itself.
STRUCTURES = {
    "causal, more keys": (CAUSAL, {"q_length": 4, "kv_length": 9, "q_offset": 5}, ("lower_right", None)),
    "window": (SLIDING, {"q_length": 9, "kv_length": 9, "local_size": 3}, ("lower_right", (2, 0))),
    "window, keys dropped": (
        SLIDING, {"q_length": 4, "kv_length": 6, "q_offset": 5, "kv_offset": 3, "local_size": 3},
        ("lower_right", (2, 0)),
    ),
    "window both ways": (
        masking_utils.sliding_window_bidirectional_mask_function(3),
        {"q_length": 9, "kv_length": 9, "local_size": 3}, (None, (3, 3)),
    ),
    "bidirectional": (
        masking_utils.bidirectional_mask_function,
        {"q_length": 4, "kv_length": 9, "allow_is_causal_skip": False}, (None, None),
    ),
    "chunks": (CHUNKED, {"q_length": 9, "kv_length": 9, "local_size": 3}, None),
    "empty slots": (CAUSAL, {"q_length": 4, "kv_length": 9, "q_offset": 2}, None),
    "a window of another size": (SLIDING, {"q_length": 9, "kv_length": 9, "local_size": 4}, None),
    "an offset on a device": (
        CAUSAL, {"q_length": 4, "kv_length": 9, "q_offset": torch.tensor(5), "allow_is_causal_skip": False}, None
    ),
    "images too": (
        masking_utils.or_masks(CAUSAL, lambda b, h, q, k: k == 2),
        {"q_length": 9, "kv_length": 9, "allow_is_causal_skip": False}, None,
    ),
    "packed": (
        masking_utils.and_masks(CAUSAL, masking_utils.packed_sequence_mask_function(SECOND)),
        {"q_length": 9, "kv_length": 9, "allow_is_causal_skip": False}, None,
    ),
}  # fmt: skip


def masked(case: str, padded: bool) -> Tensor:
    function, options, _ = STRUCTURES[case]
    keys = options["kv_length"] + options.get("kv_offset", 0)
    real = torch.arange(keys) >= torch.tensor([[0], [2]]) if padded else None
    return make_mask(B, mask_function=function, attention_mask=real, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("case", STRUCTURES)
def test_structure_says_what_the_matrix_says(case, backend, padded, asked, device):
    """With all that a model may ask for: grouped heads, a soft cap, sinks."""
    mask = masked(case, padded)
    tensors = qkv(B, 4, heads_kv=2, M=mask.shape[2], N=mask.shape[3], D=8)
    options = {"scaling": 0.5, "softcap": 2.0}

    def attend(dtype, backend, mask):
        given = [t.to(device, dtype) for t in tensors]
        sinks = torch.linspace(-1, 1, 4, dtype=dtype, device=device)
        return {"out": attention_forward(None, *given, mask, s_aux=sinks, backend=backend, **options)[0]}

    actual = attend(torch.float32, backend, mask)
    matrix = mask.clone().to(device)
    assert_within(actual, attend(torch.float64, "reference", matrix), attend(torch.float32, "reference", matrix))
    found, expected = asked[0], STRUCTURES[case][2]
    if expected is None:
        assert found["attn_mask"] is mask and found["causal"] is found["window"] is None
    else:
        assert (found["causal"], found["window"]) == expected
        assert shape(found["attn_mask"]) == ((B, 1, 1, mask.shape[3]) if padded else None)


@pytest.mark.parametrize("change", ["in place", "anew", "while inferring"])
def test_masks_that_a_model_changed_are_read(change, asked):
    mask, tensors = masked("causal, more keys", padded=True), qkv(B, 2, M=4, N=9)
    if change == "in place":
        mask[..., 0] = False
    elif change == "anew":
        mask = mask & (torch.arange(9) > 0)
    else:
        with torch.inference_mode():
            mask = masked("causal, more keys", padded=True)
            mask[..., 0] = False
    attention_forward(None, *tensors, mask, backend="reference")
    assert asked[0]["attn_mask"] is mask and asked[0]["causal"] is None


def test_a_mask_for_other_keys_is_refused():
    mask = masked("causal, more keys", padded=False)
    with pytest.raises(seqcore.InvalidInput, match="attn_mask must broadcast"):
        attention_forward(None, *qkv(B, 2, M=4, N=8), mask, backend="reference")


def test_empty_slots_of_a_static_cache_are_not_read(asked):
    module = model("gpt2")
    seqcore.replace(module)
    module.generate(tokens(B, T), max_new_tokens=3, cache_implementation="static", disable_compile=True)
    assert (asked[0]["causal"], asked[0]["keys"]) == ("top_left", T)


def test_a_mask_that_was_made_outside_of_compiled_code_is_read():
    mask, tensors = masked("causal, more keys", padded=True), qkv(B, 2, M=4, N=9, dtype=torch.float64)
    attend = lambda *tensors: {"out": attention_forward(None, *tensors, mask, backend="reference")[0]}
    assert_equal_in_float64(compiled(attend)(*tensors), attend(*tensors))
