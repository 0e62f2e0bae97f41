"""No operator that is not deterministic on a GPU: which of torch's ours call there, seen where there is none.

Torch documents, with ``torch.use_deterministic_algorithms``, which operators raise in deterministic mode on CUDA
tensors, and which are only then deterministic. Backend "aten" is left out: there torch's own operators decide.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqcore
from seqcore import Device, functional, nn
from seqcore.reference import packed as reference_packed
from seqcore.testing.launches import noted_for

from .determinism_problems import of, problems
from .routes import by_the_operators
from .test_determinism import deterministic

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def floating(*arguments) -> bool:
    return any(isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in arguments)


def collide(index: Tensor, source: Tensor, dim: int = 0) -> bool:
    """Whether two rows that are not zero are added to one place, so that the sum depends on which comes first."""
    some = source.movedim(dim, 0).reshape(index.numel(), -1)
    rows = index.flatten()[(some != 0).any(1)] if some.shape[1] else index[:0]
    return rows.unique().numel() < rows.numel()


ALWAYS: Callable[..., bool] = lambda *_arguments: True
# What raises in the mode, by torch's documentation; and kthvalue, cumprod and logcumsumexp, which are like these.
RAISES = {
    **dict.fromkeys(
        (
            "max_pool3d_with_indices_backward", "avg_pool3d_backward",
            "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
            "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward",
            "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
            "upsample_bicubic2d_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward",
            "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss_forward", "nll_loss2d_forward",
            "_ctc_loss_backward", "_embedding_bag", "_embedding_bag_backward", "put", "put_", "histc", "median",
            "nanmedian", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "kthvalue",
        ),
        ALWAYS,
    ),
    "bincount": lambda _x, weights=None, *_: weights is not None,
    **dict.fromkeys(("cumsum", "cumsum_", "cumprod", "cumprod_", "logcumsumexp"), lambda x, *_: floating(x)),
    **dict.fromkeys(("scatter_reduce", "scatter_reduce_"), lambda *arguments: "prod" in arguments),
    **dict.fromkeys(("resize", "resize_"), lambda x, *_: x.is_quantized),
}  # fmt: skip
# What is deterministic in the mode alone: on floats, where several are added to one place or written there.
ADDS = {
    **dict.fromkeys(
        ("index_add", "index_add_"), lambda x, dim, index, source, **_: floating(x) and collide(index, source, dim)
    ),
    **dict.fromkeys(
        ("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "scatter", "scatter_", "index_copy",
         "index_copy_", "index_reduce", "index_reduce_", "convolution", "convolution_backward", "gather"),
        lambda x, *_: floating(x),
    ),
    **dict.fromkeys(
        ("index_put", "index_put_", "_unsafe_index_put"),
        lambda x, indices, values, accumulate=False, *_: floating(x) and (accumulate or _repeated(indices)),
    ),
}  # fmt: skip


def _repeated(indices: list[Tensor | None]) -> bool:
    given = [index for index in indices if index is not None]
    if any(index.dtype == torch.bool for index in given):
        return False
    rows = torch.stack([index.flatten() for index in torch.broadcast_tensors(*given)], 1)
    return len(rows.unique(dim=0)) < len(rows)


# The names that torch's documentation says raise, and what they are called in the tables above.
DOCUMENTED = {
    "MaxPool3d", "AvgPool3d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool2d", "FractionalMaxPool2d",
    "FractionalMaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "interpolate", "ReflectionPad1d",
    "ReflectionPad2d", "ReflectionPad3d", "NLLLoss", "CTCLoss", "EmbeddingBag", "put_", "histc", "bincount", "median",
    "grid_sample", "cumsum", "scatter_reduce", "resize_",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes every operator of torch's that is called, also inside ours, and which of them are forbidden."""

    def __init__(self, *tables: dict[str, Callable[..., bool]]):
        super().__init__()
        self.tables, self.called, self.wrong = tables, set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        packet = function._overloadpacket.__name__
        if function.namespace == "seqcore":
            # By its implementation, with this mode for what that calls.
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *arguments, **keywords)
        self.called.add(packet)
        for table in self.tables:
            if packet in table and table[packet](*arguments, **keywords):
                self.wrong.add(str(function))
        return function(*arguments, **keywords)


@pytest.mark.parametrize("case", problems(), ids=lambda case: case.name)
def test_references_call_nothing_that_raises_in_deterministic_mode(case):
    with Watch(RAISES) as watch:
        of(case, "reference")
    assert not watch.wrong and len(watch.called) > 5


