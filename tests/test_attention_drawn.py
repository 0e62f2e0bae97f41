"""Attention on whatever hypothesis draws, by the error budget; inputs stay as they are."""

import contextlib

import pytest
import torch

from seqcore import backends, functional
from seqcore.kernels import tuning

from .attention_twins import (
    amplified,
    assert_like_reference,
    assert_like_torch,
    attending,
    beside,
    doubled,
    ends,
    kernels,
    qkv,
    reference,
    results,
)
from .comparisons import assert_equal_in_float64, on_another_draw
from .effort import drawn
from .test_attention_kernels import LAYOUTS, additive_mask, bool_mask

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

# On tensors smaller than these make, an equally good result is often enough outside the error budget.
sizes = st.integers(5, 36)
sides = st.none() | st.integers(0, 40)
# Next to 0 gradients are so small that float32 has few digits left for them, which no yardstick allows for.
scales = st.none() | st.just(0.0) | st.floats(0.01, 1) | st.floats(-1, -0.01)


@st.composite
def cuts(draw, parts, most):
    """Lengths of ``parts`` sequences that make up ``most`` together."""
    inner = sorted(draw(st.lists(st.integers(0, most), min_size=parts - 1, max_size=parts - 1)))
    return [b - a for a, b in zip([0, *inner], [*inner, most], strict=True)]


def pairs(most):
    return st.lists(st.integers(0, most), min_size=2, max_size=2)


def meeting(pieces):
    """Whether most rows of what belongs together see several keys, or none sees any.

    Where a row sees one, gradients are 0, and what is found is rounding: as much as all the error of a few other rows.
    """
    sequences = list(zip(*pieces, strict=True))
    several = sum(rows for rows, columns in sequences if columns >= 4)
    few = sum(rows for rows, columns in sequences if 0 < columns < 4)
    return several > few or several == few == 0


@st.composite
def calls(draw):
    """Shape, layout and options of a call; tensors among the options are made of them by the test."""
    m, n, group = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    sequences = draw(st.sampled_from(["equal", "lengths", "packed"]))
    parts = draw(st.integers(1, 4))
    return {
        "m": m, "n": n, "d": draw(sizes), "dv": draw(sizes), "group": group,
        "heads_kv": draw(st.integers(1, 4 - group)),
        "half": draw(st.booleans()), "layout": draw(st.none() | st.tuples(*[st.sampled_from([None, *LAYOUTS])] * 3)),
        "splits": draw(st.integers(0, 3)), "seed": draw(st.integers(0, 2**32)), "sequences": sequences,
        "lengths": draw(st.tuples(pairs(m), pairs(n)).filter(meeting)),
        "cuts": draw(st.tuples(cuts(parts, m), cuts(parts, n)).filter(meeting)),
        "mask": draw(st.sampled_from([None, bool_mask, additive_mask])),
        "broadcast": draw(st.tuples(*[st.booleans()] * 4)),
        "slopes": draw(st.booleans()), "sinks": draw(st.booleans()),
        "options": {
            "causal": draw(st.sampled_from([None, "top_left", "lower_right"])),
            # With causality a row would see one key.
            "window": draw(st.none() | st.tuples(sides, sides).filter(lambda window: window[0] != 0)),
            "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
            "scale": draw(scales),
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), "dropout_seed": draw(st.integers(0, 2**62)),
        },
        "weights": draw(st.sampled_from([None, None, "average", "per_head"])),
    }  # fmt: skip


