"""Launches of several streams, threads and graphs on one GPU: the bits are those of one after the other."""

import pytest
import torch

import seqcore
from seqcore.devices import INTERPRETED

from .comparisons import cotangents
from .test_concurrency import Attending, assert_same, at_once, gradients, output, trained

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(INTERPRETED, reason="needs a GPU: streams and graphs")]

TIMES = 8


@pytest.fixture
def pairs(device):
    """Models that share the device, with inputs: two whose programs wait for each other, one of a program a team."""
    torch.manual_seed(0)
    options = {"backend": "triton", "device": device, "dtype": torch.bfloat16}
    modules = (
        seqcore.nn.LSTM(96, 512, **options),
        seqcore.nn.GRU(96, 400, bidirectional=True, **options),
        seqcore.nn.LSTM(96, 64, **options),
        Attending("triton"),
    )
    inputs = [torch.randn(33, 17, 96, device=device, dtype=torch.bfloat16) for _ in modules]
    return list(zip(modules, inputs, strict=True))


def on(stream, job):
    """What ``job`` returns, its work on ``stream``, behind all that was begun before."""
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        return job()


def test_streams_side_by_side(pairs):
    expected = [trained(*pair) for pair in pairs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pairs]
    found = [
        [on(stream, lambda pair=pair: trained(*pair)) for stream, pair in zip(streams, pairs, strict=True)]
        for _ in range(TIMES)
    ]
    torch.cuda.synchronize()
    for once in found:
        for one, alone in zip(once, expected, strict=True):
            assert_same(one, alone)


def test_backward_on_another_stream_than_forward(pairs):
    """Autograd runs a node on the stream of its forward; here the graph is begun from another one."""
    for module, x in pairs:
        expected = trained(module, x)
        forward, backward = torch.cuda.Stream(), torch.cuda.Stream()
        x = x.requires_grad_()
        out = on(forward, lambda module=module, x=x: output(module, x))
        backward.wait_stream(forward)
        with torch.cuda.stream(backward):
            found = gradients(out, module, x)
        torch.cuda.synchronize()
        assert_same(dict(enumerate([out.detach(), *found])), expected)


def test_threads_with_a_stream_each(pairs):
    expected = [trained(*pair) for pair in pairs]
    torch.cuda.synchronize()

    def job(pair):
        stream = torch.cuda.Stream()
        found = [on(stream, lambda: trained(*pair)) for _ in range(TIMES)]
        stream.synchronize()
        return found

    for found, alone in zip(at_once(*(lambda pair=pair: job(pair) for pair in pairs)), expected, strict=True):
        for one in found:
            assert_same(one, alone)


def test_threads_with_the_same_model(pairs):
    pair = pairs[0]
    expected = trained(*pair)
    for found in at_once(*[lambda: on(torch.cuda.Stream(), lambda: trained(*pair))] * 4):
        torch.cuda.synchronize()
        assert_same(found, expected)


@torch.no_grad()
def test_a_graph_of_two_launches_is_replayed_beside_eager_ones(pairs):
    """Each replay clears the counters of both launches again, and shares none with the launches beside it."""
    (lstm, x), (gru, z), *_ = pairs
    expected = [output(lstm, x), output(gru, z)]
    torch.cuda.synchronize()
    graph, replaying = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = [output(lstm, x), output(gru, z)]
    for _ in range(TIMES):
        for out in captured:
            out.fill_(float("nan"))
        replaying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(replaying):
            graph.replay()
        eager = [output(lstm, x), output(gru, z)]
        torch.cuda.synchronize()
        for found in (captured, eager):
            assert_same(dict(enumerate(found)), dict(enumerate(expected)))


def test_a_captured_step_of_training_replays(pairs):
    for module, x in pairs[:3]:
        expected = trained(module, x)
        x = x.requires_grad_()
        # Made before, since a graph holds no copy from the host.
        weights = cotangents([output(module, x)])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = output(module, x)
            found = torch.autograd.grad(out, [x, *module.parameters()], weights)
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            assert_same(dict(enumerate([out.detach(), *found])), expected)