def test_packed_references_call_none_where_ends_cannot_be_looked_at(monkeypatch):
    """As on a GPU: all sequences are one product."""
    monkeypatch.setattr(reference_packed, "readable", lambda _: False)
    cases = [case for case in problems() if "packed=True causal" in case.name]
    for case in cases:
        test_references_call_nothing_that_raises_in_deterministic_mode(case)
    assert cases


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_around_kernels_nothing_is_called_whose_bits_could_change(arch):
    """Not even without the mode: kernels repeat bit by bit, and so must what is done before and after them."""
    called, wrong = set(), {}
    for case in problems():
        # What no kernel has written is not zero then, and sums of it are seen.
        with deterministic(fill=True), noted_for(Device(arch)), Watch(RAISES, ADDS) as watch:
            assert of(case, "operators") is not None
        called |= watch.called
        if watch.wrong:
            wrong[case.name] = watch.wrong
    assert not wrong
    assert {"index_add_", "addmm", "bernoulli_"} <= called


def double_backward(run: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
    out, leaves = run()
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()


def attended():
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(5, 5, requires_grad=True)
    lengths = torch.tensor([3, 5])
    return functional.attention(q, k, v, attn_mask=mask, softcap=2.0, key_lengths=lengths), [q, k, v, mask]


def recurred(packed: bool = False):
    module, x = nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), torch.randn(5, 3, 3, requires_grad=True)
    if packed:
        rows = torch.nn.utils.rnn.pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
        return module(rows)[0].data, [x, *module.parameters()]
    return module(x)[0], [x, *module.parameters()]


def placed():
    x, steps = torch.randn(2, 5, 8, requires_grad=True), torch.arange(5)
    learned, added = nn.LearnedPositions(6, 8), nn.SinusoidalPositions(8, 6)
    return learned(added(functional.rotary(x, steps))), [x, *learned.parameters()]


TWICE = {"attention": attended, "LSTM": recurred, "packed": lambda: recurred(packed=True), "positions": placed}


@pytest.mark.parametrize("backend", ["reference", "operators"])
@pytest.mark.parametrize("run", TWICE.values(), ids=TWICE)
def test_differentiating_twice_calls_nothing_that_raises(run, backend):
    with Watch(RAISES) as watch:
        if backend == "operators":
            with by_the_operators():
                double_backward(run)
        else:
            with seqcore.use_backend(backend):
                double_backward(run)
    assert not watch.wrong and len(watch.called) > 5


def test_the_tables_know_what_torch_documents():
    raises = torch.use_deterministic_algorithms.__doc__.split("operations will throw a")[1].partition("In addition")[0]
    assert {name.rpartition(".")[2] for name in re.findall(r"\* :(?:class|func):`([\w.]+)`", raises)} <= DOCUMENTED


WRONG = {
    "cumsum": lambda x: x.cumsum(0),
    "index_add": lambda x: torch.zeros(3).index_add_(0, torch.tensor([0, 0]), x[:2]),
    "index_put": lambda x: torch.zeros(3).index_put_((torch.tensor([0, 0]),), x[:2]),
    "index_put accumulating": lambda x: torch.zeros(3).index_put_((torch.tensor([0, 1]),), x[:2], accumulate=True),
    "scatter_add": lambda x: torch.zeros(3).scatter_add_(0, torch.tensor([0, 1]), x[:2]),
    "backward of an index": lambda x: x[torch.tensor([0, 0])].sum().backward(),
    "backward of index_select": lambda x: x.index_select(0, torch.tensor([1, 1])).sum().backward(),
    "median": lambda x: x.median(0),
    "kthvalue": lambda x: x.kthvalue(1),
    "histc": lambda x: x.detach().histc(),
    "bincount": lambda x: torch.tensor([1, 2, 3]).bincount(x.detach()),
    "reflection": lambda x: torch.nn.functional.pad(x[None], (1, 1), mode="reflect").sum().backward(),
    "linear interpolation": lambda x: torch.nn.functional.interpolate(x[None, None], 7, mode="linear").sum().backward(),
    "negative log likelihood": lambda x: torch.nn.functional.nll_loss(x[None], torch.tensor([1])),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_watch_sees_what_is_wrong(name):
    with Watch(RAISES, ADDS) as watch:
        WRONG[name](torch.randn(3, requires_grad=True))
    assert watch.wrong


def test_the_watch_sees_into_our_operators():
    q = torch.randn(1, 1, 3, 8)
    with by_the_operators(), Watch({"exp": ALWAYS, "bmm": ALWAYS, "mul": ALWAYS}) as watch:
        functional.attention(q, q, q)
    assert watch.wrong
