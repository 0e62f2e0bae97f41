"""Several threads, and calls inside of calls: what each computes is what it computes alone."""

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seqcore
from seqcore.devices import INTERPRETED
from seqcore.functional import attention
from seqcore.kernels import settled
from seqcore.kernels.recurrence import forward as kernels
from seqcore.ops.precision import library_precision

from .comparisons import assert_equal_in_float64, cotangents
from .effort import effort

BACKENDS = ["aten", "reference", pytest.param("triton", marks=pytest.mark.kernels)]


@contextlib.contextmanager
def switching_often():
    """Python hands over to another thread after a few instructions, not after five thousandths of a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(*jobs):
    """What the jobs return, each in a thread of its own, all begun together."""
    ready = threading.Barrier(len(jobs))

    def begun(job):
        ready.wait(60)
        return job()

    with switching_often(), ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(begun, job) for job in jobs]]


def elsewhere(job):
    """What ``job`` returns in another thread."""
    return at_once(job)[0]


class Attending(torch.nn.Module):
    """Attention of x with itself, in two heads."""

    def __init__(self, backend, **options):
        super().__init__()
        self.backend, self.options = backend, options

    def forward(self, x):
        heads = x.unflatten(2, (2, -1)).permute(1, 2, 0, 3)
        return attention(heads, heads, heads, backend=self.backend, **self.options)


def models(backend, device):
    """Unlike each other in cell, directions, layers and programs a launch; with an input for each."""
    torch.manual_seed(0)
    lstm = seqcore.nn.LSTM(4, 9, bidirectional=True, backend=backend, device=device)
    gru = seqcore.nn.GRU(4, 5, backend=backend, device=device)
    inputs = (torch.randn(2, 3, 4), torch.randn(2, 17, 4), torch.randn(9, 2, 8))
    return [(module, x.to(device)) for module, x in zip((lstm, gru, Attending(backend)), inputs, strict=True)]


def output(module, x):
    found = module(x)
    return found[0] if isinstance(found, tuple) else found


def trained(module, x):
    """The output and all gradients, by number."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = output(module, x)
    return dict(enumerate([out.detach(), *gradients(out, module, x)]))


def gradients(out, module, x):
    return torch.autograd.grad(out, [x, *module.parameters()], cotangents([out]))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_with_models_of_their_own_and_with_the_same_one(backend, device):
    pairs = models(backend, device)
    expected = [trained(*pair) for pair in pairs]
    for _ in range(effort(1, 10)):
        found = at_once(*(lambda pair=pair: trained(*pair) for pair in (*pairs, *pairs)))
        for one, alone in zip(found, (*expected, *expected), strict=True):
            assert_same(one, alone)


def test_each_thread_has_its_own_stack_of_backends():
    def nested(outer, inner):
        found = []
        for _ in range(50):
            with seqcore.use_backend(outer):
                with seqcore.use_backend(inner):
                    found.append(seqcore.backends.resolve(None))
                found.append(seqcore.backends.resolve(None))
        return found

    found = at_once(lambda: nested("aten", "reference"), lambda: nested("reference", "aten"))
    assert found == [["reference", "aten"] * 50, ["aten", "reference"] * 50]


