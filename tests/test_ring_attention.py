"""Ring and Ulysses attention on several processes equal attention on one, forward and backward."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

import seqcore
from seqcore.devices import INTERPRETED
from seqcore.distributed import cost, gather_sequence, ring_attention, shard_sequence, ulysses_attention
from seqcore.functional import attention
from seqcore.testing.traffic import Traffic

from .attention_twins import qkv
from .comparisons import assert_within, cotangents
from .distributed_twins import DOUBLE, assert_parts, mesh, parts

B, H, H_KV, DV = 2, 8, 4, 5
SIZES = [2, 4]


def inputs(dtype=torch.float64, rows: int = 8):
    """Query, key and value of the whole sequence, as leaves, and sinks."""
    length = rows * dist.get_world_size()
    leaves = qkv(B, H, heads_kv=H_KV, M=length, N=length, DV=DV, dtype=dtype)
    return [t.requires_grad_() for t in leaves], torch.randn(H, dtype=dtype).requires_grad_()


def weighted(results, layout: str | None = None):
    """The sum of all results times fixed numbers; of this process's rows, if a layout says which they are."""
    ranks = 1 if layout is None else dist.get_world_size()
    whole = [t.new_empty(*t.shape[:2], t.shape[2] * ranks, *t.shape[3:]) for t in results]
    weights = cotangents(whole) if layout is None else [shard_sequence(w, 2, None, layout) for w in cotangents(whole)]
    return sum((t * w).sum() for t, w in zip(results, weights, strict=True))


OPTIONS = {
    "plain": {},
    "capped": {"softcap": 3.0, "scale": 0.4},
    "sinks": {"sinks": True},
}


def ring_job(causal: bool, layout: str, options: dict):
    leaves, sinks = inputs()
    given = options | ({"sinks": sinks} if "sinks" in options else {})
    expected = attention(*leaves, **given, causal="top_left" if causal else None, enable_gqa=True, return_lse=True)
    weighted(expected).backward()
    local, mine = parts(leaves, layout), sinks.detach().requires_grad_()
    given = options | ({"sinks": mine} if "sinks" in options else {})
    actual = ring_attention(*local, **given, causal=causal, layout=layout, enable_gqa=True, return_lse=True)
    weighted(actual, layout).backward()
    assert_parts(actual, expected, layout)
    assert_parts([t.grad for t in local], [t.grad for t in leaves], layout)
    if "sinks" in options:
        dist.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, sinks.grad)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", SIZES)
def test_ring_attention_equals_one_process(processes, size, layout, causal, options):
    processes(size).run(ring_job, causal, layout, options)


