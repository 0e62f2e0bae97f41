"""What attention's inputs may share, and what a number in them that is not finite reaches."""

import math

import pytest
import torch

from seqcore import functional

from .attention_twins import attending, ends, qkv
from .comparisons import assert_equal_in_float64

# What NumPy says of the numbers that these tests are about, where it multiplies for the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

B, H, KV, M, N, D, DV = 2, 2, 1, 5, 6, 4, 3
BAD = (math.nan, math.inf)
BACKENDS = ["reference", "operators", pytest.param("triton", marks=pytest.mark.kernels)]


@pytest.fixture(params=BACKENDS)
def attend(request, device):
    """``functional.attention`` on a backend; the operators' formulas for a CPU are reached by the kernels' name."""
    if request.param == "operators":
        request.getfixturevalue("by_the_operators")

    def call(*inputs, **options):
        backend = "reference" if request.param == "reference" else "triton"
        options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        return functional.attention(*inputs, **options, enable_gqa=True, return_lse=True, backend=backend)

    return call


def everything(attend, inputs, cotangents=(), **options):
    """out, lse, weights if asked for, and the gradients of query, key, value and of what else requires one.

    The gradients that arrive are ``cotangents``, of out, lse and weights, or ones.
    """
    leaves = [t.clone().requires_grad_() for t in inputs]
    learned = {name: t.clone().requires_grad_() for name, t in options.items() if t is not None and name in LEARNED}
    results = attend(*leaves, **options | learned)
    arriving = [t.to(y) for t, y in zip(cotangents or map(torch.ones_like, results), results, strict=True)]
    found = torch.autograd.grad(results, [*leaves, *learned.values()], arriving)
    names = *("out", "lse", "weights")[: len(results)], "query", "key", "value", *learned
    return dict(zip(names, (*results, *found), strict=True))


LEARNED = ("sinks", "attn_mask")


def lengths():
    return {"query_lengths": torch.tensor([3, 5]), "key_lengths": torch.tensor([4, 6])}


BEHIND_LENGTHS = {
    "plain": {},
    "causal": {"causal": "lower_right", "window": (2, 1)},
    "average": {"return_weights": "average"},
    "per_head": {"return_weights": "per_head"},
}


def filled(tensors, padding, filling):
    return [t.masked_fill(past.to(t.device), filling) for t, past in zip(tensors, padding, strict=True)]


@pytest.mark.parametrize("options", BEHIND_LENGTHS.values(), ids=BEHIND_LENGTHS)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_behind_lengths_reaches_anything(bad, options, attend, device):
    """Rows of queries, keys and values, entries of the mask, and gradients that arrive where nothing was asked for."""
    past_q, past_k = (
        torch.arange(size) >= each[:, None] for size, each in zip((M, N), lengths().values(), strict=True)
    )
    padding = [past[:, None, :, None] for past in (past_q, past_k, past_k)]
    unseen = past_q[:, None, :, None] | past_k[:, None, None, :]
    inputs = qkv(B, H, heads_kv=KV, M=M, N=N, D=D, DV=DV, device=device)
    mask, sinks = torch.randn(B, 1, M, N, device=device), torch.randn(H, device=device)
    cotangents, behind = [torch.randn(B, H, M, DV), torch.randn(B, H, M)], [padding[0], past_q[:, None]]
    if "return_weights" in options:
        averaged = options["return_weights"] == "average"
        cotangents.append(torch.randn(B, M, N) if averaged else torch.randn(B, H, M, N))
        behind.append(unseen[:, 0] if averaged else unseen)

    def found(filling):
        (bias,) = filled([mask], [unseen], filling)
        return everything(
            attend, filled(inputs, padding, filling), filled(cotangents, behind, filling), attn_mask=bias, sinks=sinks,
            **lengths(), **options,
        )  # fmt: skip

    expected = found(0.0)
    for name, tensor in found(bad).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_packed_sequences_never_meet(which, bad, attend, device):
    """Whatever is in one of them, others keep their bits; empty ones are none to meet."""
    inputs = qkv(H, heads_kv=KV, M=M, N=N, D=D, DV=DV, device=device)
    cuts = {"cu_seqlens_q": ends(2, 0, 3), "cu_seqlens_k": ends(3, 0, 3)}
    poisoned = [t.clone() for t in inputs]
    poisoned[which][:, -2:] = bad
    found, expected = everything(attend, poisoned, **cuts), everything(attend, inputs, **cuts)
    for name, tensor in found.items():
        first = 2 if name in ("out", "lse", "query") else 3
        assert torch.equal(tensor[:, :first], expected[name][:, :first]), name
    assert not found["out"][:, 2:].isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_packed_sequences_are_each_alone(dropout_p):
    """Of the operators and of the reference, with dropout, which counts sequences, and with what they share."""
    torch.manual_seed(3)
    double = {"dtype": torch.float64}
    inputs = qkv(H, heads_kv=KV, M=M, N=N, D=D, DV=DV, **double)
    options = {"causal": "lower_right", "dropout_p": dropout_p, "dropout_seed": 11}
    shared = {"attn_mask": torch.randn(H, 1, 1, **double), "sinks": torch.randn(H, **double)}
    cuts = {"cu_seqlens_q": ends(2, 0, 3), "cu_seqlens_k": ends(1, 2, 3)}

    def call(*tensors, **given):
        return functional.attention(*tensors, **given, **options, enable_gqa=True, return_lse=True, backend="reference")

    def at_once(*tensors, **given):
        # Where ends cannot be read, sequences are taken together.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("seqcore.reference.packed.readable", lambda _: False)
            return call(*tensors, **given)

    assert_equal_in_float64(everything(call, inputs, **cuts, **shared), everything(at_once, inputs, **cuts, **shared))


