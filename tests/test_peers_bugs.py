"""What the trackers of other libraries tell of, held to here; the promise in tests/trust/peers.py names the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from seqcore import functional
from seqcore.devices import INTERPRETED
from seqcore.kernels.tuning import Device
from seqcore.nn import MultiheadAttention
from seqcore.testing.launches import noted_for

from .attention_twins import assert_like_torch, attending, ends, qkv
from .comparisons import assert_equal_in_float64, assert_within, cotangents
from .effort import effort, tried
from .recurrence_twins import CELLS, assert_alike, differing, mapped, ours, problem, results, tensors

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

BACKENDS = ["auto", "reference"]
SERVING = [*BACKENDS, pytest.param("triton", marks=pytest.mark.kernels)]
DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("lengths", [[0, 3, 0, 1, 0], [0] * 5], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS[1:], *SERVING[2:]])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_sequences_without_a_step(cell, backend, lengths, device):
    """torch's pack_padded_sequence refuses them; here they give zeros, and the state that they were given."""
    twin, x, hx = problem(cell, H=4, device=device)
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(x, lengths, enforce_sorted=False)
    empty = torch.tensor(lengths, device=device) == 0
    leaves = [t.requires_grad_() for t in (x, *tensors(hx))]
    y, states = ours(twin, backend)(x, hx, lengths=torch.tensor(lengths, device=device))
    for state, given in zip(tensors(states), tensors(hx), strict=True):
        assert torch.equal(state[:, empty], given[:, empty])
    assert not y[:, empty].any()
    weights = cotangents(tensors(states))
    dx, *dstates = torch.autograd.grad(tensors(states), leaves, weights)
    assert not dx[:, empty].any()
    for gradient, weight in zip(dstates, weights, strict=True):
        assert torch.equal(gradient[:, empty], weight[:, empty])


