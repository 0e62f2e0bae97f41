"""Recurrent layers on several processes, chunks of time passing through, equal the same layers on one."""

import copy

import pytest
import torch
import torch.distributed as dist

import seqcore
from seqcore.distributed import TimePipeline, cost
from seqcore.distributed.pipeline import HEADER
from seqcore.testing.traffic import Traffic

from .distributed_twins import DOUBLE
from .recurrence_twins import mapped

T, B, WIDTH, STEPS = 11, 3, 4, 4


def layers(kind: str, **options):
    return [getattr(seqcore.nn, kind)(WIDTH, WIDTH, **options, **DOUBLE) for _ in range(dist.get_world_size())]


def one_process(modules, x, states, truncate: bool):
    """All layers over the chunks; where gradients are cut, between chunks, so is the graph."""
    time, outputs, states = int(modules[0].batch_first), [], list(states)
    for chunk in x.split(STEPS, time):
        for index, module in enumerate(modules):
            chunk, states[index] = module(chunk, states[index])
            states[index] = mapped(torch.Tensor.detach, states[index]) if truncate else states[index]
        outputs.append(chunk)
    return torch.cat(outputs, time), states


def pipeline_job(kind: str, truncate: bool, batch_first: bool, given: bool):
    rank, W = dist.get_rank(), dist.get_world_size()
    modules = layers(kind, batch_first=batch_first)
    whole = copy.deepcopy(modules)
    x = torch.randn(*((B, T) if batch_first else (T, B)), WIDTH, **DOUBLE).requires_grad_()
    states = [None] * W
    if given:
        h = torch.randn(W, 2, 1, B, WIDTH, **DOUBLE)
        states = [tuple(h[i].unbind()) if kind == "LSTM" else h[i, 0] for i in range(W)]
        states = [mapped(lambda t: t.clone().requires_grad_(), state) for state in states]
    mine = mapped(lambda t: t.detach().requires_grad_(), states[rank]) if given else None
    own_x = x.detach().requires_grad_()

    pipeline = TimePipeline(modules[rank], STEPS, truncate=truncate)
    found = pipeline.step(
        own_x if rank == 0 else None, mine, loss=(lambda y: y.square().sum()) if rank == W - 1 else None
    )
    output, final = one_process(whole, x, states, truncate)
    loss = output.square().sum()
    loss.backward()

    if rank == W - 1:
        torch.testing.assert_close((found.output, found.loss), (output.detach(), loss.detach()))
    else:
        assert found.output is None and found.loss is None
    if rank == 0:
        torch.testing.assert_close(own_x.grad, x.grad)
    torch.testing.assert_close(found.hx, mapped(torch.Tensor.detach, final[rank]))
    for part, one in zip(modules[rank].parameters(), whole[rank].parameters(), strict=True):
        torch.testing.assert_close(part.grad, one.grad)
    if given:
        for part, one in zip(*((t,) if kind != "LSTM" else t for t in (mine, states[rank])), strict=True):
            torch.testing.assert_close(part.grad, one.grad)
    before = [p.grad.clone() for p in modules[rank].parameters()]
    again = pipeline.forward(own_x if rank == 0 else None, mine)
    assert all(torch.equal(p.grad, g) for p, g in zip(modules[rank].parameters(), before, strict=True))
    if rank == W - 1:
        assert torch.equal(again.output, found.output)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("truncate", [False, True], ids=["exact", "truncated"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process(processes, size, kind, truncate, batch_first, given):
    processes(size).run(pipeline_job, kind, truncate, batch_first, given)


def traffic_job():
    rank, W = dist.get_rank(), dist.get_world_size()
    pipeline, x = TimePipeline(layers("GRU")[rank], STEPS), torch.randn(T, B, WIDTH, **DOUBLE)
    loss = (lambda y: y.sum()) if rank == W - 1 else None
    with Traffic() as traffic:
        pipeline.step(x if rank == 0 else None, loss=loss)
    return traffic.total


def test_bytes_sent_are_those_of_the_cost_model(processes):
    header = HEADER * 8
    both = cost.time_pipeline(T, B, WIDTH, 8, "training", 1.0).bytes
    assert processes(4).run(traffic_job) == [both / 2 + header, both + header, both + header, both / 2]


def test_use_of_a_pipeline():
    assert cost.pipeline_use(1, 4) == 1 / 4 and cost.pipeline_use(13, 4) == 13 / 16


def errors_job():
    rank = dist.get_rank()
    for build, message in (
        (lambda: TimePipeline(seqcore.nn.LSTM(4, 4, bidirectional=True), 3), "must be a unidirectional recurrent"),
        (lambda: TimePipeline(torch.nn.Linear(4, 4), 3), "must be a unidirectional recurrent module"),
        (lambda: TimePipeline(seqcore.nn.LSTM(4, 4), 0), "steps must be a positive number of time steps, got 0"),
    ):
        with pytest.raises(seqcore.InvalidInput, match=message):
            build()
    pipeline = TimePipeline(seqcore.nn.LSTM(4, 4), 3)
    if rank == 0:
        for wrong, got in ((None, "got NoneType"), (torch.randn(3, 4), r"got \[3, 4\]"), (torch.randn(0, 2, 4), "got")):
            with pytest.raises(seqcore.InvalidInput, match=f"needs a batched Tensor of 3 dimensions.* {got}"):
                pipeline.step(wrong)
    else:
        with pytest.raises(seqcore.InvalidInput, match=r"needs loss=, a function of the whole output"):
            pipeline.step()
        with pytest.raises(seqcore.InvalidInput, match="takes its input from the one before"):
            pipeline.forward(torch.randn(3, 2, 4))
    with torch.no_grad(), pytest.raises(seqcore.InvalidInput, match="computes gradients, got called under no_grad"):
        pipeline.step(torch.randn(3, 2, 4) if rank == 0 else None, loss=torch.sum)


def other_steps_job():
    rank = dist.get_rank()
    pipeline = TimePipeline(seqcore.nn.LSTM(4, 4), 2 + rank)
    if rank == 0:
        pipeline.forward(torch.randn(1, 2, 4))
    else:
        with pytest.raises(seqcore.InvalidInput, match="steps must be the same on all processes, got 2 and 3"):
            pipeline.forward()
        dist.recv(torch.empty(1, 2, 4), group_src=0)  # which the other one waits to be rid of


def test_other_steps_are_noticed(processes):
    processes(2).run(other_steps_job)


def below_job():
    """What is below the first layer learns, too; and a loss that leaves the output out gives zeros."""
    rank, tokens = dist.get_rank(), torch.randint(5, (T, B))
    layer, embedding = seqcore.nn.GRU(WIDTH, WIDTH), torch.nn.Embedding(5, WIDTH)
    pipeline = TimePipeline(layer, STEPS)
    pipeline.step(embedding(tokens) if rank == 0 else None, loss=torch.sum if rank else None)
    assert rank or embedding.weight.grad.any()
    layer.zero_grad()
    constant = torch.ones((), requires_grad=True)
    pipeline.step(embedding(tokens) if rank == 0 else None, loss=(lambda y: constant * 2) if rank else None)
    assert not any(p.grad.any() for p in layer.parameters())


def test_gradients_go_on_below_the_first_layer(processes):
    processes(2).run(below_job)


def test_wrong_input_is_refused_before_anything_is_sent(processes):
    processes(2).run(errors_job)
