"""The attention kernels on whatever hypothesis draws; a file of its own, for a GPU machine may lack hypothesis."""

import pytest
import torch

from seqcore.kernels import tuning

from .attention_twins import assert_like_reference, ends, qkv
from .effort import drawn
from .test_attention_kernels import LAYOUTS, additive_mask, bool_mask

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

pytestmark = pytest.mark.kernels

# On tensors smaller than these make, an equally good result is often enough outside the error budget.
sizes = st.integers(5, 36)
sides = st.none() | st.integers(0, 40)


@st.composite
def cuts(draw, parts, most):
    """Lengths of ``parts`` sequences that make up ``most`` together."""
    inner = sorted(draw(st.lists(st.integers(0, most), min_size=parts - 1, max_size=parts - 1)))
    return [b - a for a, b in zip([0, *inner], [*inner, most], strict=True)]


@st.composite
def calls(draw):
    """Shape, layout and options of a call; tensors among the options are made of them by the test."""
    m, n, group = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    sequences = draw(st.sampled_from(["equal", "lengths", "packed"]))
    parts = draw(st.integers(1, 4))
    return {
        "m": m, "n": n, "d": draw(sizes), "dv": draw(sizes), "group": group,
        "heads_kv": draw(st.integers(1, 4 - group)),
        "half": draw(st.booleans()), "layout": draw(st.sampled_from([None, "heads behind rows", "wider rows"])),
        "splits": draw(st.integers(0, 3)), "seed": draw(st.integers(0, 2**32)), "sequences": sequences,
        "lengths": [draw(st.lists(st.integers(0, size), min_size=2, max_size=2)) for size in (m, n)],
        "cuts": (draw(cuts(parts, m)), draw(cuts(parts, n))),
        "mask": draw(st.sampled_from([None, bool_mask, additive_mask])),
        "broadcast": draw(st.tuples(*[st.booleans()] * 4)),
        "slopes": draw(st.booleans()), "sinks": draw(st.booleans()),
        "options": {
            "causal": draw(st.sampled_from([None, "top_left", "lower_right"])),
            "window": draw(st.none() | st.tuples(sides, sides)),
            "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
            "scale": draw(st.none() | st.floats(-1, 1)),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), "dropout_seed": draw(st.integers(0, 2**62)),
        },
        "weights": draw(st.sampled_from([None, None, "average", "per_head"])),
    }  # fmt: skip


def judge(call, seed, device):
    """Hold the kernels to the error budget on ``call`` with random numbers of ``seed``."""
    torch.manual_seed(seed)
    m, n, packed = call["m"], call["n"], call["sequences"] == "packed"
    heads, dtype = call["group"] * call["heads_kv"], torch.float16 if call["half"] else torch.float32
    lead, options = (heads,) if packed else (2, heads), dict(call["options"])
    inputs = qkv(
        *lead, heads_kv=call["heads_kv"], M=m, N=n, D=call["d"], DV=call["dv"], dtype=dtype, device=device
    )  # fmt: skip
    if call["layout"] and not packed:
        inputs = [LAYOUTS[call["layout"]](t) for t in inputs]
    if call["mask"] is not None:
        shape = [1 if one else size for one, size in zip(call["broadcast"], (2, heads, m, n), strict=True)]
        mask = call["mask"](*(shape[1:] if packed else shape))
        mask = mask.to(dtype) if mask.is_floating_point() else mask
        options["attn_mask"] = mask.requires_grad_(mask.is_floating_point() and mask.numel() >= 100)
    if call["slopes"]:
        options["alibi_slopes"] = torch.rand(heads)
    if call["sinks"]:
        options["sinks"] = torch.randn(heads, dtype=dtype)
    if packed:
        options["cu_seqlens_q"], options["cu_seqlens_k"] = (ends(*lengths) for lengths in call["cuts"])
    else:
        options["return_weights"] = call["weights"]
        if call["sequences"] == "lengths":
            options["query_lengths"], options["key_lengths"] = map(torch.tensor, call["lengths"])
    with pytest.MonkeyPatch.context() as patch:
        # Splits are for few queries; more than a packed tile's rows no launch would ask for.
        few = m * call["group"] <= tuning.DECODE_ROWS
        patch.setattr(tuning, "decode_splits", lambda *_: call["splits"] if few else 0)
        assert_like_reference(*inputs, **options)


@drawn(25, 1_000, call=calls())
def test_whatever_is_asked(call, device):
    # Where few rows see more than a key, errors are few and the budget's yardstick a poor one: a second try, with other
    # numbers, tells chance from a defect.
    try:
        judge(call, call["seed"], device)
    except AssertionError:
        judge(call, call["seed"] + 1, device)