def test_explanations_are_of_the_thread_that_asks():
    both = threading.Barrier(2)

    def explained(module, x):
        def call():
            both.wait(60)
            module(x)
            both.wait(60)

        return [found.request.operation for found in seqcore.explain(call)]

    (lstm, x), _, (attending, z) = models("reference", "cpu")
    assert at_once(lambda: explained(lstm, x), lambda: explained(attending, z)) == [["lstm"], ["attention"]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_of_another_thread_follows_the_choice_of_forward(backend, device):
    for module, x in models(None, device):
        x = x.requires_grad_()
        with seqcore.use_backend(backend):
            out = output(module, x)
            expected = gradients(output(module, x), module, x)

        def backward(out=out, module=module, x=x):
            with seqcore.use_backend("aten"):
                return gradients(out, module, x)

        assert_same(dict(enumerate(elsewhere(backward))), dict(enumerate(expected)))


def test_dropout_draws_once_for_forward_and_backward_whoever_draws_meanwhile(by_the_operators):
    """Attention is linear in v: the gradient times v is the output, as long as both dropped the same."""

    def dropped():
        q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
        out = attention(q, k, v.requires_grad_(), dropout_p=0.5)
        (grad,) = torch.autograd.grad(out.sum(), v)
        return {"sum": (grad * v).sum().detach()}, {"sum": out.sum().detach()}

    for _ in range(effort(3, 50)):
        for found, expected in at_once(*[dropped] * 4):
            assert_equal_in_float64(found, expected)


def test_the_switch_for_float32_products_is_right_in_every_thread_and_is_put_back():
    """It is the process's; left as one thread found it under another, it would stay so for good."""
    switch = torch.backends.cuda.matmul

    def seen(precision):
        found = set()
        for _ in range(30):
            with library_precision(precision):
                found.add(switch.fp32_precision)
                time.sleep(1e-4)
                with library_precision(precision):
                    found.add(switch.fp32_precision)
                found.add(switch.fp32_precision)
        return found

    before = switch.fp32_precision
    assert at_once(*(lambda p=p: seen(p) for p in ("tf32", "tf32x3", "tf32", "tf32x3"))) == [{"tf32"}, {"ieee"}] * 2
    assert switch.fp32_precision == before


# --- calls inside of calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_inside_a_hook_of_another_backward(backend, device):
    """Each layer's gradient starts a whole forward and backward of another."""
    pairs = models(backend, device)
    expected = [trained(*pair) for pair in pairs]
    for i, (module, x) in enumerate(pairs):
        inner, x, other = [], x.detach().requires_grad_(), (i + 1) % len(pairs)
        out = output(module, x)
        out.register_hook(lambda grad, other=other, inner=inner: inner.append(trained(*pairs[other])))
        found = [out.detach(), *gradients(out, module, x)]
        assert_same(dict(enumerate(found)), expected[i])
        [within] = inner
        assert_same(within, expected[other])


class Replayed(torch.autograd.Function):
    """``module(x)``, forward in forward and again in backward, which needs it: what a reversible network does."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return output(module, x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = output(ctx.module, x)
        return torch.autograd.grad(out, x, grad)[0], None


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_inside_the_backward_of_another_function(backend, device):
    for module, x in models(backend, device):
        expected = trained(module, x)
        x = x.requires_grad_()
        out = Replayed.apply(x, module)
        (grad,) = torch.autograd.grad(out, x, cotangents([out]))
        assert_same({0: out.detach(), 1: grad}, {0: expected[0], 1: expected[1]})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints(backend, reentrant, device):
    for module, x in models(backend, device):
        expected = trained(module, x)
        x = x.requires_grad_()
        out = checkpoint(output, module, x, use_reentrant=reentrant)
        out.backward(cotangents([out])[0])
        found = [out.detach(), x.grad, *(p.grad for p in module.parameters())]
        assert_same(dict(enumerate(found)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_drop_again_what_they_dropped(reentrant, by_the_operators):
    module, x = Attending(None, dropout_p=0.5), torch.randn(9, 2, 8, requires_grad=True)
    torch.manual_seed(3)
    expected = trained(module, x)
    torch.manual_seed(3)
    out = checkpoint(output, module, x, use_reentrant=reentrant)
    torch.rand(7)
    out.backward(cotangents([out])[0])
    assert_same({0: out.detach(), 1: x.grad}, expected)


# --- interpreted ----------------------------------------------------------------------------------------------------


class Meeting:
    """A hook inside a launch: the first one waits there until another thread's has come in too, or stands at the lock.

    It is also that lock, since whoever waits at one is not seen.
    """

    def __init__(self, job, lock):
        self.lock, self.other = lock, threading.Thread(target=job, daemon=True)
        self.inside, self.most, self.met = 0, 0, threading.Event()

    def __call__(self, *arguments, **keywords):
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.other.ident is None:
            self.other.start()
            assert self.met.wait(60), "the other launch neither came nor waited"
        else:
            self.met.set()
        self.inside -= 1

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.met.set()
            self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone has one state for all threads")
def test_interpreted_launches_take_turns(monkeypatch):
    module, x = models("triton", "cpu")[0]
    meeting = Meeting(lambda: module(x), settled._interpreter)
    monkeypatch.setattr(settled, "_interpreter", meeting)
    monkeypatch.setattr(kernels.recurrence_forward_kernel, "pre_run_hooks", [meeting])
    module(x)
    meeting.other.join(60)
    assert meeting.most == 1


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone has one state for all threads")
def test_a_launch_inside_an_interpreted_launch_goes_on(monkeypatch):
    (lstm, x), _, (attending, z) = models("triton", "cpu")
    expected, inner = trained(lstm, x), []
    kernel = kernels.recurrence_forward_kernel
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *_, **__: inner.append(attending(z))])
    found = []
    # One that waits for itself never ends.
    thread = threading.Thread(target=lambda: found.append(trained(lstm, x)), daemon=True)
    thread.start()
    thread.join(30)
    assert found, "it waits for itself"
    assert_same(found[0], expected)
    assert torch.equal(inner[0], attending(z))