def judge(call, seed, device, hold=assert_like_reference):
    """Hold the kernels to the error budget, or to what ``hold`` asks, on ``call`` with random numbers of ``seed``."""
    torch.manual_seed(seed)
    m, n, packed = call["m"], call["n"], call["sequences"] == "packed"
    heads, dtype = call["group"] * call["heads_kv"], torch.float16 if call["half"] else torch.float32
    lead, options = (heads,) if packed else (2, heads), dict(call["options"])
    inputs = qkv(
        *lead, heads_kv=call["heads_kv"], M=m, N=n, D=call["d"], DV=call["dv"], dtype=dtype, device=device
    )  # fmt: skip
    if call["layout"] and not packed:
        inputs = [LAYOUTS[layout](t) if layout else t for layout, t in zip(call["layout"], inputs, strict=True)]
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
    with pytest.MonkeyPatch.context() as patch, unwritten(*inputs, *options.values()):
        # Splits are for few queries; more than a packed tile's rows no launch would ask for.
        few = m * call["group"] <= tuning.DECODE_ROWS
        patch.setattr(tuning, "decode_splits", lambda *_: call["splits"] if few else 0)
        hold(*inputs, **options)


@contextlib.contextmanager
def unwritten(*given):
    """Tensors among what is given keep their bits within the block."""
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in tensors]
    yield
    for tensor, kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor, kept), "an input was written"


@pytest.mark.kernels
@drawn(25, 400, call=calls())
def test_whatever_is_asked(call, device):
    on_another_draw(lambda seed: judge(call, seed, device), call["seed"])


