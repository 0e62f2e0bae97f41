"""Every kernel with its tensors between guard bands: nothing beside them is read or written, nothing left unwritten."""

import importlib
import itertools
import pkgutil
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from seqcore import cli
from seqcore import kernels as all_kernels
from seqcore.devices import INTERPRETED
from seqcore.kernels import floors, tuning
from seqcore.kernels.grid import COUNTER_STRIDE
from seqcore.kernels.recurrence import plan, step
from seqcore.kernels.tuning import Tiles
from seqcore.testing.attention_cases import attentions
from seqcore.testing.cases import floats_as, recurrences
from seqcore.testing.explorer import explore
from seqcore.testing.guarded import BAND, OutOfBounds, guarded
from seqcore.testing.verify import compute

from .attention_twins import beside, ends, features, kernels, qkv, results
from .comparisons import Results
from .effort import NIGHTLY, effort, tried
from .mutants import mutant
from .recurrence_twins import SINGLE, masks, ours, packed, problem
from .recurrence_twins import results as recurrence_results

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def assert_no_bit_changes(run: Callable[[], Results]) -> Counter[str]:
    """``run`` gives the same inside guard bands; how often it launched what."""
    # First, for what a kernel breaks outside of its tensors may be anything.
    with guarded() as launches:
        found = run()
    expected = run()
    tried()
    assert found.keys() == expected.keys()
    # A NaN equals nothing.
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    return launches


# --- broken on purpose ------------------------------------------------------------------------------------------------