HIDDEN = {
    "bool mask": {"attn_mask": torch.ones(M, N, dtype=torch.bool).tril()},
    "causal": {"causal": "top_left"},
    "window": {"window": (2, 0)},
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", HIDDEN)
def test_a_key_reaches_only_queries_that_see_it(name, bad, attend, device):
    """Forward; backward a weight of 0 times what is not finite is NaN, and so is it with values: see the docstring."""
    query, key, value = qkv(B, H, heads_kv=KV, M=M, N=N, D=D, DV=DV, device=device)
    poisoned = key.clone()
    poisoned[:, :, 3] = bad
    options = HIDDEN[name]
    out, lse = attend(query, poisoned, value, **options)
    expected_out, expected_lse = attend(query, key, value, **options)
    sees = torch.zeros(M, N).bool()
    for m in range(M):
        for n in range(N):
            distance = n - m - (0 if name != "window" else N - M)
            sees[m, n] = distance <= 0 and (name != "window" or distance >= -2)
    blind = ~sees[:, 3].to(device)
    assert blind.any() and torch.equal(out[:, :, blind], expected_out[:, :, blind])
    assert torch.equal(lse[:, :, blind], expected_lse[:, :, blind])
    assert not out[:, :, ~blind].isfinite().all()


def test_zero_times_nan_is_nan_behind_a_mask(attend, device):
    """What the docstring says is not promised; here to be changed with it."""
    query, key, value = qkv(B, H, heads_kv=KV, M=M, N=N, D=D, DV=DV, device=device)
    hidden = torch.ones(N, dtype=torch.bool)
    hidden[-1] = False
    bad_key, bad_value = key.clone(), value.clone()
    bad_key[:, :, -1], bad_value[:, :, -1] = math.nan, math.nan
    bias = torch.where(hidden, 0.0, -math.inf)
    assert attend(query, key, bad_value, attn_mask=hidden[None])[0].isnan().all()
    assert attend(query, bad_key, value, attn_mask=bias[None])[0].isnan().all()
    assert everything(attend, [query, bad_key, value], attn_mask=None, **{"causal": "top_left"})["query"].isnan().any()
    # Lengths are what never lets padding in.
    by_length = {"key_lengths": torch.tensor([N - 1] * B)}
    for tensor in everything(attend, [query, bad_key, bad_value], **by_length).values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_head_of_a_sequence_is_reached_by_its_own_alone(which, attend, device):
    inputs = qkv(B, 4, heads_kv=2, M=M, N=N, D=D, DV=DV, device=device)
    poisoned = [t.clone() for t in inputs]
    poisoned[which][1, 1, 2] = math.nan
    found, expected = (everything(attend, tensors, causal=None) for tensors in (poisoned, inputs))
    own = {"out": [1], "key": [0], "value": [0]} if which == 0 else {"out": [2, 3], "key": [1], "value": [1]}
    own |= {"lse": own["out"], "query": own["out"]}
    for name, tensor in found.items():
        rest = torch.ones(tensor.shape[:2], dtype=torch.bool, device=device)
        rest[1, own[name]] = False
        assert torch.equal(tensor[rest], expected[name][rest]), name
    assert found["out"].isnan().any()


SHARED = {
    "one tensor": lambda t: (t, t, t),
    "one storage": lambda t: (t[..., :4], t[..., 2:6], t[..., 4:]),
    "overlapping rows": lambda t: (t[:, :, :-1], t[:, :, 1:], t[:, :, 1:]),
    "rows of stride 0": lambda t: (t[:, :, :1].expand_as(t), t, t[:, :, :1].expand_as(t)),
}


@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_inputs_that_share_memory_add_up(name, attend, device):
    base = torch.randn(B, H, M, 8, device=device)
    leaf = base.clone().requires_grad_()
    bias = leaf[..., :1] if name == "one storage" else None
    out, lse = attend(*SHARED[name](leaf), attn_mask=bias)
    out.sum().add(lse.sum()).backward()
    apart = [t.clone() for t in SHARED[name](base)]
    expected = everything(attend, apart, attn_mask=None if bias is None else base[..., :1].clone())
    twin = base.clone().requires_grad_()
    views = [*SHARED[name](twin), *([] if bias is None else [twin[..., :1]])]
    gradients = [expected[key] for key in ("query", "key", "value", "attn_mask") if key in expected]
    torch.autograd.backward(views, gradients)
    torch.testing.assert_close(leaf.grad, twin.grad)
    assert torch.equal(leaf, base)


def test_auto_takes_what_shares_memory_as_torch_does():
    packed = torch.randn(B, H, M, 3 * D).requires_grad_()
    twin = packed.detach().clone().requires_grad_()
    for function, tensor in ((attending("auto"), packed), (torch.nn.functional.scaled_dot_product_attention, twin)):
        function(*tensor.chunk(3, -1)).sum().backward()
    assert torch.equal(packed.grad, twin.grad)
