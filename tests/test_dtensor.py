"""seqcore's operators on DTensors: divided by batch and by heads, the whole results and gradients are those of one."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils.rnn import PackedSequence

import seqcore
from seqcore.functional import attention

from .attention_twins import qkv
from .comparisons import cotangents
from .distributed_twins import DOUBLE, mesh
from .recurrence_twins import ours, torch_module

B, H, H_KV, M = 4, 8, 4, 6


def gradients(results, wanted):
    """Gradients of a fixed weighing of all results, on one process or on DTensors."""
    weights = cotangents([torch.empty(t.shape, **DOUBLE) for t in results])
    weights = [
        distribute_tensor(w, t.device_mesh, [Replicate()] * t.device_mesh.ndim) if isinstance(t, DTensor) else w
        for w, t in zip(weights, results, strict=True)
    ]
    return torch.autograd.grad(sum((t * w).sum() for t, w in zip(results, weights, strict=True)), wanted)


def assert_whole(actual, expected):
    for found, whole in zip(actual, expected, strict=True):
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), whole)


def divided(tensors, on, placements):
    return [distribute_tensor(t.detach(), on, placements).requires_grad_() for t in tensors]


# --- attention -----------------------------------------------------------------------------------------------------

PLACES = {
    "batch": ([Shard(0)], Shard(0)),
    "heads": ([Shard(1)], Shard(1)),
    "rows": ([Shard(2)], Replicate()),
    "whole": ([Replicate()], Replicate()),
}
VARIANTS = {
    "plain": (H_KV, ()),
    "one key head": (1, ()),
    "mask of heads": (H_KV, (1, H, M, M)),
    "mask of the batch": (H_KV, (B, 1, M, 1)),
}


def attention_job(placements, expected_placement, heads_kv, mask_shape):
    on, ranks = mesh(dist.get_world_size()), dist.get_world_size()
    leaves = [t.requires_grad_() for t in qkv(B, H, heads_kv=heads_kv, M=M, N=M, **DOUBLE)]
    shapes = [(H,), mask_shape] if mask_shape else [(H,)]
    vectors = [torch.randn(shape, **DOUBLE).requires_grad_() for shape in shapes]

    def run(tensors, sinks, mask=None):
        lengths = torch.tensor([6, 2, 5, 1])
        return attention(*tensors, sinks=sinks, attn_mask=mask, key_lengths=lengths, enable_gqa=True, return_lse=True)

    expected = run(leaves, *vectors)
    parts = [*divided(leaves, on, [Replicate()]), *divided(vectors, on, [Replicate()])]
    one_head = heads_kv == 1 and placements == [Shard(1)]
    parts[: 1 if one_head else 3] = divided(leaves[: 1 if one_head else 3], on, placements)
    actual = run(parts[:3], *parts[3:])
    assert_whole(actual, expected)
    assert actual[0].placements == (expected_placement,)
    found = gradients(actual, parts)
    assert_whole(found, gradients(expected, [*leaves, *vectors]))
    if expected_placement == Shard(0) and ranks > 1:
        assert found[3].placements == (Partial(),)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("size", [2, 4])
def test_attention(processes, size, place, variant):
    processes(size).run(attention_job, *place, *variant)


def two_dimensions_job():
    on = mesh(2, 2, names=("data", "heads"))
    leaves = [t.requires_grad_() for t in qkv(B, H, heads_kv=H_KV, M=M, N=M, **DOUBLE)]
    parts = divided(leaves, on, [Shard(0), Shard(1)])
    with CommDebugMode() as said:
        actual = attention(*parts, causal="top_left", window=(2, None), enable_gqa=True)
    assert actual.placements == (Shard(0), Shard(1)) and said.get_total_counts() == 0
    with CommDebugMode() as said:
        attention(*divided(leaves, on, [Shard(2), Shard(1)]), enable_gqa=True)
    assert said.get_total_counts() > 0
    expected = attention(*leaves, causal="top_left", window=(2, None), enable_gqa=True)
    assert_whole([actual], [expected])
    assert_whole(gradients([actual], parts), gradients([expected], leaves))


def test_a_mesh_of_two_dimensions_divides_both_and_sends_nothing(processes):
    processes(4).run(two_dimensions_job)


def three_heads_job():
    on = mesh(2)
    leaves = qkv(B, 3, M=M, N=M, **DOUBLE)
    actual = attention(*divided(leaves, on, [Shard(1)]))
    assert actual.placements == (Replicate(),)
    assert_whole([actual], [attention(*leaves)])


def test_heads_that_do_not_divide_are_made_whole(processes):
    processes(2).run(three_heads_job)


def dropout_job():
    on, ones = mesh(2), torch.ones(B, H, M, M, **DOUBLE)
    parts = divided([ones] * 3, on, [Shard(0)])
    kept = attention(*parts, dropout_p=0.5, dropout_seed=3).full_tensor()
    assert not torch.equal(kept[: B // 2], kept[B // 2 :])
    assert torch.equal(kept, attention(*parts, dropout_p=0.5, dropout_seed=3).full_tensor())
    with pytest.raises(seqcore.InvalidInput, match=r"DTensors needs dropout_seed=, the same on all processes"):
        attention(*parts, dropout_p=0.5)


def test_dropout_differs_between_processes(processes):
    processes(2).run(dropout_job)


def mesh_dropout_job():
    """Each of four processes has its own part, and drops by itself; backward drops what forward did."""
    on, size = mesh(2, 2), 16
    ones = torch.ones(2, 2, size, size, **DOUBLE)
    q, k, v = divided([torch.zeros_like(ones)] * 2 + [ones], on, [Shard(0), Shard(1)])
    out = attention(q, k, v, dropout_p=0.5, dropout_seed=3)
    rows = out.full_tensor()[..., 0].flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 4
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv.full_tensor().sum((2, 3)), out.full_tensor().sum((2, 3)))


def test_dropout_on_a_mesh_of_two_dimensions(processes):
    processes(4).run(mesh_dropout_job)


def gradients_placed_otherwise_job():
    """A whole call's gradients may come divided, and a divided call's whole."""
    on = mesh(2)
    module = ours(torch_module("gru", hidden=6, **DOUBLE), None)
    x, weight = torch.randn(5, 4, 4, **DOUBLE), torch.randn(5, 4, 6, **DOUBLE)
    expected = torch.autograd.grad((module(x)[0] * weight).sum(), list(module.parameters()))
    distribute_module(module, on)
    q = torch.randn(B, H, M, M, **DOUBLE)
    mixed = torch.randn(B, H, M, M, **DOUBLE)
    options = {"dropout_p": 0.5, "dropout_seed": 3}
    for placement in (Replicate(), Shard(1), Shard(0)):
        for coming in (Replicate(), Shard(1)):
            y = module(distribute_tensor(x, on, [placement]))[0]
            found = torch.autograd.grad((y * distribute_tensor(weight, on, [coming])).sum(), list(module.parameters()))
            assert_whole(found, expected)
        (v,) = divided([q], on, [placement])
        out = attention(v.detach(), v.detach(), v, **options)
        dv = [
            torch.autograd.grad(out, v, distribute_tensor(mixed, on, [coming]), retain_graph=True)[0].full_tensor()
            for coming in (Replicate(), Shard(0), Shard(1))
        ]
        torch.testing.assert_close(dv[1:], dv[:1] * 2)


def test_gradients_may_be_placed_otherwise_than_results(processes):
    processes(2).run(gradients_placed_otherwise_job)


def packed_job():
    """What is laid end to end, or brings states to reset to, is divided by heads alone, or not at all."""
    on = mesh(2)
    leaves = [t.requires_grad_() for t in qkv(H, heads_kv=H_KV, M=7, N=7, **DOUBLE)]
    options = {"cu_seqlens_q": torch.tensor([0, 3, 7]), "cu_seqlens_k": torch.tensor([0, 3, 7]), "enable_gqa": True}
    for placement in (Shard(0), Shard(1)):
        parts = divided(leaves, on, [placement])
        actual, expected = attention(*parts, **options), attention(*leaves, **options)
        assert_whole([actual], [expected])
        assert_whole(gradients([actual], parts), gradients([expected], leaves))
    module = ours(torch_module("gru", hidden=6, **DOUBLE), None)
    x, reset = torch.randn(5, 4, 4, **DOUBLE), torch.rand(5, 4) < 0.4
    hx, reset_hx = torch.randn(2, 1, 4, 6, **DOUBLE)
    data, sizes = torch.randn(6, 4, **DOUBLE), torch.tensor([3, 2, 1])
    expected = module(x, hx, reset=reset, reset_hx=reset_hx)[0], module(PackedSequence(data, sizes))[0].data
    distribute_module(module, on)
    place = lambda t, *dims: distribute_tensor(t, on, [Shard(*dims) if dims else Replicate()])
    actual = (
        module(place(x, 1), place(hx, 1), reset=reset, reset_hx=place(reset_hx, 1))[0],
        module(PackedSequence(place(data, 0), sizes), place(torch.zeros(1, 3, 6, **DOUBLE)))[0].data,
    )
    assert_whole(actual, expected)


def test_what_is_laid_end_to_end(processes):
    processes(2).run(packed_job)


def plain_parameters_job():
    on, module = mesh(2), ours(torch_module("gru", hidden=6, **DOUBLE), None)
    x = torch.randn(5, 4, 4, **DOUBLE)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    y = module(distribute_tensor(x, on, [Shard(1)]))[0]
    found = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert not any(isinstance(t, DTensor) for t in found)
    torch.testing.assert_close(found, expected)
    leaves, sinks = qkv(B, H, heads_kv=H_KV, M=M, N=M, **DOUBLE), torch.randn(H, **DOUBLE)
    for wanted in (True, False):
        whole, plain = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
        mine, own = (sinks.clone().requires_grad_(wanted) for _ in range(2))
        parts = divided(plain, on, [Shard(1)])
        attention(*parts, sinks=own, enable_gqa=True).sum().backward()
        attention(*whole, sinks=mine, enable_gqa=True).sum().backward()
        assert_whole([t.grad for t in parts], [t.grad for t in whole])
        assert not wanted or torch.allclose(own.grad, mine.grad)


def test_plain_parameters_get_plain_gradients(processes):
    processes(2).run(plain_parameters_job)


def weights_job():
    on = mesh(2)
    leaves = [t.requires_grad_() for t in qkv(B, H, heads_kv=H_KV, M=M, N=M, **DOUBLE)]
    for placement in (Shard(0), Shard(1)):
        parts = divided(leaves, on, [placement])
        actual = attention(*parts, enable_gqa=True, return_weights="average")
        expected = attention(*leaves, enable_gqa=True, return_weights="average")
        assert_whole(actual, expected)
        assert_whole(gradients(actual, parts), gradients(expected, leaves))
    options = {"enable_gqa": True, "dropout_p": 0.5, "dropout_seed": 3}
    with pytest.raises(seqcore.UnsupportedInput, match="divide by batch, or pass dropout_p=0"):
        attention(*parts, **options, return_weights="average")
    with pytest.raises(seqcore.UnsupportedInput, match="'per_head' is plain PyTorch"):
        attention(*parts, enable_gqa=True, return_weights="per_head")


def test_averaged_weights(processes):
    processes(2).run(weights_job)


class Attend(nn.Module):
    """Self-attention as people write it for tensor parallelism: projections by head, one product after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, **DOUBLE) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(attention(q, k, v, causal="top_left").transpose(1, 2).flatten(2))

    @property
    def head_dim(self) -> int:
        return self.q.weight.shape[1] // self.heads


