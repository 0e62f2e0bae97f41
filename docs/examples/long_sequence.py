"""One long sequence on several processes: attention in a ring and by exchanging heads, and pipelined recurrent layers.

    torchrun --standalone --nproc-per-node 4 docs/examples/long_sequence.py

Each process makes the same whole sequence, works on its own part of it, and compares with the whole computed at once,
which only a sequence as short as this one allows.
"""

import torch
import torch.distributed as dist

import seqcore
from seqcore.distributed import TimePipeline, cost, gather_sequence, ring_attention, shard_sequence, ulysses_attention

BATCH, HEADS, HEADS_KV, LENGTH, HEAD_DIM, WIDTH = 1, 8, 4, 256, 32, 16


def attention() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shapes = [(BATCH, heads, LENGTH, HEAD_DIM) for heads in (HEADS, HEADS_KV, HEADS_KV)]
    whole = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = seqcore.functional.attention(*whole, causal="top_left", enable_gqa=True)
    expected.square().sum().backward()

    # Under a causal mask later queries see more keys; in zigzag order all processes have as much to do.
    parts = [shard_sequence(t.detach(), 2, layout="zigzag").requires_grad_() for t in whole]
    out = ring_attention(*parts, causal=True, layout="zigzag", enable_gqa=True)
    out.square().sum().backward()
    torch.testing.assert_close(gather_sequence(out, 2, layout="zigzag"), expected.detach())
    for part, one in zip(parts, whole, strict=True):
        torch.testing.assert_close(gather_sequence(part.grad, 2, layout="zigzag"), one.grad)

    parts = [shard_sequence(t.detach(), 2) for t in whole]
    out = ulysses_attention(*parts, causal="top_left", enable_gqa=True)
    torch.testing.assert_close(gather_sequence(out, 2), expected.detach())

    if rank == 0:
        sizes = cost.Sequence(BATCH, HEADS, HEADS_KV, LENGTH, LENGTH, HEAD_DIM, HEAD_DIM, 4)
        ring = cost.ring_attention(sizes, ranks, "training", causal=True, layout="zigzag")
        ulysses = cost.ulysses_attention(sizes, ranks, "training", causal=True)
        print(f"{ranks} processes, {LENGTH} positions: attention equals one process's")
        print(f"a process sends {ring.bytes:,.0f} bytes in the ring, {ulysses.bytes:,.0f} exchanging heads")


def recurrence() -> None:
    rank, ranks, steps = dist.get_rank(), dist.get_world_size(), 32
    layers = [seqcore.nn.LSTM(WIDTH, WIDTH) for _ in range(ranks)]
    x = torch.randn(LENGTH, BATCH, WIDTH)

    last = rank == ranks - 1
    pipeline = TimePipeline(layers[rank], steps)
    found = pipeline.step(x if rank == 0 else None, loss=(lambda y: y.square().mean()) if last else None)

    mine = [parameter.grad for parameter in layers[rank].parameters()]
    layers[rank].zero_grad()
    y = x
    for layer in layers:
        y, _ = layer(y)
    loss = y.square().mean()
    loss.backward()
    for part, parameter in zip(mine, layers[rank].parameters(), strict=True):
        torch.testing.assert_close(part, parameter.grad)
    if last:
        torch.testing.assert_close(found.loss, loss.detach())
        busy = cost.pipeline_use(LENGTH // steps, ranks)
        print(f"{ranks} layers, {LENGTH // steps} chunks: gradients equal one process's; busy {busy:.0%} of the time")


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    attention()
    recurrence()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
