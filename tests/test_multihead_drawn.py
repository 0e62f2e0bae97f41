"""seqcore.nn.MultiheadAttention against torch's, whatever is asked of it together."""

import pytest
import torch

from .effort import drawn
from .routes import by_the_operators
from .transformer_twins import additive, assert_like_torch, may_not, torch_module

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

few, either = st.sampled_from([1, 2, 3]), st.booleans()


@st.composite
def calls(draw):
    heads, query, key = draw(few), draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 3, 6]))
    kind = draw(st.sampled_from(["cross", "memory", "self"]))
    widths = {"kdim": draw(st.none() | few), "vdim": draw(st.none() | few)} if kind == "cross" else {}
    masks = st.sampled_from([None, may_not, additive])
    return {
        "kind": kind, "batch": draw(st.none() | few), "queries": query, "keys": query if kind == "self" else key,
        "options": {
            "embed_dim": heads * draw(st.sampled_from([1, 2, 4])), "num_heads": heads, **widths,
            **{flag: draw(either) for flag in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")},
        },
        "mask": draw(masks), "of each head": draw(either), "padding": draw(masks), "train": draw(either),
        "flags": {flag: draw(either) for flag in ("need_weights", "average_attn_weights")},
        "backend": draw(st.sampled_from([None, "reference", "operators"])),
    }  # fmt: skip


def tensors(call, module):
    """Query, key and value; and the masks among the keywords."""
    batch, queries, keys = call["batch"], call["queries"], call["keys"]

    def rows(count, width):
        batched = (batch, count, width) if module.batch_first else (count, batch, width)
        return torch.randn((count, width) if batch is None else batched)

    query, key = rows(queries, module.embed_dim), rows(keys, module.kdim)
    given = {"self": [query] * 3, "memory": [query, key, key], "cross": [query, key, rows(keys, module.vdim)]}
    masks, lead = {}, () if batch is None else (batch,)
    if call["mask"]:
        heads = ((batch or 1) * module.num_heads,) if call["of each head"] else ()
        masks["attn_mask"] = call["mask"](*heads, queries, keys)
    if call["padding"]:
        masks["key_padding_mask"] = call["padding"](*lead, keys)
    return given[call["kind"]], masks


# What torch says of masks of two kinds.
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@drawn(40, 2_000, call=calls())
def test_whatever_is_asked(call):
    theirs = torch_module(**call["options"]).train(call["train"])
    given, masks = tensors(call, theirs)
    if call["backend"] == "operators":
        with by_the_operators():
            # Torch's own module asks nobody for a backend.
            assert_like_torch(theirs, None, given, **masks, **call["flags"])
    else:
        assert_like_torch(theirs, call["backend"], given, **masks, **call["flags"])