def half_precision_job(dtype):
    leaves, _ = inputs(dtype)
    doubled = [t.detach().double().requires_grad_() for t in leaves]

    def found(function, tensors, layout):
        results = function(*tensors)
        gradients = torch.autograd.grad(weighted(results, layout), tensors)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (*results, *gradients), strict=True))

    options = {"enable_gqa": True, "return_lse": True}
    single = partial(attention, causal="top_left", backend="reference", **options)
    ring = partial(ring_attention, causal=True, layout="zigzag", **options)
    eager, exact = found(single, leaves, None), found(single, doubled, None)
    actual = found(ring, parts(leaves, "zigzag"), "zigzag")
    assert_within({name: gather_sequence(t, 2, None, "zigzag") for name, t in actual.items()}, exact, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ring_attention_stays_within_the_error_budget(processes, dtype):
    processes(4).run(half_precision_job, dtype)


def ulysses_job(double_backward: bool):
    leaves, sinks = inputs()
    length = leaves[0].shape[2]
    mask = torch.linspace(-2, 2, H * length * length, **DOUBLE).reshape(H, length, length).requires_grad_()
    options = {
        "causal": "top_left", "window": (7, None), "return_lse": True, "enable_gqa": True,
        "key_lengths": torch.tensor([length, length // 2]),
    }  # fmt: skip

    def gradients(results, layout, wanted):
        first = torch.autograd.grad(weighted(results, layout), wanted, create_graph=double_backward)
        if not double_backward:
            return first
        penalty = sum(g.square().sum() for g in first[:3])
        return torch.autograd.grad(penalty, wanted)

    slopes = torch.linspace(0.1, 1, H, **DOUBLE)
    expected = attention(*leaves, sinks=sinks, attn_mask=mask, alibi_slopes=slopes, **options)
    wanted = gradients(expected, None, [*leaves, sinks, mask])
    local, mine = parts(leaves), [t.detach().requires_grad_() for t in (sinks, mask)]
    actual = ulysses_attention(*local, sinks=mine[0], attn_mask=mine[1], alibi_slopes=slopes, **options)
    found = gradients(actual, "contiguous", [*local, *mine])
    assert_parts(actual, expected)
    assert_parts(found[:3], wanted[:3])
    for part, whole in zip(found[3:], wanted[3:], strict=True):
        dist.all_reduce(part)
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("double_backward", [False, True], ids=["backward", "twice"])
@pytest.mark.parametrize("size", SIZES)
def test_ulysses_attention_equals_one_process(processes, size, double_backward):
    processes(size).run(ulysses_job, double_backward)


def dropout_job():
    leaves, _ = inputs()
    local = parts(leaves)
    once, again = (ulysses_attention(*local, enable_gqa=True, dropout_p=0.5, dropout_seed=3) for _ in range(2))
    other = ulysses_attention(*local, enable_gqa=True, dropout_p=0.5, dropout_seed=4)
    assert torch.equal(once, again) and not torch.equal(once, other)
    # Values of ones: what comes out is the sum of the weights that were kept.
    ones = torch.ones_like(local[2])
    alike = [torch.zeros_like(t) for t in local[:2]]
    kept = ulysses_attention(*alike, ones, enable_gqa=True, dropout_p=0.5, dropout_seed=3)
    heads = H // dist.get_world_size()
    # Of the processes' seeds, which they drew alike, as of one that was given.
    torch.manual_seed(5)
    drawn = ulysses_attention(*alike, ones, enable_gqa=True, dropout_p=0.5)
    for found in (kept, drawn):
        assert not torch.equal(found[:, :heads], found[:, heads : 2 * heads])


def test_ulysses_dropout_repeats_and_differs_between_processes(processes):
    processes(2).run(dropout_job)


def sub_groups_job():
    """Two groups of two, each with a sequence of its own."""
    on = mesh(2, 2, names=("data", "sequence"))["sequence"]
    torch.manual_seed(dist.get_rank() // 2)
    leaves = qkv(B, H, heads_kv=H_KV, M=8, N=8, **DOUBLE)
    expected = attention(*leaves, causal="top_left", enable_gqa=True)
    for layout in ("contiguous", "zigzag"):
        local = [shard_sequence(t, 2, on, layout) for t in leaves]
        found = ring_attention(*local, causal=True, layout=layout, enable_gqa=True, group=on)
        torch.testing.assert_close(gather_sequence(found, 2, on, layout), expected)
    local = [shard_sequence(t, 2, on) for t in leaves]
    whole = cost.Sequence(B, H, H_KV, 8, 8, leaves[0].shape[3], leaves[0].shape[3], 8)
    with Traffic() as traffic:
        found = ulysses_attention(*local, causal="top_left", enable_gqa=True, group=on)
    assert traffic.total == cost.ulysses_attention(whole, 2, "forward").bytes
    torch.testing.assert_close(gather_sequence(found, 2, on), expected)
    alone = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(seqcore.InvalidInput, match=f"this process, {dist.get_rank()}, is not in the group"):
            ring_attention(*local, enable_gqa=True, group=alone)


def test_groups_within_the_world(processes):
    processes(4).run(sub_groups_job)


def frozen_job():
    """Where keys and values want no gradient, none travels."""
    leaves, _ = inputs()
    q, k, v = parts(leaves)
    k, v = k.detach(), v.detach()
    with Traffic() as forward, torch.no_grad():
        ring_attention(q, k, v, enable_gqa=True)
    with Traffic() as training:
        ring_attention(q, k, v, enable_gqa=True).sum().backward()
    assert training.total == 2 * forward.total
    (dq,) = torch.autograd.grad(attention(*leaves, enable_gqa=True).sum(), leaves[0])
    assert_parts([q.grad], [dq])


def test_frozen_keys(processes):
    processes(2).run(frozen_job)


# --- what is sent --------------------------------------------------------------------------------------------------


def traffic_job(name: str, dtype, causal: bool):
    leaves, _ = inputs(dtype)
    W, length = dist.get_world_size(), leaves[0].shape[2]
    whole = cost.Sequence(B, H, H_KV, length, length, leaves[0].shape[3], DV, dtype.itemsize)
    local = parts(leaves)
    if name == "ring":
        run, expect = lambda: ring_attention(*local, causal=causal, enable_gqa=True), cost.ring_attention
    else:
        options = {"causal": "top_left" if causal else None, "enable_gqa": True}
        run, expect = lambda: ulysses_attention(*local, **options), cost.ulysses_attention
    with Traffic() as forward, torch.no_grad():
        run()
    with Traffic() as training:
        run().sum().backward()
    assert forward.total == expect(whole, W, "forward", causal).bytes > 0
    assert training.total == expect(whole, W, "training", causal).bytes


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ring", "ulysses"])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_sent_are_those_of_the_cost_model(processes, size, name, dtype, causal):
    processes(size).run(traffic_job, name, dtype, causal)


def test_zigzag_gives_every_process_the_same_work():
    whole = cost.Sequence(B, H, H, 4096, 4096, 64, 64, 2)
    even = cost.ring_attention(whole, 4, "forward", causal=True, layout="zigzag").flops
    uneven = cost.ring_attention(whole, 4, "forward", causal=True).flops
    assert even == whole.flops(4096 * 4097 / 2, "forward") / 4
    # The last of four processes sees keys 1 … 4 of 4, all processes together 1, 2, 3 and 4, in halves of the diagonal.
    assert uneven / even == pytest.approx(3.5 / 2, rel=1e-3)


def test_a_ring_waits_for_less_the_longer_its_parts_are():
    """By the rule of docs/distributed.md: at least (2/e) (H/H_kv) (M/W) flops for each byte sent forward."""
    for length in (1024, 8192):
        whole = cost.Sequence(1, H, H_KV, length, length, 64, 64, 2)
        ring = cost.ring_attention(whole, 4, "forward")
        assert ring.flops / ring.bytes == pytest.approx(H / H_KV * length / 4 * 4 / 3)
        assert ring.waiting(ring.flops, ring.bytes) == 1 and ring.waiting(ring.flops, 2 * ring.bytes) == 0.5


# --- errors --------------------------------------------------------------------------------------------------------


def errors_job():
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 6, 8)
    for call, message in (
        (lambda: ring_attention(q[0], q[0], q[0]), r"must be \[B, heads, rows, width\], got \[\[3, 4, 8\]"),
        (lambda: ring_attention(q, k, k, causal=True), "as many keys as queries, got 4 and 6"),
        (lambda: ring_attention(q, q, q, layout="striped"), "'contiguous' or 'zigzag', got 'striped'"),
        (lambda: ring_attention(q[:, :, :3], q, q, layout="zigzag"), "two chunks .* got 3 queries and 4 keys"),
        (lambda: ring_attention(q, q, q, sinks=torch.ones(2)), "sinks"),
        (lambda: ring_attention(q[:, :1], q, q), r"nothing broadcasts here; .* got \[\[1, 1, 4, 8\], \[1, 3, 4, 8\]"),
        (lambda: ring_attention(q, q.expand(2, 3, 4, 8), q), "nothing broadcasts here"),
        (lambda: ring_attention(*[distribute_tensor(q, mesh(2))] * 3), "got a DTensor; pass its to_local"),
        (lambda: ulysses_attention(q, q, q), "must divide the heads of query, got 3; use ring_attention"),
        (lambda: ulysses_attention(q[:, :2], q[:, :2], q[:, :2], return_weights="average"), "takes no return_weights"),
        (lambda: shard_sequence(q, 1), "take a length that 2 divides, got 3; pad it"),
    ):
        with pytest.raises(seqcore.InvalidInput, match=message):
            call()
    leaf = torch.randn(1, 2, 4, 8, requires_grad=True)
    with pytest.raises(seqcore.UnsupportedInput, match="differentiated once, got create_graph=True; ulysses_attention"):
        torch.autograd.grad(ring_attention(leaf, leaf, leaf).sum(), leaf, create_graph=True)


def test_wrong_input_is_refused_before_anything_is_sent(processes):
    processes(2).run(errors_job)


def test_without_a_process_group():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(seqcore.InvalidInput, match=r"needs a process group, got none; call .*init_process_group"):
        ring_attention(q, q, q)


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="the processes' tensors are on the CPU")
def test_ring_attention_on_the_kernels(processes):
    processes(2).run(half_precision_job, torch.float32)
