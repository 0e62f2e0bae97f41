"""Which backend runs: how it is chosen, who may serve what, and what is said where it may not."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqcore
from seqcore import Device, InvalidInput, UnsupportedInput, backends, functional
from seqcore.autograd import attention as autograd_attention
from seqcore.autograd import recurrence as autograd_recurrence
from seqcore.devices import INTERPRETED
from seqcore.ops import attention as ops

from .attention_twins import qkv

B, H, M, N, D = 2, 4, 5, 7, 6


def chosen(*arguments, function=functional.attention, **keywords):
    """The backend of the one call that ``function`` makes."""
    (explanation,) = seqcore.explain(function, *(arguments or qkv(B, H)), **keywords)
    return explanation.chosen


def test_the_argument_beats_the_context():
    assert chosen() == "aten"
    with seqcore.use_backend("reference"):
        assert chosen() == "reference"
        assert chosen(backend="aten") == "aten"
        assert chosen(backend="auto") == "aten"
        module = seqcore.nn.MultiheadAttention(D, 1)
        x = torch.randn(3, D)
        assert chosen(x, x, x, function=module) == "reference"
        module.backend = "auto"
        assert chosen(x, x, x, function=module, need_weights=False) == "aten"
    assert chosen() == "aten"


ENVIRONMENT_SCRIPT = """
import torch, seqcore
q = torch.randn(2, 3, 4)
chosen = lambda **keywords: seqcore.explain(seqcore.functional.attention, q, q, q, **keywords)[0].chosen
print(chosen(), chosen(backend="aten"))
with seqcore.use_backend("auto"):
    print(chosen())