@triton.jit
def sum_kernel(x_ptr, at_ptr, y_ptr, stride_x, indexed, loaded, stored, BLOCK: tl.constexpr):
    """y[i] = x[at[i]] + the sum of all of x; how much of each is loaded or stored is up to the caller."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride_x, mask=offs < loaded, other=0.0)
    at = tl.load(at_ptr + offs, mask=offs < indexed, other=0)
    chosen = tl.load(x_ptr + at * stride_x, mask=offs < indexed, other=0.0)
    tl.store(y_ptr + offs, chosen + tl.sum(x, 0), mask=offs < stored)


def summed(device, *, stride=2, indexed=10, loaded=10, stored=10):
    """The kernel run on every other element of a tensor, into the middle of another, and into one that is made."""
    x = torch.arange(20.0, device=device)[::2]
    y = torch.zeros(30, device=device)
    made = y.new_empty(10)
    at = torch.arange(10, device=device).flip(0)
    for out in (y[10:20], made):
        sum_kernel[(1,)](x, at, out, stride, indexed, loaded, stored, BLOCK=16)
    return {"y": y, "made": made}


COMPILED = pytest.mark.skipif(not INTERPRETED, reason="compiled accesses cannot be looked at")
LOOKING = pytest.mark.parametrize(
    "looking", [pytest.param(True, marks=COMPILED), False], ids=["each access", "bands"]
)


@LOOKING
def test_what_stays_within_its_tensors_is_let_be(looking, device):
    expected = summed(device)
    with guarded(accesses=looking) as launches:
        found = summed(device)
    assert all(torch.equal(found[name], expected[name]) for name in found) and expected["y"].any()
    assert launches == {"sum_kernel": 2}


@LOOKING
@pytest.mark.parametrize(
    "broken, message",
    [
        ({"stored": 11}, r"sum_kernel \w+ to element 10 of y_ptr, which has \[10\] in steps of \(1,\)"),
        ({"stored": 16}, "sum_kernel .* element 10 of y_ptr"),
    ],
    ids=["one too many", "unmasked"],
)
def test_stores_beside_a_tensor_are_seen(broken, message, looking, device):
    with guarded(accesses=looking), pytest.raises(OutOfBounds, match=message):
        summed(device, **broken)


@LOOKING
@pytest.mark.parametrize(
    "broken, message",
    [
        ({"loaded": 11}, "read element 20 of x_ptr"),
        ({"loaded": 16}, "read element 20 of x_ptr"),
        ({"stride": 1}, "read element 1 of x_ptr"),
    ],
    ids=["one too many", "unmasked", "in a gap"],
)
def test_loads_beside_a_tensor_are_seen(broken, message, looking, device):
    with guarded(accesses=looking):
        if looking:
            with pytest.raises(OutOfBounds, match=message):
                summed(device, **broken)
        else:
            assert summed(device, **broken)["y"][10:20].isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="as an index poison leads out of all memory")
def test_an_index_too_many_is_seen(device):
    with guarded(), pytest.raises(OutOfBounds, match="read element 10 of at_ptr"):
        summed(device, indexed=11)


def test_elements_that_nobody_writes_are_seen(device, monkeypatch):
    torch.use_deterministic_algorithms(False)
    with guarded():
        found = summed(device, stored=9)
    assert found["made"].isnan().tolist() == 9 * [False] + [True]
    with guarded():
        made = [torch.empty(3, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32, torch.bool)]
        assert torch.empty_like(made[0]).unique().tolist() == [0x7F7F7F7F7F7F7F7F]
    assert [t.unique().tolist() for t in made] == [[0x7F7F7F7F7F7F7F7F], [0x7F7F7F7F], [True]]


@COMPILED
def test_a_launch_that_fails_leaves_everything_as_it_was(device):
    x, y = torch.ones(10, device=device), torch.zeros(10, device=device)
    at = torch.zeros(10, dtype=torch.int64, device=device)
    with guarded(accesses=False), pytest.raises(OutOfBounds):
        sum_kernel[(1,)](x, at, y, 1, 10, 10, 11, BLOCK=16)
    assert not y.any()
    run = type(sum_kernel).run
    # Far beyond any band.
    with guarded(), pytest.raises(OutOfBounds, match=r"sum_kernel read element -?\d+ of"):
        sum_kernel[(1,)](x, at + 2 * BAND, y, 1, 10, 10, 10, BLOCK=16)
    assert not y.any() and type(sum_kernel).run is run


def test_tensors_of_one_memory_keep_sharing_it(device):
    expected = torch.arange(10.0, device=device).flip(0) + 45
    x = torch.arange(10.0, device=device)
    with guarded():
        sum_kernel[(1,)](x, torch.arange(10, device=device).flip(0), x, 1, 10, 10, 10, BLOCK=16)
    assert torch.equal(x, expected)


# --- every kernel of the library --------------------------------------------------------------------------------------

B, H, H_KV, M, N, D, DV = 2, 2, 1, 17, 21, 6, 5
PLAIN, DECODE = {"attention_forward_kernel"}, {"attention_decode_kernel", "attention_combine_kernel"}
BACKWARD = {f"attention_backward_{part}_kernel" for part in ("delta", "dkdv", "dq")}
BIAS, WEIGHTS = {"attention_backward_bias_kernel"}, {"attention_weights_kernel"}

# The features, the mask's shape if it is another, and what is launched.
ATTENTION = {
    "plain": ({}, PLAIN | BACKWARD),
    "top_left": ({"return_weights": "average"}, PLAIN | BACKWARD | WEIGHTS),
    "bool mask": ({}, PLAIN | BACKWARD),
    "everything": ({"return_weights": "average"}, PLAIN | BACKWARD | BIAS | WEIGHTS),
    "plain, a mask of queries": ({"mask": (1, H, M, 1)}, PLAIN | BACKWARD | BIAS),
    "top_left, a mask of keys": ({"mask": (1, 1, 1, N)}, PLAIN | BACKWARD | BIAS),
    "everything, packed": ({"packed": True}, PLAIN | BACKWARD | BIAS),
    "plain, decode": ({"splits": 3}, DECODE | BACKWARD),
    "everything, decode": ({"splits": 3}, DECODE | BACKWARD | BIAS),
}


def attention(name, device, monkeypatch, *, mask=None, packed=False, splits=0, return_weights=None):
    """A run of attention with the features that the first word of ``name`` says."""
    m = 3 if splits else M
    options = features(B, H, m, N)[name.partition(",")[0]]
    lead = (H,) if packed else (B, H)
    if mask:
        options["attn_mask"] = torch.randn(mask).requires_grad_()
    if packed:
        options = {key: value for key, value in options.items() if not key.endswith("_lengths")}
        options |= {"cu_seqlens_q": ends(9, 0, 8), "cu_seqlens_k": ends(10, 4, 7)}
        options["attn_mask"] = torch.randn(m, N).requires_grad_()
    if return_weights:
        options["return_weights"] = return_weights
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)
    options = {key: beside(value, device) for key, value in options.items()} | {"enable_gqa": True}
    # Rows apart and heads in between: there are gaps to be read.
    tensors = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in qkv(*lead, heads_kv=H_KV, M=m, N=N, D=D, DV=DV)]
    tensors = [t.to(device) for t in tensors]
    return lambda: results(kernels, *tensors, **options)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, device, monkeypatch):
    options, launched = ATTENTION[name]
    launches = assert_no_bit_changes(attention(name, device, monkeypatch, **options))
    assert launches.keys() == launched


@pytest.mark.parametrize("way", [{"persistent": 1}, {"descriptors": True}], ids=["persistent", "descriptors"])
def test_other_ways_to_run_attention_forward(way, device, monkeypatch):
    tiles = Tiles(16, 16, num_warps=4, num_stages=1, **way)
    monkeypatch.setattr(tuning, "attention_tiles", lambda *_: tiles)
    # Head dims that fill their tiles, as descriptors need them; sequences that do not.
    tensors = qkv(B, H, M=M, N=N, D=16, DV=32, device=device)
    run = lambda: dict(zip(("out", "lse"), kernels(*tensors, causal="top_left"), strict=True))
    assert assert_no_bit_changes(run) == {"attention_forward_kernel": 1}


SEQUENCE = {"recurrence_forward_kernel", "recurrence_backward_kernel"}

# The cell, torch's options, options of our own, the form of the input, what is forced upon the plan, what is launched.
RECURRENCE = {
    "rnn_tanh": ("rnn_tanh", {"bidirectional": True}, {}, "padded", {}, SEQUENCE),
    "rnn_relu, no bias": ("rnn_relu", {"bias": False, "H": 65}, {}, "packed", {}, SEQUENCE),
    "gru, two groups": ("gru", {"B": 17}, {}, "padded", {"tile": 16}, SEQUENCE),
    "gru, masked": ("gru", {"bidirectional": True}, {}, "masked", {}, SEQUENCE),
    "gru, blocks": ("gru", {"H": 34}, {"blocks": 2, "grad_clip": 0.05}, "padded", {"units": 32}, SEQUENCE),
    "gru, streaming": ("gru", {}, {}, "packed", {"hold": False, "tile": 16, "fold": 1}, SEQUENCE),
    # 15 rows, in tiles of 4.
    "lstm, recomputed": ("lstm", {"T": 3, "bidirectional": True}, {"recompute": True}, "padded", {},
                         SEQUENCE | {"pointwise_kernel"}),
    "lstm, swapped": ("lstm", {"H": 50}, {}, "packed", {"swap": True, "padded": True, "fold": 2}, SEQUENCE),
    "lstm_proj": ("lstm_proj", {"bidirectional": True}, {}, "masked", {}, SEQUENCE),
}  # fmt: skip


def recurrence(name, device):
    """A run of a module, and the plan's fields."""
    cell, options, own, form, fields, _ = RECURRENCE[name]
    twin, x, hx = problem(cell, **{"T": 4, "I": 3, **options}, device=device)
    module = ours(twin, "triton", **own)
    x = packed(x, [1 + 2 * b % 4 for b in range(x.shape[1] - 1)] + [4]) if form == "packed" else x
    keywords = masks(device) if form == "masked" else {}
    return (lambda: recurrence_results(module, x, hx, **keywords)), fields


