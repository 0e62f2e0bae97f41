"""Small problems with every option, whose results are compared bit by bit, also by other processes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from seqcore import backends, functional, nn
from seqcore.cells import GRU, LSTM, RNN_TANH
from seqcore.testing.attention_cases import attention_case
from seqcore.testing.cases import LAYOUTS, ZONED, Case, Results, recurrence_case
from seqcore.testing.verify import compute

from .routes import by_the_operators

CPU = torch.device("cpu")
M, N, D = 5, 7, 16
LENGTHS = {"query_lengths": [M, 2], "key_lengths": [3, N]}
ATTENTIONS = (
    {}, {"causal": "top_left"}, {"causal": "lower_right", "bool_mask": (2, 1, M, N)}, {"mask": (1, 4, 1, N)},
    {"mask": (M, 1), "softcap": 2.0}, {"window": (2, 1), "sinks": True}, {"alibi": True, **LENGTHS},
    {"cu_seqlens": True, "causal": "top_left"}, {"dropout_p": 0.3},
    {"return_weights": "average", "dropout_p": 0.3, "causal": "lower_right"},
    {
        **LENGTHS, "mask": (1, 4, M, N), "window": (3, 2), "softcap": 3.0, "alibi": True, "sinks": True,
        "dropout_p": 0.2,
    },
)  # fmt: skip
DECODED = ({}, {"softcap": 2.0, "alibi": True, "dropout_p": 0.3})


def _drawn(module: torch.nn.Module, *sizes: int, packed: bool = False) -> Case:
    """A module in training, which draws from torch's generator; its input, states and weights are differentiated."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in module.named_parameters()]
    tensors = {name: torch.randn(p.shape, generator=generator) / 4 for name, p in module.named_parameters()}
    tensors["x"] = torch.randn(sizes, generator=generator)
    recurrent = isinstance(module, torch.nn.RNNBase)
    if recurrent:
        layers = module.num_layers * (1 + module.bidirectional)
        tensors["h0"] = torch.randn(layers, sizes[1], module.proj_size or module.hidden_size, generator=generator)
        if isinstance(module, nn.LSTM):
            tensors["c0"] = torch.randn(layers, sizes[1], module.hidden_size, generator=generator)

    def run(given: Results, backend: str) -> Results:
        torch.manual_seed(3)
        x = given["x"]
        if packed:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
        hx = (given["h0"], given["c0"]) if "c0" in given else given.get("h0")
        with backends.use_backend(backend):
            y, state = torch.func.functional_call(
                module, {name: given[name] for name in names}, (x, hx) if recurrent else (x, x, x)
            )
        found = {"y": y.data if packed else y}
        states = state if isinstance(state, tuple) else (state,) if recurrent else ()
        return found | dict(zip(("h_n", "c_n"), states, strict=False))

    return Case(f"{type(module).__name__}{list(sizes)} {module.extra_repr()} packed={packed}", tensors, run, {})


def _modules() -> Iterator[Case]:
    yield _drawn(nn.LSTM(6, 5, num_layers=2, dropout=0.5, bidirectional=True), 4, 3, 6)
    yield _drawn(nn.LSTM(6, 5, zoneout=(0.1, 0.8), locked=True, dropout=0.5, num_layers=2), 4, 3, 6, packed=True)
    yield _drawn(nn.LSTM(6, 5, proj_size=3, bidirectional=True), 4, 3, 6)
    yield _drawn(nn.LSTM(6, 5, proj_size=3), 4, 3, 6, packed=True)
    yield _drawn(nn.GRU(6, 5, num_layers=2, dropout=0.5, zoneout=0.2), 4, 3, 6)
    yield _drawn(nn.MultiheadAttention(8, 2, dropout=0.4, add_bias_kv=True), 4, 3, 8)


def problems() -> list[Case]:
    """Recurrences in every layout, in blocks and zoned out, attention with every feature, modules that draw."""
    found = []
    for cell in (RNN_TANH, GRU, LSTM):
        found += [recurrence_case(cell, 3, 4, 6, 5, 1, layout, CPU) for layout in (*LAYOUTS, ZONED)]
        found += [recurrence_case(cell, *sizes, "padded", CPU) for sizes in ((1, 4, 6, 5, 1), (2, 3, 6, 6, 2))]
    found += [attention_case(CPU, M, N, D, **features) for features in ATTENTIONS]
    # So few queries over so many keys that they are decoded in parts.
    found += [attention_case(CPU, 1, 70, D, **features) for features in DECODED]
    return [*found, *_modules()]


def of(case: Case, backend: str) -> Results | None:
    """Outputs and gradients of a problem; None if ``backend`` has no such operation. "operators": as a GPU's."""
    try:
        if backend == "operators":
            with by_the_operators():
                return compute(case, case.tensors, "auto")
        return compute(case, case.tensors, backend)
    except NotImplementedError:
        return None


def digest(results: Results) -> str:
    """One for each combination of bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(results.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(backend: str, some: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """The digest of each problem that ``backend`` can serve, by its name; ``some`` chooses among them."""
    found = {case.name: of(case, backend) for case in problems() if some(case.name)}
    return {name: digest(results) for name, results in found.items() if results is not None}


def philox_digest() -> str:
    """Of which pairs dropout by a seed keeps."""
    # So much that torch divides it among threads.
    alike, each = torch.zeros(1, 2, 256, 256), torch.eye(256).expand(1, 2, -1, -1)
    options = {"dropout_p": 0.5, "dropout_seed": 5, "backend": "reference"}
    return digest({"kept": functional.attention(alike, alike, each, **options) > 0})


COMMAND = "import sys; sys.path.append(sys.argv[1]); from tests.determinism_problems import main; main(sys.argv[2:])"


def main(asked: list[str]) -> None:
    """What another process finds: of each backend that is asked for, of the problems that are, or of all."""
    names = [word for word in asked if " " in word]
    chosen = lambda name: not names or name in names
    found = {backend: digests(backend, chosen) for backend in asked if backend not in names}
    print(json.dumps(found | {"philox": philox_digest()}))


def of_another_process(*asked: str, **variables: str) -> dict[str, Any]:
    """What ``main`` prints in a process with these variables in its environment; any warning is an error there."""
    command = [sys.executable, "-W", "error", "-c", COMMAND, str(Path(__file__).parent.parent), *asked]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