"""


def run_with(variable):
    environment = {**os.environ, "SEQCORE_BACKEND": variable}
    return subprocess.run(
        [sys.executable, "-c", ENVIRONMENT_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("variable, alone", [("reference", "reference"), ("", "aten")])
def test_the_context_beats_the_variable(variable, alone):
    assert run_with(variable).stdout.split() == [alone, "aten", "aten"]


def test_a_wrong_variable_is_named():
    finished = run_with("cudnn")
    assert finished.returncode != 0
    assert "unknown SEQCORE_BACKEND: got 'cudnn', allowed are 'auto', 'triton', 'aten', 'reference'" in finished.stderr


def test_contexts_nest_and_end_with_an_exception():
    with seqcore.use_backend("reference"):
        with pytest.raises(ZeroDivisionError, match="aten"), seqcore.use_backend("aten"):
            raise ZeroDivisionError(chosen())
        assert chosen() == "reference"
        with seqcore.use_backend("auto"):
            assert chosen() == "aten"
    assert backends.resolve(None) == "auto"


def test_a_context_is_of_one_thread():
    found = {}

    def elsewhere():
        found["before"] = chosen()
        inside.set()
        with seqcore.use_backend("reference"):
            left.wait(10)
            found["own"] = chosen()

    inside, left = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    with seqcore.use_backend("reference"):
        thread.start()
        inside.wait(10)
    found["here"] = chosen()
    left.set()
    thread.join()
    assert found == {"before": "aten", "own": "reference", "here": "aten"}


@pytest.mark.parametrize(
    "use",
    [
        lambda: seqcore.use_backend("cudnn").__enter__(),
        lambda: functional.attention(*qkv(B, H), backend="cudnn"),
        lambda: seqcore.nn.MultiheadAttention(D, 1, backend="cudnn"),
        lambda: seqcore.nn.LSTM(D, 3, backend="cudnn"),
    ],
    ids=["context", "function", "MultiheadAttention", "LSTM"],
)
def test_unknown_names(use):
    with pytest.raises(InvalidInput, match="got 'cudnn', allowed are 'auto', 'triton', 'aten', 'reference'"):
        use()


@pytest.mark.kernels
def test_backward_keeps_the_choice_of_forward(device, monkeypatch):
    query, key, value = (t.requires_grad_() for t in qkv(B, H, device=device))
    with seqcore.use_backend("triton"):
        out = functional.attention(query, key, value)
    calls, backward = [], ops.backward

    def counting(*arguments):
        calls.append(1)
        return backward(*arguments)

    monkeypatch.setattr(ops, "backward", counting)
    with seqcore.use_backend("reference"):
        out.sum().backward()
    assert calls


def test_checkpointed_code_names_its_backend():
    query, key, value = (t.requires_grad_() for t in qkv(B, H))
    out = checkpoint(lambda q: functional.attention(q, key, value, backend="reference"), query, use_reentrant=False)
    out.sum().backward()
    assert query.grad.isfinite().all()


# Dynamo makes an instance of a Function for itself, of which torch's own eager mode warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_follows_a_change_of_context():
    graphs = []

    def count(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    inputs = qkv(B, H)
    compiled = torch.compile(functional.attention, backend=count, fullgraph=True)
    compiled(*inputs)
    assert "seqcore.attention_forward" in graphs[-1]
    with seqcore.use_backend("aten"):
        compiled(*inputs)
    assert "seqcore.attention_forward" not in graphs[-1]
    with seqcore.use_backend("reference"):
        compiled(*inputs)
    compiled(*inputs)
    assert len(graphs) == 3


# What torch's attention has not, by the name it refuses it under.
LENGTHS, ENDS = torch.tensor([3, 5]), torch.tensor([0, 3, 5])
EXTRA = {
    "window": ({"window": (1, 2)}, {}),
    "softcap": ({"softcap": 2.0}, {}),
    "sinks": ({"sinks": torch.zeros(H)}, {}),
    "alibi_slopes": ({"alibi_slopes": torch.ones(H)}, {}),
    "query_lengths": ({"query_lengths": LENGTHS}, {}),
    "key_lengths": ({"key_lengths": LENGTHS}, {}),
    "cu_seqlens_q": ({"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS}, {"lead": (H,), "N": M}),
    "dropout_seed": ({"dropout_p": 0.5, "dropout_seed": 3}, {}),
    "log-sum-exp": ({"return_lse": True}, {}),
    "causal lower_right": ({"causal": "lower_right"}, {}),
    "weights": ({"return_weights": "average"}, {}),
    "mask with causal": ({"attn_mask": torch.zeros(M, N), "causal": "top_left"}, {}),
}
# What the kernels have not.
UNSERVED = {
    "alibi_slopes with gradient": ({"alibi_slopes": torch.ones(H, requires_grad=True)}, {}),
    "head dims up to 256, got 257": ({}, {"D": 257}),
    "float32, float16 or bfloat16, got torch.float64": ({}, {"dtype": torch.float64}),
}


def problem(options, sizes, device="cpu"):
    lead = sizes.get("lead", (B, H))
    sizes = {"M": M, "N": N, "D": D, "device": device} | {k: v for k, v in sizes.items() if k != "lead"}
    options = {k: v.detach().to(device).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
               for k, v in options.items()}  # fmt: skip
    return qkv(*lead, **sizes), options


@pytest.mark.kernels
@pytest.mark.parametrize("name", UNSERVED)
def test_triton_refuses_what_no_kernel_has(name, device):
    inputs, options = problem(*UNSERVED[name], device)
    with pytest.raises(UnsupportedInput, match=name):
        functional.attention(*inputs, **options, backend="triton")


@pytest.mark.parametrize("name", UNSERVED)
def test_auto_serves_what_no_kernel_has(name):
    inputs, options = problem(*UNSERVED[name])
    out = functional.attention(*inputs, **options)
    torch.testing.assert_close(out, functional.attention(*inputs, **options, backend="reference"))
    (explanation,) = seqcore.explain(functional.attention, *inputs, **options, device=Device("sm_90"))
    assert name in explanation.notes["triton"]
    assert explanation.chosen in ("aten", "reference")


@pytest.mark.parametrize("name", EXTRA)
def test_what_torch_has_not_the_kernels_have(name):
    inputs, options = problem(*EXTRA[name])
    with pytest.raises(UnsupportedInput, match=f"torch's attention has no {name}"):
        functional.attention(*inputs, **options, backend="aten")
    assert chosen(*inputs, **options) == "reference"
    assert chosen(*inputs, **options, device=Device("sm_90")) == "triton"


def test_slopes_that_no_gradient_is_asked_of_are_served():
    inputs, options = problem(*UNSERVED["alibi_slopes with gradient"])
    with torch.no_grad():
        assert chosen(*inputs, **options, device=Device("sm_90")) == "triton"


def test_refusals_say_what_was_asked_and_what_to_pass():
    slopes = torch.ones(H, requires_grad=True)
    with pytest.raises(UnsupportedInput) as caught:
        functional.attention(*qkv(B, H), alibi_slopes=slopes, backend="triton")
    said = str(caught.value)
    for part in (
        "backend 'triton' cannot serve this attention",
        "no kernel has alibi_slopes with gradient yet",
        "needs a GPU, got cpu tensors",
        "set TRITON_INTERPRET=1 before seqcore is imported",
        "aten: torch's attention has no alibi_slopes",
        "reference: can",
        "Pass backend='auto'",
    ):
        assert part in said


@pytest.mark.kernels
def test_triton_refuses_torch_func_transforms_and_auto_serves_them(device):
    query, key, value = qkv(B, H, device=device)

    def norm(q, backend):
        return functional.attention(q, key[0], value[0], backend=backend).square().sum()

    with pytest.raises(UnsupportedInput, match=r"torch\.func transforms and forward-mode AD cannot pass"):
        torch.func.vmap(torch.func.grad(lambda q: norm(q, "triton")))(query)
    found = torch.func.vmap(torch.func.grad(lambda q: norm(q, "auto")))(query)
    expected = torch.stack([torch.func.grad(lambda q: norm(q, "reference"))(q) for q in query])
    torch.testing.assert_close(found, expected)


# Forward-mode AD scripts some of torch's own decompositions.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_torch_func_transforms_reach_through_auto():
    query, key, value = qkv(B, H, dtype=torch.float64)
    lengths = torch.tensor([3, N])
    each = torch.func.vmap(lambda q, k, v, n: functional.attention(q[None], k[None], v[None], key_lengths=n[None])[0])
    batched = functional.attention(query, key, value, key_lengths=lengths)
    torch.testing.assert_close(each(query, key, value, lengths), batched)

    def attend(q):
        return functional.attention(q, key, value)

    _, along = torch.func.jvp(attend, (query,), (query,))
    step = 1e-6
    torch.testing.assert_close(along, (attend(query * (1 + step)) - attend(query * (1 - step))) / (2 * step))


@pytest.mark.kernels
def test_eager_auto_never_runs_the_interpreter(monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(autograd_attention, "attention", refuse)
    monkeypatch.setattr(autograd_recurrence, "layer", refuse)
    functional.attention(*qkv(B, H), return_lse=True)
    seqcore.nn.MultiheadAttention(D, 1)(*[torch.randn(3, D)] * 3)
    seqcore.nn.LSTM(D, 3)(torch.randn(2, 1, D))
    with pytest.raises(AssertionError, match="a kernel ran"):
        functional.attention(*qkv(B, H), backend="triton")


class Model(nn.Module):
    """A recurrence, an attention module and an attention function, one after the other."""

    def __init__(self):
        super().__init__()
        self.gru = seqcore.nn.GRU(D, D, batch_first=True)
        self.attention = seqcore.nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        x, _ = self.gru(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return functional.attention(x, x, x, window=(2, 0))


def test_explain_tells_of_every_call_in_a_model():
    model, x = Model(), torch.randn(B, M, D)
    explanations = seqcore.explain(model, x)
    assert [e.request.operation for e in explanations] == ["gru", "attention", "attention"]
    assert [e.chosen for e in explanations] == ["aten", "aten", "reference"]
    said = str(explanations)
    assert "gru on cpu in torch.float32, no extras; asked for 'auto'" in said
    assert "attention on cpu in torch.float32, window; asked for 'auto'" in said
    assert said.count("->") == 3 and said.count("needs a GPU, got cpu tensors") == 3


def test_explain_asks_for_a_gpu_that_is_not_here():
    model, x = Model(), torch.randn(B, M, D)
    explanations = seqcore.explain(model, x, device=Device("sm_90"))
    assert [e.request.device.arch for e in explanations] == ["sm_90"] * 3
    assert explanations[2].chosen == "triton"
    assert "needs a GPU" not in str(explanations)
    old = seqcore.explain(model, x, device=Device("sm_70"))
    assert all("needs compute capability 8.0 or newer, got sm_70" in e.notes["triton"] for e in old)


def test_explain_says_where_nothing_was_measured():
    (explanation,) = seqcore.explain(functional.attention, *qkv(B, H), device=Device("sm_123"))
    assert explanation.chosen == "aten"
    assert "unmeasured here: no table was measured on sm_123" in explanation.notes["triton"]


def test_explain_goes_on_after_a_backend_that_cannot_serve():
    model, x = Model(), torch.randn(B, M, D)
    model.attention.backend = "triton"
    explanations = seqcore.explain(model, x)
    assert [e.chosen for e in explanations] == ["aten", None, "reference"]
    assert "raises UnsupportedInput" in str(explanations[1]) and "->" not in str(explanations[1])
    with pytest.raises(UnsupportedInput):
        model(x)


def test_explain_leaves_no_trace():
    with pytest.raises(InvalidInput):
        seqcore.explain(functional.attention, torch.randn(3), None, None, device=Device("sm_90"))
    assert backends._local.explanations is None and backends._local.pretend is None
    inner = []

    def nested(x):
        inner.extend(seqcore.explain(functional.attention, x, x, x))
        return functional.attention(x, x, x)

    assert len(seqcore.explain(nested, torch.randn(3, D))) == len(inner) == 1


def test_explain_where_seqcore_is_not_called():
    module, x = seqcore.nn.MultiheadAttention(D, 1, backend="aten"), torch.randn(3, D)
    explanations = seqcore.explain(module, x, x, x)
    assert not explanations and "no seqcore operation was called; with backend='aten'" in str(explanations)


@pytest.mark.kernels
def test_explain_tells_that_auto_does_not_interpret():
    if not INTERPRETED:
        pytest.skip("nothing is interpreted in this process")
    (explanation,) = seqcore.explain(functional.attention, *qkv(B, H))
    assert explanation.chosen == "aten"
    assert "interpreted, but only when asked for by name" in explanation.notes["triton"]
    assert chosen(backend="triton") == "triton"
    (explanation,) = seqcore.explain(functional.attention, *qkv(B, H, dtype=torch.bfloat16), backend="triton")
    assert explanation.chosen is None and "miscomputes bfloat16" in explanation.notes["triton"]