@pytest.mark.parametrize("backend", SERVING)
def test_packed_sequences_of_which_some_are_empty(backend, device):
    """Of queries, of keys, of both; first, last, and two in a row."""
    inputs = qkv(2, M=5, N=6, D=8, device=device)
    cuts = [[0, 2, 0, 0, 3, 0], [1, 0, 2, 0, 3, 0]]
    ends_q, ends_k = (ends(*cut).to(device) for cut in cuts)
    found = functional.attention(*inputs, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, return_lse=True, backend=backend)
    assert not found[0][:, :2].any() and found[1][:, :2].isneginf().all()
    alone = functional.attention(*(t[:, -3:] for t in inputs), return_lse=True, backend=backend)
    for whole, part in zip(found, alone, strict=True):
        torch.testing.assert_close(whole[:, -3:], part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_dropout_between_layers_repeats_bit_for_bit(cell, backend):
    """cuDNN's drops other elements under the same seed where its state was kept."""
    twin, x, hx = problem(cell, num_layers=3, dropout=0.5, bidirectional=True)
    module = ours(twin, backend)

    def run():
        torch.manual_seed(5)
        return results(module, x, hx)

    first = run()
    results(module, x, hx)
    assert not differing(run(), first)
    assert differing(results(module, x, hx), first)


@pytest.mark.parametrize("options", [{"dropout_seed": 5}, {}], ids=["a seed", "torch's generator"])
@pytest.mark.parametrize("backend", ["reference", SERVING[-1]])
def test_dropout_of_attention_repeats_bit_for_bit(backend, options, device):
    inputs = [t.requires_grad_() for t in qkv(1, 2, M=5, N=9, D=8, device=device)]

    def run(seed):
        if not options:
            torch.manual_seed(seed)
        given = {name: value + seed for name, value in options.items()}
        out = functional.attention(*inputs, dropout_p=0.4, **given, backend=backend)
        return dict(enumerate((out, *torch.autograd.grad(out, inputs, cotangents([out])))))

    first = run(1)
    assert differing(run(2), first)
    assert not differing(run(1), first)


@torch.no_grad()
def test_more_steps_than_65535():
    """cuDNN's limit, 2^16 - 1, in whatever counts steps by 16 bits; the kernels' own are tried on a GPU."""
    for H in range(1, effort(2, 5)):
        tried()
        twin, x, hx = problem("gru", T=65_537, B=1, I=2, H=H, **DOUBLE)
        found, expected = (dict(enumerate(each(x, hx))) for each in (ours(twin, "reference"), twin))
        assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("m, n", [(2, 65_537), (65_537, 2)])
def test_more_queries_and_keys_than_65535(m, n):
    for backend in BACKENDS:
        assert_like_torch(attending(backend), *qkv(1, 1, M=m, N=n, D=2), weigh=("out",))


@pytest.mark.skipif(INTERPRETED, reason="watches launches, and interprets none")
@pytest.mark.parametrize("batch, heads", [(65_537, 1), (1, 65_537), (257, 257)])
def test_more_heads_than_a_grids_second_dimension_has_room_for(batch, heads):
    """SDPA's kernels put batch * heads into a dimension of 65,535 programs: "invalid configuration argument"."""
    inputs = [torch.zeros(batch, heads, 1, 16, requires_grad=True) for _ in range(3)]
    with noted_for(Device("sm_90")) as launches:
        functional.attention(*inputs, backend="triton").sum().backward()
    assert len(launches) >= 4
    assert all(len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31 for launch in launches)
    out = functional.attention(*inputs, backend="reference")
    assert out.shape == (batch, heads, 1, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_means_nothing_without_a_batch(cell, backend):
    twin, x, hx = problem(cell, batch_first=True, num_layers=2, bidirectional=True, **DOUBLE)
    x, hx = x[0], mapped(lambda t: t[:, 0], hx)
    assert not any(t.is_contiguous() for t in tensors(hx))
    module = ours(twin, backend)
    assert_equal_in_float64(results(module, x, hx), results(twin, x, hx))
    assert_equal_in_float64(results(module, x), results(twin, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", ["gru", "lstm_proj"])
def test_a_batch_of_none_with_a_state_that_lies_apart(cell, backend):
    twin, x, hx = problem(cell, B=0, num_layers=2)
    hx = mapped(lambda t: torch.empty(0, *t.shape[::2]).transpose(0, 1), hx)
    assert_alike(ours(twin, backend), twin, x, hx)


@pytest.mark.parametrize("batch, m, n", [(0, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_module_on_nothing(backend, need_weights, batch, m, n):
    twin = nn.MultiheadAttention(6, 2, batch_first=True)
    module = MultiheadAttention(6, 2, batch_first=True, backend=backend)
    module.load_state_dict(twin.state_dict())
    query, key = torch.randn(batch, m, 6, requires_grad=True), torch.randn(batch, n, 6)
    found, expected = (each(query, key, key, need_weights=need_weights) for each in (module, twin))
    assert [None if t is None else t.shape for t in found] == [None if t is None else t.shape for t in expected]
    found[0].sum().backward()
    assert not module.in_proj_weight.grad.any() and query.grad.shape == query.shape


@pytest.mark.parametrize("backend", SERVING)
def test_half_products_larger_than_half(backend, device):
    """A product of rows that half cannot hold, of which the scaled score is none: products are summed in float32."""
    query, key, value = qkv(1, 2, M=9, N=11, D=64, dtype=torch.float16, device=device)
    query, key = query.sign() * 40, key.sign() * 45
    query[..., :, :40] = key[..., :1, :40].sign() * 40
    assert (query.float() @ key.float().mT).abs().max() > torch.finfo(torch.float16).max
    found = assert_like_torch(attending(backend), query, key, value, weigh=("out",))
    assert found["out"].isfinite().all()


@pytest.mark.usefixtures("by_the_operators")
def test_what_backward_needs_and_was_written_since_is_told():
    """Custom functions that keep tensors on their context give wrong gradients without a word."""
    inputs = [t.requires_grad_() for t in qkv(1, 2)]
    out = functional.attention(*inputs)
    with torch.no_grad():
        inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_gradient_that_is_expanded():
    """An expanded gradient, stride 0 everywhere, as ``sum`` sends it: peers have read it as if it were contiguous."""
    for dtype in (torch.float32, torch.float16):
        inputs = qkv(2, 2, M=9, N=11, D=8, dtype=dtype)
        leaves, twins, exact = (
            [t.detach().clone().to(d).requires_grad_() for t in inputs] for d in (dtype, dtype, torch.float64)
        )
        functional.attention(*leaves, backend="reference").sum().backward()
        F.scaled_dot_product_attention(*twins).sum().backward()
        F.scaled_dot_product_attention(*exact).sum().backward()
        assert_within(*({str(i): t.grad for i, t in enumerate(each)} for each in (leaves, exact, twins)))
