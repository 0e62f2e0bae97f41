"""DDP and FSDP2 take seqcore's modules; checkpoints bring a run back after one of its processes was killed."""

import copy
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import seqcore
from seqcore.distributed import cost
from seqcore.testing.traffic import Traffic

from .distributed_twins import DOUBLE, mesh
from .process_group import SMALL, TORCHRUN
from .test_examples import EXAMPLES, load

BATCH, T, WIDTH = 8, 5, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = seqcore.nn.MultiheadAttention(WIDTH, 2, batch_first=True, **DOUBLE)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Sequence(nn.Module):
    """A recurrent module of batch_first, or a cell walked over time."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.recurrent = getattr(seqcore.nn, kind)(WIDTH, WIDTH, **options, **DOUBLE)

    def forward(self, x):
        if isinstance(self.recurrent, nn.RNNBase):
            return self.recurrent(x)[0]
        hx = None
        for step in x.unbind(1):
            hx = self.recurrent(step, hx)
        return hx[0] if isinstance(hx, tuple) else hx


MODELS = {
    "RNN": lambda: Sequence("RNN", batch_first=True),
    "GRU": lambda: Sequence("GRU", batch_first=True, num_layers=2),
    "LSTM": lambda: Sequence("LSTM", batch_first=True, bidirectional=True, proj_size=3),
    "LSTMCell": lambda: Sequence("LSTMCell"),
    "attention": Attention,
}


def model_job(name: str, strategy: str):
    torch.manual_seed(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, x = MODELS[name](), torch.randn(BATCH, T, WIDTH, **DOUBLE)
    model, optimizer = copy.deepcopy(whole), torch.optim.Adam(whole.parameters())
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=mesh(ranks))
        assert all(isinstance(p, DTensor) for p in model.parameters())
    own = torch.optim.Adam(model.parameters())
    for _ in range(3):
        for module, of, data in ((whole, optimizer, x), (model, own, x.chunk(ranks)[rank])):
            of.zero_grad()
            module(data).square().mean().backward()
            of.step()
    for part, one in zip(model.parameters(), whole.parameters(), strict=True):
        for found, expected in ((part, one), (part.grad, one.grad)):
            torch.testing.assert_close(found.full_tensor() if isinstance(found, DTensor) else found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_steps_equal_those_of_one_process(processes, size, strategy, name):
    processes(size).run(model_job, name, strategy)


def traffic_job(strategy: str):
    W, layers = dist.get_world_size(), nn.Sequential(MODELS["GRU"](), MODELS["LSTM"]())
    layers[1].recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True, **DOUBLE)
    layers[1].recurrent.__class__ = seqcore.nn.LSTM
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    if strategy == "ddp":
        model = DistributedDataParallel(layers)
        expected = cost.data_parallel(sum(counts), 8, W, 1.0).bytes
    else:
        for module in (*layers, layers):
            fully_shard(module, mesh=mesh(W), reshard_after_forward=True)
        model = layers
        expected = sum(cost.fully_sharded(count, 8, W, 1.0).bytes for count in counts)
    with Traffic() as traffic:
        model(torch.randn(2, T, WIDTH, **DOUBLE)).sum().backward()
    assert traffic.total == expected


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent_are_those_of_the_cost_model(processes, size, strategy):
    processes(size).run(traffic_job, strategy)


# --- checkpoints ---------------------------------------------------------------------------------------------------

STEPS, SAVE_EVERY = 300, 40


def train_job(strategy: str, folder: str, steps: int, save_every: int):
    return load("distributed_training").train(strategy, Path(folder), steps, save_every, torch.device("cpu"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_another_number_of_processes_goes_on_from_a_checkpoint(processes, tmp_path, strategy):
    (tmp_path / "split").mkdir()
    (tmp_path / "whole").mkdir()
    whole = processes(2).run(train_job, strategy, str(tmp_path / "whole"), 6, 3)[0]
    processes(2).run(train_job, strategy, str(tmp_path / "split"), 3, 3)
    rest = processes(4).run(train_job, strategy, str(tmp_path / "split"), 6, 3)[0]
    assert list(rest) == [3, 4, 5]
    torch.testing.assert_close(list(rest.values()), [whole[step] for step in rest])


def children(of: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything; the parent is the second field after it.
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == of:
            found.append(int(stat.parent.name))
    return sorted(found)


def launch(strategy: str, folder: Path, kill_at: int | None) -> tuple[str, list[tuple[int, float]]]:
    """What torchrun wrote if it failed, and the losses of a run of the example, a process killed at ``kill_at``."""
    command = (
        *TORCHRUN, str(EXAMPLES / "distributed_training.py"), "--strategy", strategy, "--folder", str(folder),
        "--steps", str(STEPS), "--save-every", str(SAVE_EVERY),
    )  # fmt: skip
    environment = os.environ | SMALL | {"CUDA_VISIBLE_DEVICES": ""}
    losses, errors = [], folder / "errors.txt"
    with errors.open("w") as stderr, subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=stderr
    ) as run:
        for line in run.stdout:
            step, loss = re.fullmatch(r"step (\d+) loss (\S+)\n", line).groups()
            losses.append((int(step), float(loss)))
            if int(step) == kill_at:
                os.kill(children(run.pid)[-1], signal.SIGKILL)
    return errors.read_text() if run.returncode else "", losses


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_process_costs_only_the_steps_since_the_last_checkpoint(processes, tmp_path, strategy):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = processes(2).run(train_job, strategy, str(whole), STEPS, STEPS)[0]
    failed, losses = launch(strategy, killed, kill_at=SAVE_EVERY + 5)
    begin = int((killed / "latest").read_text()) + 1
    assert failed and SAVE_EVERY <= begin <= losses[-1][0] < STEPS - 1
    failed, losses = launch(strategy, killed, kill_at=None)
    assert not failed, failed
    assert losses == [(step, round(expected[step], 6)) for step in range(begin, STEPS)]
