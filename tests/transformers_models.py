"""Small models of transformers' with random weights, and their inputs."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
# Under `python -m pytest` the checkout is on the path, where its folder kernels passes for Hugging Face's package.
with mock.patch.object(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import masking_utils

VOCABULARY, B, T = 37, 2, 9
SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = SIZES | {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = SIZES | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
T5 = SIZES | {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}

# Each model, its configuration, and the attention that is its yardstick.
MODELS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, ENCODER, "sdpa"),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2, "sdpa"),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5, "sdpa"),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, DECODER | {"sliding_window": 4}, "sdpa"),
    "gemma2": (
        transformers.Gemma2ForCausalLM, transformers.Gemma2Config,
        DECODER | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, "spelt out",
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM, transformers.GptOssConfig, DECODER | {"sliding_window": 4} | EXPERTS, "eager",
    ),
}  # fmt: skip
DECODERS = [name for name in MODELS if name != "bert"]


def spelt_out(module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
    """Gemma2's own attention rounds to float32 before the softmax; this one does not."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
    return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("spelt out", spelt_out)
transformers.AttentionMaskInterface.register("spelt out", masking_utils.eager_mask)


def model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small model of random weights that matter, evaluating."""
    kind, configuration, options, yardstick = MODELS[name]
    torch.manual_seed(0)
    made = kind(configuration(**options, attn_implementation=yardstick)).to(dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def given(name: str, padded: str) -> dict[str, Tensor]:
    mask = torch.ones(B, T, dtype=torch.long)
    if padded == "left":
        mask[0, :3] = 0
    elif padded == "right":
        mask[0, -3:] = 0
    return {"input_ids": tokens(B, T), "attention_mask": mask} | (
        {"decoder_input_ids": tokens(B, T)} if name == "t5" else {}
    )
