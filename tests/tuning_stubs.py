"""Problems and clocks for the tests of the search: times are what they say, nothing is launched."""

import contextlib
import random

import torch

from seqcore.kernels.tuning import Device
from seqcore.testing import aot
from seqcore.testing.cases import Case
from seqcore.tuning import ahead, search
from seqcore.tuning.problem import Problem
from seqcore.tuning.race import Deadline

CPU = torch.device("cpu")
H200 = Device("sm_90")
FOREVER = Deadline(None)


class Stub(Problem):
    """Candidates 0 to N - 1, of which ``true_ms`` tells the milliseconds; those in ``wrong`` compute something else."""

    operation, section, family, precision = "attention", "attention_forward", "attention", "ieee"
    dtype = torch.float32

    def __init__(self, true_ms, head_dim=64, wrong=(), raising=(), torch_ms=1.0):
        self.true_ms, self.head_dim, self.wrong, self.raising = true_ms, head_dim, wrong, raising
        self.torch_ms, self.now = torch_ms, 0

    @property
    def name(self):
        return f"stub {self.head_dim}"

    def candidates(self, device):
        return [{"BLOCK_M": 16 << n, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1} for n in range(len(self.true_ms))]

    @contextlib.contextmanager
    def using(self, fields):
        before, self.now = self.now, (fields["BLOCK_M"] // 16).bit_length() - 1
        yield
        self.now = before

    def entries(self, fields, device):
        raise AssertionError("nothing is compiled where kernels are interpreted")

    def cases(self, device):
        def compute(tensors, backend):
            if backend == "triton" and self.now in self.raising:
                raise RuntimeError("out of resource")
            return {"y": tensors["x"] * (1.01 if backend == "triton" and self.now in self.wrong else 1.0)}

        return [Case("a case", {"x": torch.randn(4, 4)}, compute, {"default": "a kernel"})]

    def small(self):
        return self

    def call(self, device):
        return lambda: self.true_ms[self.now]

    @property
    def contest(self):
        return f"contest {self.head_dim}"

    def contestant(self, device, backend):
        return lambda: self.torch_ms if backend == "aten" else 1.0

    def row(self, fields, device):
        return {"dtype_bits": 32, "head_dim": self.head_dim} | fields


class FakeClock:
    """The milliseconds a call says it takes, disturbed; the noise is a machine's at its worst, times one and more."""

    def __init__(self, noise=0.0, seed=0):
        self.random, self.noise, self.calls = random.Random(seed), noise, []

    def __call__(self, call):
        self.calls.append(call())
        return self.calls[-1] * self.random.lognormvariate(0, self.noise)


def bench(clock, deadline=FOREVER, device=H200) -> search.Bench:
    return search.Bench(device, CPU, None, clock, deadline)


class Here(ahead.Compiler):
    """Compiles in this process."""

    def __init__(self):
        pass

    def rows(self, entries, deadline):
        return [aot.compile_entry(entry) for entry in entries]
