"""The cache of keys and values: attention over it equals attention over the whole sequence, step by step."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from seqcore import InvalidInput
from seqcore.devices import INTERPRETED
from seqcore.functional import attention
from seqcore.nn import KVCache

from .attention_twins import qkv

# Dynamo makes an instance of an autograd Function for itself, of which torch's own eager mode warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

DOUBLE = {"dtype": torch.float64}
B, H, KV, N, D, DV = 3, 4, 2, 12, 6, 5
LENGTHS = torch.tensor([5, 1, 3])


def tokens(M, B=B, **options):
    return qkv(B, H, heads_kv=KV, M=M, N=M, D=D, DV=DV, **(DOUBLE | options))


def new_cache(B=B, **options):
    return KVCache(B, KV, N, D, DV, **(DOUBLE | options))


def attend(cache, q, k, v, lengths=None, **options):
    keys, values, key_lengths = cache.update(k, v, lengths)
    options = {"causal": "lower_right", "enable_gqa": True} | options
    return attention(q, keys, values, query_lengths=lengths, key_lengths=key_lengths, **options)


def steps(cache, q, k, v, sizes, **options):
    """Attention over a sequence handed to the cache in pieces of these sizes."""
    pieces = zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True)
    return torch.cat([attend(cache, *piece, **options) for piece in pieces], 2)


# --- what is attended to -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[12], [5] + [1] * 7, [1] * 12, [3, 4, 5]], ids=str)
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_pieces_equal_the_whole(sizes, window):
    q, k, v = tokens(12)
    whole = attention(q, k, v, causal="top_left", enable_gqa=True, window=window)
    torch.testing.assert_close(steps(new_cache(), q, k, v, sizes, window=window), whole)


def test_ragged_prompts_then_single_tokens():
    q, k, v = tokens(9)
    cache, (head, tail) = new_cache(), zip(*(t.split([5, 4], 2) for t in (q, k, v)), strict=True)
    padded = [t.masked_fill(torch.arange(5)[:, None] >= LENGTHS[:, None, None, None], float("nan")) for t in head]
    prefill = attend(cache, torch.nan_to_num(padded[0]), *padded[1:], LENGTHS)
    found = [prefill, steps(cache, *tail, [1, 1, 1, 1])]
    for b, length in enumerate(LENGTHS.tolist()):
        joined = [torch.cat([h[b, :, :length], t[b]], 1) for h, t in zip(head, tail, strict=True)]
        whole = attention(*joined, causal="top_left", enable_gqa=True)
        torch.testing.assert_close(torch.cat([found[0][b, :, :length], found[1][b]], 1), whole)
        assert not found[0][b, :, length:].any()
    assert cache.lengths.tolist() == (LENGTHS + 4).tolist()


def test_ragged_pieces_may_fill_a_sequence_and_leave_others_alone():
    cache, (_, k, v) = new_cache(), tokens(10)
    cache.update(k, v)
    full = torch.tensor([2, 0, 1])
    _, key, value = tokens(5)
    keys, values, lengths = cache.update(key, value, full.int())
    assert lengths.tolist() == [12, 10, 11]
    for b, count in enumerate(full.tolist()):
        for buffer, old, new in ((keys, k, key), (values, v, value)):
            assert torch.equal(buffer[b, :, : 10 + count], torch.cat([old[b], new[b, :, :count]], 1))
            assert not buffer[b, :, 10 + count :].any()


def test_a_full_sequence_may_stay_while_others_go_on():
    cache, (_, k, v) = new_cache(), tokens(12)
    cache.update(k, v, torch.tensor([12, 3, 12]))
    before = cache.keys.clone()
    _, key, value = tokens(1)
    cache.update(key, value, torch.tensor([0, 1, 0]))
    before[1, :, 3] = key[1, :, 0]
    assert torch.equal(cache.keys, before) and cache.lengths.tolist() == [12, 4, 12]


def test_update_hands_out_the_buffers_themselves():
    cache, (_, k, v) = new_cache(), tokens(2)
    addresses = [b.data_ptr() for b in cache.buffers()]
    for _ in range(2):
        assert [t.data_ptr() for t in cache.update(k, v)] == addresses
    cache.reset()
    assert [b.data_ptr() for b in cache.buffers()] == addresses


# --- no room -------------------------------------------------------------------------------------------------------


def test_an_eager_call_without_room_raises_before_it_writes():
    cache, (_, k, v) = new_cache(), tokens(6)
    cache.update(k, v)
    cache.update(k, v, torch.tensor([6, 0, 3]))
    before = copy.deepcopy(cache)
    with pytest.raises(
        InvalidInput, match="room for 12 tokens, got 13 with the 1 new ones; make the cache with a larger"
    ):
        cache.update(k[:, :, :1], v[:, :, :1])
    for found, expected in zip(cache.buffers(), before.buffers(), strict=True):
        assert torch.equal(found, expected)
    cache.update(k[:, :, :1], v[:, :, :1], torch.tensor([0, 1, 1]))


def test_a_bound_is_kept_where_lengths_are_not_to_be_read(monkeypatch):
    monkeypatch.setattr("seqcore.nn.cache.readable", lambda tensor: False)
    cache, (_, k, v) = new_cache(), tokens(6)
    reads = []
    monkeypatch.setattr("seqcore.nn.cache.int", lambda x: reads.append(x) or int(x), raising=False)
    cache.update(k, v)
    cache.update(k, v, torch.tensor([1, 2, 3]))
    assert not reads
    cache.update(k[:, :, :3], v[:, :, :3])
    assert cache.lengths.tolist() == [10, 11, 12] and len(reads) == 1
    with pytest.raises(InvalidInput, match="room for 12 tokens"):
        cache.update(k, v)
    reads.clear()
    cache.reset()
    cache.update(k, v)
    assert not reads


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("window", [None, (0, 0)], ids=["", "window"])
@pytest.mark.parametrize("filled, M", [(12, 1), (12, 3), (11, 3)])
def test_a_compiled_step_without_room_answers_nan_for_that_sequence_until_reset(filled, M, window):
    cache, (q, k, v) = new_cache(), tokens(12)
    cache.update(k, v, torch.tensor([filled, 4, 12 - M]))
    piece = [t[:, :, :M] for t in tokens(12)]
    expected = attend(copy.deepcopy(cache), *piece, torch.tensor([0, M, M]), window=window)
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = run(cache, *piece, window=window)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], expected[1:])
    assert cache.lengths.tolist() == [12, 4 + M, 12]
    cache.reset(0)
    only = torch.tensor([12, 0, 0])
    assert torch.equal(attend(cache, q, k, v, only)[0], attend(new_cache(), q, k, v, only)[0])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("wrong", [4, -1])
def test_a_compiled_prefill_of_impossible_lengths_answers_nan(wrong):
    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    cache = new_cache()
    assert run(cache, *tokens(3), torch.tensor([wrong, 2, 3]), query_lengths=None)[0].isnan().all()
    assert not cache.keys[1:].isnan().any() and cache.lengths.tolist() == [3, 2, 3]


# --- reset, reorder, truncate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, torch.tensor([1]), torch.tensor([1, 1]).int()], ids=str)
def test_reset_of_one_sequence(index):
    cache, (_, k, v) = new_cache(), tokens(4)
    cache.update(k, v)
    cache.reset(index)
    assert cache.lengths.tolist() == [4, 0, 4]
    assert torch.equal(cache.keys[::2, :, :4], k[::2]) and not cache.keys[1].any() and not cache.values[1].any()


def test_reset_of_all():
    cache, (_, k, v) = new_cache(), tokens(12)
    for _ in range(2):
        cache.update(k, v)
        cache.reset()
    assert not any(b.any() for b in cache.buffers())


def test_reorder_goes_on_from_the_chosen_beams():
    cache, prompt, index = new_cache(), tokens(5), torch.tensor([2, 2, 0])
    attend(cache, *prompt, LENGTHS)
    cache.reorder(index)
    other, piece = new_cache(), tokens(2)
    attend(other, *(t[index] for t in prompt), LENGTHS[index])
    assert cache.lengths.tolist() == [3, 3, 5]
    assert torch.equal(attend(cache, *piece), attend(other, *piece))


@pytest.mark.parametrize("accepted", [3, torch.tensor([1, 3, 8])], ids=["int", "each"])
def test_truncate_forgets_rejected_guesses(accepted):
    cache, (_, k, v) = new_cache(), tokens(5)
    cache.update(k, v)
    cache.truncate(accepted)
    lengths = torch.as_tensor(accepted).expand(B).clamp(max=5)
    assert torch.equal(cache.lengths, lengths)
    other, piece = new_cache(), tokens(4)
    other.update(k, v, lengths)
    assert torch.equal(attend(cache, *piece), attend(other, *piece))


# --- a module ------------------------------------------------------------------------------------------------------


def test_moves_and_copies_like_a_module():
    cache, (_, k, v) = new_cache(), tokens(3)
    cache.update(k, v)
    twin = copy.deepcopy(cache)
    cache.update(k, v)
    assert twin.lengths.tolist() == [3, 3, 3] and not twin.keys[:, :, 3:].any()
    half = nn.Sequential(twin).half()[0]
    assert (half.keys.dtype, half.values.dtype, half.lengths.dtype) == (torch.float16, torch.float16, torch.int64)
    assert torch.equal(half.update(k.half(), v.half())[0][:, :, 3:6], k.half())
    cache.to("meta")
    for _ in range(N):
        assert cache.update(k.to("meta"), v.to("meta"))[0].is_meta


def test_a_checkpoint_fits_with_any_cache():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "cache": new_cache()})
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    nn.ModuleDict({"linear": nn.Linear(2, 2), "cache": new_cache(B=1)}).load_state_dict(model.state_dict())
    assert not list(model["cache"].parameters())


def test_nothing_is_written_that_autograd_would_follow():
    cache, (_, k, v) = new_cache(), tokens(2)
    for key, value in ((k.clone().requires_grad_(), v), (k, v.clone().requires_grad_())):
        with pytest.raises(InvalidInput, match=r"keeps no graph, got one that does; generate under torch.no_grad"):
            cache.update(key, value)
        assert not cache.lengths.any()
        with torch.no_grad():
            cache.update(key, value)
        cache.reset()
    with torch.inference_mode():
        assert not any(t.requires_grad for t in cache.update(k, v))


# --- compiled and captured -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_dynamo")
def test_one_compile_serves_every_step():
    counter, cache, twin = CompileCounterWithBackend("aot_eager"), new_cache(), new_cache()
    run = torch.compile(attend, fullgraph=True, backend=counter)
    prompt = tokens(4)
    attend(cache, *prompt, torch.tensor([4, 1, 2])), attend(twin, *prompt, torch.tensor([4, 1, 2]))
    for _ in range(8):
        piece = tokens(1)
        assert torch.equal(run(cache, *piece), attend(twin, *piece))
    assert counter.frame_count == 1
    assert all(torch.equal(*pair) for pair in zip(cache.buffers(), twin.buffers(), strict=True))
    # Eager calls go by the true lengths again.
    with pytest.raises(InvalidInput, match="room for 12 tokens, got 13"):
        attend(cache, *tokens(1))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_prefills_of_every_length_compile_twice_at_most():
    counter, twin = CompileCounterWithBackend("aot_eager"), new_cache()
    cache = copy.deepcopy(twin)
    run = torch.compile(lambda k, v, lengths: cache.update(k, v, lengths), fullgraph=True, backend=counter)
    for M in (5, 3, 7, 12):
        _, k, v = tokens(M)
        cache.reset(), twin.reset()
        for found, expected in zip(
            run(k, v, LENGTHS.clamp(max=M)), twin.update(k, v, LENGTHS.clamp(max=M)), strict=True
        ):
            assert torch.equal(found, expected)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("_fresh_dynamo")
def test_reset_reorder_and_truncate_compile():
    def run(cache, k, v):
        cache.update(k, v)
        cache.truncate(torch.tensor([1, 2, 3]))
        cache.reorder(torch.tensor([1, 2, 0]))
        cache.reset(torch.tensor([2]))
        return cache.update(k, v)

    _, k, v = tokens(4)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(new_cache(), k, v)
    for one, other in zip(found, run(new_cache(), k, v), strict=True):
        assert torch.equal(one, other)
    assert found[2].tolist() == [6, 7, 4]


@pytest.mark.kernels
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@torch.no_grad()
def test_a_captured_step_replays_until_there_is_no_room(device):
    options = {"device": device, "dtype": torch.float32}
    cache, twin, piece = new_cache(**options), new_cache(**options), tokens(1, **options)
    attend(new_cache(**options), *piece)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(cache, *piece)
    for _ in range(N):
        for tensor in piece:
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert torch.equal(captured, attend(twin, *piece))
    graph.replay()
    assert captured.isnan().all()


# --- errors --------------------------------------------------------------------------------------------------------

K, V = torch.zeros(B, KV, 2, D, **DOUBLE), torch.zeros(B, KV, 2, DV, **DOUBLE)
WRONG = {
    "no tensor": (lambda c: c.update(None, V), "key must be a Tensor, got NoneType"),
    "batch": (lambda c: c.update(K[:2], V[:2]), r"key must be \[3, 2, M <= 12, 6\], got \[2, 2, 2, 6\]"),
    "heads": (lambda c: c.update(K[:, :1], V), r"key must be \[3, 2, M <= 12, 6\], got \[3, 1, 2, 6\]"),
    "width": (lambda c: c.update(K, K), r"value must be \[3, 2, M <= 12, 5\], got \[3, 2, 2, 6\]"),
    "rank": (lambda c: c.update(K[0], V[0]), r"key must be .* got \[2, 2, 6\]"),
    "longer than all": (lambda c: c.update(K.repeat(1, 1, 7, 1), V), r"M <= 12, 6\], got \[3, 2, 14, 6\]"),
    "tokens": (lambda c: c.update(K, V[:, :, :1]), "same number of tokens, got 2 and 1"),
    "dtype": (lambda c: c.update(K.half(), V), "key must be torch.float64 on cpu .* got torch.float16 .* that dtype"),
    "device": (lambda c: c.update(K, V.to("meta")), "value must be .* on cpu .* got torch.float64 on meta"),
    "sparse": (lambda c: c.update(K.to_sparse(), V), "key must be a dense Tensor, got a sparse_coo one"),
    "sparse lengths": (
        lambda c: c.update(K, V, torch.ones(B).long().to_sparse()),
        "lengths must be a dense Tensor, got a sparse_coo one",
    ),
    "lengths as list": (lambda c: c.update(K, V, [1, 2, 2]), "lengths must be a Tensor of integers, got list"),
    "float lengths": (
        lambda c: c.update(K, V, torch.ones(B)),
        r"\[3\] of int32 or int64 on cpu, got \[3\] torch.float32",
    ),
    "too few lengths": (lambda c: c.update(K, V, torch.ones(2).long()), r"lengths must be \[3\] .* got \[2\]"),
    "long lengths": (lambda c: c.update(K, V, torch.tensor([0, 3, 1])), "lie in 0 … 2, got 0 … 3"),
    "negative lengths": (lambda c: c.update(K, V, torch.tensor([0, -1, 1])), "lie in 0 … 2, got -1 … 1"),
    "reset of no sequence": (lambda c: c.reset(3), "an int in 0 … 2, got 3"),
    "reset of True": (lambda c: c.reset(True), "an int in 0 … 2, got True"),
    "reset of wrong sequences": (lambda c: c.reset(torch.tensor([0, 3])), "index must lie in 0 … 2, got 0 … 3"),
    "reset of a mask": (lambda c: c.reset(torch.ones(B) > 0), "index must be .* int32 or int64 .* got .* torch.bool"),
    "reorder too few": (lambda c: c.reorder(torch.tensor([0, 1])), r"index must be \[3\] .* got \[2\]"),
    "reorder out of range": (lambda c: c.reorder(torch.tensor([0, 1, -1])), "lie in 0 … 2, got -1 … 1"),
    "truncate to less than 0": (lambda c: c.truncate(-1), "not negative, got -1"),
    "truncate to more than int64": (lambda c: c.truncate(2**63), "not negative, got 9223372036854775808; at most"),
    "truncate to True": (lambda c: c.truncate(True), "not negative, got True"),
    "truncate each below 0": (lambda c: c.truncate(torch.tensor([0, -2, 0])), "at least 0, got -2"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named_and_nothing_written(call, message):
    cache = new_cache()
    with pytest.raises(InvalidInput, match=message):
        call(cache)
    assert not any(b.any() for b in cache.buffers())


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 1, -1, 1), (1, 1, 1, 1.5), (1, 1, 1, 1, 0)], ids=str)
def test_impossible_sizes(sizes):
    with pytest.raises(InvalidInput, match="every size must be a positive integer"):
        KVCache(*sizes)


def test_integer_cache():
    with pytest.raises(InvalidInput, match=r"dtype must be floating point, got torch.int32"):
        new_cache(dtype=torch.int32)