def tensor_parallel_job(local: bool):
    on = mesh(dist.get_world_size())
    torch.manual_seed(1)
    whole, x = Attend(16, H), torch.randn(B, M, 16, **DOUBLE)
    expected = whole(x)
    expected.square().sum().backward()
    divided_layer = Attend(16, H)
    divided_layer.load_state_dict(whole.state_dict())
    plan = {name: ColwiseParallel(use_local_output=local) for name in "qkv"} | {"out": RowwiseParallel()}
    parallelize_module(divided_layer, on, plan)
    actual = divided_layer(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    for part, one in zip(divided_layer.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(part.grad.full_tensor(), one.grad)


@pytest.mark.parametrize("local", [True, False], ids=["local", "dtensor"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_heads(processes, size, local):
    processes(size).run(tensor_parallel_job, local)


# --- recurrence ----------------------------------------------------------------------------------------------------


def recurrence_job(cell: str, batch: int, placement, expected_placement, options: dict):
    on = mesh(dist.get_world_size())
    torch.manual_seed(1)
    module = ours(torch_module(cell, hidden=6, num_layers=2, bidirectional=True, **DOUBLE), None)
    x = torch.randn(5, batch, 4, **DOUBLE).requires_grad_()

    def run(module, x):
        y, state = module(x, **options)
        return [y, *(state if isinstance(state, tuple) else (state,))]

    expected = run(module, x)
    wanted = gradients(expected, [x, *module.parameters()])
    distribute_module(module, on)
    (part,) = divided([x], on, [placement])
    actual = run(module, part)
    assert_whole(actual, expected)
    assert actual[0].placements == (expected_placement,)
    assert_whole(gradients(actual, [part, *module.parameters()]), wanted)


@pytest.mark.parametrize("placement, expected", [(Shard(1), Shard(1)), (Shard(0), Replicate())], ids=["batch", "time"])
@pytest.mark.parametrize("batch", [4, 3], ids=["even", "uneven"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm_proj"])
@pytest.mark.parametrize("size", [2, 4])
def test_recurrence(processes, size, cell, batch, placement, expected):
    processes(size).run(recurrence_job, cell, batch, placement, expected, {})


def test_recurrence_with_lengths_and_resets(processes):
    options = {"lengths": torch.tensor([5, 2, 0]), "reset": torch.rand(5, 3) < 0.4}
    processes(2).run(recurrence_job, "lstm", 3, Shard(1), Shard(1), options)


def zoneout_job():
    on = mesh(2)
    module = ours(torch_module("lstm", hidden=6, bidirectional=True, **DOUBLE), None, zoneout=(0.5, 0.2))
    alike = torch.randn(5, 1, 4, **DOUBLE).expand(5, 4, 4)
    expected = module.eval()(alike)[0]
    distribute_module(module, on)
    (part,) = divided([alike], on, [Shard(1)])
    assert_whole([module(part)[0]], [expected])
    drawn = module.train()(part)[0]
    assert drawn.placements == (Shard(1),)
    gradients([drawn], [part, *module.parameters()])
    whole = drawn.full_tensor()
    assert not any(torch.equal(whole[:, a], whole[:, b]) for a in range(4) for b in range(a))


def test_zoneout_draws_apart_for_every_sequence(processes):
    processes(2).run(zoneout_job)


def refused_job():
    on = mesh(2)
    gru, x = seqcore.nn.GRU(4, 6), torch.randn(5, 4, 4)
    distribute_module(gru, on)
    part = distribute_tensor(x, on, [Shard(1)])
    for backend, reason in (("aten", "recurrences take no DTensors"), ("reference", "do not mix with DTensors")):
        gru.backend = backend
        with pytest.raises(seqcore.UnsupportedInput, match=reason):
            gru(part)
    other = distribute_tensor(x, mesh(1, 2), [Replicate(), Shard(1)])
    gru.backend = None
    with pytest.raises(seqcore.InvalidInput, match="must be on one mesh, got several"):
        gru(other)


def test_what_cannot_be_divided_says_so(processes):
    processes(2).run(refused_job)


def compile_job(backend: str):
    torch._dynamo.reset()
    on = mesh(2)
    leaves = [t.requires_grad_() for t in qkv(B, H, heads_kv=H_KV, M=M, N=M, **DOUBLE)]
    parts = divided(leaves, on, [Shard(1)])
    # With all results in the loss: torch cannot compile a backward that a DTensor gets no gradient for.
    run = partial(attention, window=(2, 2), enable_gqa=True, return_lse=True)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    actual, expected = compiled(*parts), run(*leaves)
    assert_whole(actual, expected)
    assert_whole(gradients(actual, parts), gradients(expected, leaves))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled(processes, backend):
    processes(2).run(compile_job, backend)