@pytest.mark.parametrize("name", RECURRENCE)
def test_recurrence(name, device):
    run, fields = recurrence(name, device)
    with plan.overriding(**fields):
        launches = assert_no_bit_changes(run)
    assert launches.keys() == RECURRENCE[name][-1]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cell", SINGLE)
def test_steps(cell, bias, device):
    kind, options = SINGLE[cell]
    module = ours(kind(5, 31, bias=bias, **options, device=device), "triton")
    # Every other row of something larger.
    x, h, c = (torch.randn(10, width, device=device)[::2] for width in (5, 31, 31))
    run = lambda: recurrence_results(module, x, (h, c) if cell == "lstm" else h)
    assert assert_no_bit_changes(run) == {"recurrence_step_kernel": 1, "recurrence_backward_kernel": 1}


@pytest.mark.skipif(not INTERPRETED, reason="the explorer schedules interpreted programs")
@pytest.mark.parametrize("name", ["gru, streaming", "lstm, recomputed"])
def test_units_spread_over_programs(name, device):
    pytest.importorskip("greenlet", reason="greenlet is not installed")
    run, fields = recurrence(name, device)
    for seed in range(effort(1, 5)):
        with plan.overriding(**fields | {"units": 16}), explore(seed, weak_memory=False):
            assert_no_bit_changes(run)


