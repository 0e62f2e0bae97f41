"""What surrounds recurrence and attention, called with arguments that nobody would pass: an answer, or a refusal."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import strategies as st

import seqcore
from seqcore import distributed, functional
from seqcore.testing import assert_within_budget, check_budget

from .arbitrary import attempt, each_replaced, refused, replaced
from .effort import drawn, seeded

with seeded():
    ONE = torch.randn(2, 2, 4, 3)
    THEIRS, OURS = torch.nn.MultiheadAttention(2, 2), seqcore.nn.MultiheadAttention(2, 2)
    GRU = torch.nn.GRU(2, 2)
QKV = {"query": ONE, "key": ONE, "value": ONE}


def entered(context, *arguments, **keywords):
    with context(*arguments, **keywords):
        return functional.attention(ONE, ONE, ONE)


def ours(function):
    """What is called back raises what it raises: not Python's own functions, which take other arguments."""
    return None if function in (int, len) else function


CALLS = {
    "use_backend": (lambda **given: entered(seqcore.use_backend, **given), {"name": "reference"}, ()),
    "replace_sdpa": (lambda **given: entered(seqcore.replace_sdpa, **given), {"backend": None}, ()),
    "explain": (
        lambda subject, **given: str(seqcore.explain(ours(subject), ONE, ONE, ONE, **given)),
        {"subject": functional.attention}, ("device", "causal", "return_lse", "backend"),
    ),
    "replace": (
        lambda filter_fn=None, **given: str(seqcore.replace(filter_fn=ours(filter_fn), **given)),
        {"model": THEIRS}, ("filter_fn", "backend"),
    ),
    "restore": (
        lambda filter_fn=None, **given: str(seqcore.restore(filter_fn=ours(filter_fn), **given)),
        {"model": OURS}, ("filter_fn",),
    ),
    "check_budget": (
        lambda **given: str(check_budget(**given)), {"actual": ONE, "exact": ONE.double(), "eager": ONE}, ()
    ),
    "ring_attention": (
        distributed.ring_attention, QKV,
        ("causal", "layout", "scale", "softcap", "sinks", "enable_gqa", "return_lse", "group"),
    ),
    "ulysses_attention": (
        distributed.ulysses_attention, QKV,
        ("attn_mask", "causal", "dropout_p", "dropout_seed", "window", "sinks", "alibi_slopes", "key_lengths", "group",
         "return_weights", "cu_seqlens_q", "backend"),
    ),
    "shard_sequence": (distributed.shard_sequence, {"tensor": ONE, "dim": 2}, ("group", "layout")),
    "gather_sequence": (distributed.gather_sequence, {"tensor": ONE, "dim": 2}, ("group", "layout")),
    "TimePipeline": (
        distributed.TimePipeline, {"module": GRU, "steps": 3}, ("truncate", "group"),
    ),
}  # fmt: skip


@pytest.fixture
def _alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", CALLS)
@drawn(10, 200, data=st.data())
def test_tools(name, data):
    function, valid, optional = CALLS[name]
    attempt(function, **data.draw(replaced(valid, optional)))
    with seqcore.use_backend("reference"):
        assert functional.attention(ONE, ONE, ONE).isfinite().all(), "something was left behind"


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", CALLS)
def test_tools_with_each_argument_replaced(name):
    function, valid, optional = CALLS[name]
    for given in each_replaced(valid, optional):
        attempt(function, **given)


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name][0] in vars(distributed).values()])
@drawn(4, 50, data=st.data())
def test_without_a_process_group(name, data):
    function, valid, optional = CALLS[name]
    assert refused(attempt(function, **data.draw(replaced(valid, optional))))


SIZES = {"multiprocessors": 4, "shared_memory": 1 << 16, "registers": 1 << 16}


@drawn(20, 200, given=replaced({"arch": "sm_90"} | SIZES))
def test_device(given):
    """Kernels import nothing of the library's, so what describes a device to them raises Python's own error."""
    numbers = [given[name] for name in SIZES]
    if isinstance(given["arch"], str) and all(type(number) is int and number >= 0 for number in numbers):
        attempt(seqcore.explain, functional.attention, ONE, ONE, ONE, device=seqcore.Device(**given))
    else:
        with pytest.raises(ValueError, match=r"must be a string, .* got "):
            seqcore.Device(**given)


@drawn(20, 200, given=replaced({"actual": ONE, "exact": ONE.double(), "eager": ONE}))
def test_a_budget_is_kept_or_not_or_cannot_be_asked_for(given):
    budget = attempt(check_budget, **given)
    if refused(budget):
        assert refused(attempt(assert_within_budget, **given))
    elif budget.ok:
        assert_within_budget(**given)
    else:
        with pytest.raises(AssertionError, match="is outside the error budget"):
            assert_within_budget(**given)
