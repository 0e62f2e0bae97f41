"""Train a small LSTM language model on several processes, with checkpoints from which it goes on after a failure.

    torchrun --standalone --nproc-per-node 2 docs/examples/distributed_training.py --strategy fsdp --folder checkpoints

``--strategy ddp`` copies the model to every process, ``fsdp`` divides its parameters, gradients and optimizer state
among them (FSDP2). If a process dies, run the same line again: what was saved last is loaded, and the losses are those
of a run that nothing has happened to. So they are, but for roundings, with another number of processes.
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import seqcore

VOCABULARY, WIDTH, BATCH, TIME = 32, 48, 8, 16


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = seqcore.nn.LSTM(WIDTH, WIDTH, num_layers=2)
        self.logits = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.lstm(self.embedding(tokens))[0])


def batch(step: int) -> Tensor:
    """[T + 1, B] tokens: numbers that count up from a random start, and wrap."""
    start = torch.randint(VOCABULARY, (BATCH,), generator=torch.Generator().manual_seed(step))
    return (torch.arange(TIME + 1)[:, None] + start) % VOCABULARY


def parallel(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (model.lstm, model):
        fully_shard(module, mesh=mesh)
    return model


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Write a whole checkpoint, then say that it is the one to load: a failure in between loses nothing."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder / f"step-{step}"))
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(str(step))
        (folder / "latest.new").replace(folder / "latest")


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """The step to begin with: 0, or the one after the last that was saved."""
    if not (folder / "latest").exists():
        return 0
    step = int((folder / "latest").read_text())
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, checkpoint_id=str(folder / f"step-{step}"))
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    return step + 1


def train(strategy: str, folder: Path, steps: int, save_every: int, device: torch.device) -> dict[int, float]:
    """The loss of each step that was run here, which are those after the last checkpoint in ``folder``."""
    torch.manual_seed(0)
    model = parallel(LanguageModel().to(device), strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rank, ranks, losses = dist.get_rank(), dist.get_world_size(), {}
    if BATCH % ranks:
        raise SystemExit(f"a batch of {BATCH} sequences cannot be divided evenly among {ranks} processes")
    for step in range(load(model, optimizer, folder), steps):
        tokens = batch(step).chunk(ranks, 1)[rank].to(device)
        loss = F.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses[step] = mean.item()
        if rank == 0:
            print(f"step {step} loss {mean.item():.6f}", flush=True)
        if (step + 1) % save_every == 0:
            save(model, optimizer, step, folder)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written, and looked for")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(options.strategy, options.folder, options.steps, options.save_every, device)
    # The divided model holds the group, in cycles: a group that outlives Python may abort the process.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
