"""What a profiler found, for the report: kernels with their work, and how the time of a step divides."""

from dataclasses import dataclass
from pathlib import Path

from seqcore.files import read_json


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profile; its work is None where nobody counted it."""

    name: str
    ms: float
    flops: float | None
    bytes: float | None

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes

    @property
    def tflops(self) -> float:
        return self.flops / self.ms / 1e9


@dataclass(frozen=True)
class Profile:
    """One pass of one layer."""

    op: str
    shape: dict[str, int]
    dtype: str
    pass_: str
    kernels: list[Kernel]
    # Microseconds a step of each part, negative where parts overlap; empty where nobody asked.
    split: dict[str, float]

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{name} = {count:,}" for name, count in self.shape.items())
        return f"{self.op} {self.pass_} {self.dtype}, {sizes}"


def load(path: Path, machine: dict) -> list[Profile]:
    """Read {"profiles": [{"op", "shape", "dtype", "pass", "kernels": [{"name", "ms", "flops", "bytes"}], "split"}]}.

    What was profiled at another commit or with other kernels than the rows of ``machine`` is left out, as rows are.
    """
    whole = read_json(path)
    its = whole.get("machine", machine)
    if any(its.get(key) != machine.get(key) for key in ("commit", "kernels")):
        return []
    return [
        Profile(
            found["op"],
            found["shape"],
            found["dtype"],
            found["pass"],
            [Kernel(*(kernel[key] for key in ("name", "ms", "flops", "bytes"))) for kernel in found.get("kernels", [])],
            found.get("split") or {},
        )
        for found in whole["profiles"]
    ]