@st.composite
def amplified_calls(draw):
    """Of float16, where gradients come in as large as a loss scale makes them."""
    m, n = draw(sizes), draw(sizes)
    lengths = {
        name: torch.tensor(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
        for name, size in (("query_lengths", m), ("key_lengths", n)) if draw(st.booleans())
    }  # fmt: skip
    return {
        "m": m, "n": n, "d": draw(sizes), "dv": draw(st.integers(5, 64)), "group": draw(st.integers(1, 2)),
        "mask": draw(st.sampled_from([None, bool_mask, additive_mask])),
        "factor": 2.0 ** draw(st.integers(10, 15)), "seed": draw(st.integers(0, 2**32)),
        "options": {
            "causal": draw(st.sampled_from([None, "top_left", "lower_right"])),
            "window": draw(st.none() | st.tuples(sides, sides)),
            "softcap": draw(st.sampled_from([0.0, 2.0])), **lengths,
        },
    }  # fmt: skip


@pytest.mark.kernels
# NumPy remarks on rows past a tile of keys, which overflow and are not stored.
@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
@drawn(4, 200, call=amplified_calls())
def test_large_incoming_gradients_give_finite_ones(call, device):
    """All elements that float16 holds by a margin are finite; so large is no score's gradient that it does not fit."""
    torch.manual_seed(call["seed"])
    m, n, heads = call["m"], call["n"], 2 * call["group"]
    query, key, value = qkv(
        2, heads, heads_kv=2, M=m, N=n, D=call["d"], DV=call["dv"], dtype=torch.float16, device=device
    )  # fmt: skip
    options = call["options"] | {"enable_gqa": True}
    if call["mask"] is not None:
        mask = call["mask"](2, 1, m, n)
        options["attn_mask"] = mask.half() if mask.is_floating_point() else mask
    options = {name: beside(option, device) for name, option in options.items()}
    # Of values that are nearly alike the gradients of scores are small, but not the two numbers they differ by.
    inputs = query, key, 1 + value / 16
    found = amplified(kernels, call["factor"], *inputs, **options)
    exact = amplified(
        reference, call["factor"], *map(doubled, inputs), **{name: doubled(o) for name, o in options.items()}
    )  # fmt: skip
    assert all(a.isfinite()[b.abs() < 6e4].all() for a, b in zip(found, exact, strict=True))


@drawn(25, 1_000, call=calls())
def test_whatever_is_asked_of_the_operators(call, device, monkeypatch):
    """On a CPU they run the reference's formulas, with a backward that is written out by hand, in float64 too."""
    # Only where they are asked for by name: their yardstick is the reference with autograd's backward.
    monkeypatch.setattr(backends, "choose", lambda _, backend: backend)
    judge(call, call["seed"], device, assert_equals_reference)


def assert_equals_reference(*inputs, **options):
    inputs, options = [doubled(t) for t in inputs], {name: doubled(value) for name, value in options.items()}
    found, expected = (results(function, *inputs, **options, enable_gqa=True) for function in (kernels, reference))
    assert_equal_in_float64(found, expected)


leads = st.sampled_from(
    [((), (), ()), ((3,), (3,), (3,)), ((2, 3), (2, 3), (2, 3)), ((2, 1), (3,), (1, 1)), ((4, 2), (2,), (4, 1)),
     ((2, 1, 3), (2, 2, 1), (3,))]
)  # fmt: skip


@st.composite
def plain_calls(draw):
    """What torch's own attention can be asked for."""
    m, n = draw(sizes), draw(sizes)
    lead = draw(leads)
    whole = torch.broadcast_shapes(*lead)
    mask = [1 if draw(st.booleans()) else size for size in (*whole, m, n)]
    plain = [None, *PLAIN_LAYOUTS]
    return {
        "m": m, "n": n, "d": draw(st.sampled_from([1, 5, 8, 33, 256, 257])), "dv": draw(st.sampled_from([1, 7, 16])),
        "lead": lead, "layout": draw(st.tuples(*[st.sampled_from(plain)] * 3)),
        "mask": draw(st.sampled_from([None, bool_mask, additive_mask])), "mask shape": mask[draw(st.integers(0, 2)) :],
        "causal": draw(st.booleans()), "scale": draw(scales), "seed": draw(st.integers(0, 2**32)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    }  # fmt: skip


# No rows of stride 0, whose errors are all the same, too few for the budget: test_attention_inputs.py has those.
PLAIN_LAYOUTS = {name: LAYOUTS[name] for name in LAYOUTS if name != "batch of stride 0" and "heads" not in name} | {
    "offset by one": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
}


def judge_plain(call, seed, backend):
    torch.manual_seed(seed)
    shapes = ((call["m"], call["d"]), (call["n"], call["d"]), (call["n"], call["dv"]))
    inputs = [
        torch.randn(*lead, *shape, dtype=call["dtype"]) for lead, shape in zip(call["lead"], shapes, strict=True)
    ]
    layouts = {None: lambda t: t} | PLAIN_LAYOUTS
    inputs = [layouts[layout](t) for layout, t in zip(call["layout"], inputs, strict=True)]
    options = {"causal": "top_left" if call["causal"] else None, "scale": call["scale"]}
    if call["mask"] is not None:
        mask = call["mask"](*call["mask shape"])
        options["attn_mask"] = mask.to(call["dtype"]) if mask.is_floating_point() else mask
    with unwritten(*inputs, *options.values()):
        assert_like_torch(attending(backend), *inputs, **options, weigh=("out",))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@drawn(20, 700, call=plain_calls())
def test_what_torch_can_be_asked_for(call, backend):
    on_another_draw(lambda seed: judge_plain(call, seed, backend), call["seed"])


few = st.integers(0, 3)


@drawn(20, 300, shape=st.tuples(few, few, few, few, st.integers(1, 3)))
def test_sizes_of_zero(shape):
    """Where there is nothing to attend to, zeros; gradients of every input, in its shape."""
    batch, heads, m, n, d = shape
    inputs = [t.requires_grad_() for t in qkv(batch, heads, M=m, N=n, D=d, dtype=torch.float64)]
    for backend in ("auto", "reference"):
        out, lse = functional.attention(*inputs, return_lse=True, backend=backend)
        assert out.shape == (batch, heads, m, d) and lse.shape == out.shape[:3]
        assert n or (not out.any() and lse.isneginf().all())
        gradients = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0, lse).sum(), inputs)
        for gradient, tensor in zip(gradients, inputs, strict=True):
            assert gradient.shape == tensor.shape and gradient.isfinite().all()