@pytest.mark.parametrize("width, share", [(37, 37), (70, 33)])
def test_floors(width, share, device):
    """With one program a team, which waits for no other."""
    T, teams, rows = 3, 2, 4

    def run():
        buffer = torch.zeros(T + 1, teams * rows, width, dtype=torch.int32, device=device)
        counters = torch.zeros(teams * COUNTER_STRIDE.value, dtype=torch.int32, device=device)
        floors.empty_kernel[(2,)]()
        floors.barrier_kernel[(teams,)](counters, T, SLICES=1)
        counters.zero_()
        floors.exchange_kernel[(teams,)](
            buffer, counters, T, teams, SLICES=1, WIDTH=width, SHARE=share, BLOCK_B=rows, BLOCK_K=32
        )
        return {"rows": buffer, "counters": counters}

    assert assert_no_bit_changes(run) == {"empty_kernel": 1, "barrier_kernel": 1, "exchange_kernel": 1}


@pytest.mark.parametrize("cases", [recurrences, attentions], ids=lambda cases: cases.__name__)
def test_cases_of_verify(cases, device):
    """All at night, in each dtype; a few otherwise."""
    for case in itertools.islice(cases(device), effort(7, 0), None, effort(25, 1)):
        for dtype in (torch.float32, torch.float16) if NIGHTLY else (torch.float32,):
            inputs = floats_as(dtype, case.tensors)
            assert_no_bit_changes(lambda case=case, inputs=inputs: compute(case, inputs, "triton"))


@COMPILED
def test_verify_finds_a_kernel_that_goes_too_far(monkeypatch, capsys):
    command = ["verify", "--case", "gru T=1", "--guarded"]
    assert cli.main(command) == 0
    broken = mutant(step.recurrence_step_kernel, "exists = offs_b < B", "exists = offs_b <= B")
    monkeypatch.setattr(step, "recurrence_step_kernel", broken)
    assert cli.main(command) == 1
    assert "OutOfBounds: recurrence_step_kernel read" in capsys.readouterr().out


def test_no_kernel_of_the_library_is_left_out():
    modules = [m.name for m in pkgutil.walk_packages(all_kernels.__path__, "seqcore.kernels.")]
    found = {name for module in modules for name in vars(importlib.import_module(module)) if name.endswith("_kernel")}
    launched = set().union(*(case[-1] for case in (*ATTENTION.values(), *RECURRENCE.values())))
    assert found == launched | {"recurrence_step_kernel", "empty_kernel", "barrier_kernel", "exchange_kernel"}
