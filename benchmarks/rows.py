"""A measurement as it stands in the JSON: written into ``extra_info`` here, and read back here."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.floors import layer_floor
from benchmarks.timing import Roofs, Timing
from seqcore.files import read_json
from seqcore.kernels.work import Work

# Beside its peers' names, how ours is called in tables and plots.
OURS = "seqcore"


def extra_info(
    suite: str,
    op: str,
    pass_: str,
    dtype: str,
    shape: dict[str, int],
    ours: Timing,
    peers: dict[str, Timing],
    work: Work,
    environment: dict,
    **more,
) -> dict:
    """One row: what was measured, and how fast ours and its peers were."""
    best_peer = min(peers, key=lambda name: peers[name].ms_p50, default=None)
    tokens, seconds = shape.get("tokens", shape["T"] * shape["B"]), ours.ms_p50 / 1e3
    by_round = peers[best_peer].over(ours) if best_peer and ours.samples else None
    return {
        "suite": suite,
        "op": op,
        "pass": pass_,
        "dtype": dtype,
        "shape": shape,
        "ms_p20": ours.ms_p20,
        "ms_p50": ours.ms_p50,
        "ms_p80": ours.ms_p80,
        "peers": {name: timing.ms_p50 for name, timing in peers.items()},
        "best_peer": best_peer,
        "ratio": best_peer and peers[best_peer].ms_p50 / ours.ms_p50,
        "ratio_p20": by_round and by_round.ms_p20,
        "ratio_p80": by_round and by_round.ms_p80,
        "tokens_per_s": tokens / seconds,
        "us_per_step": ours.ms_p50 * 1e3 / shape["T"],
        "flops": work.flops,
        "bytes": work.bytes,
        "tflops": work.flops / seconds / 1e12,
        "dependent_steps": work.dependent_steps,
        "launches": work.launches,
        **more,
        **environment,
    }


def add_roofs(info: dict, roofs: Roofs) -> None:
    """Complete a row, once all is measured, by how near it came to the machine's limits."""
    info["floor_ms"], info["floor_kind"] = roofs.floor(info["flops"], info["bytes"], info["launches"])
    if info.get("step_floors"):
        parts = info["floor_parts"] = layer_floor(info, roofs)
        info["floor_ms"], info["floor_kind"] = sum(parts.values()), max(parts, key=parts.__getitem__)
    info["percent_of_peak"] = 100 * info["tflops"] / roofs.tflops
    info["peak_tflops"], info["copy_gb_per_s"] = roofs.tflops, roofs.gigabytes_per_s
    info["peak_dtype"], info["launch_us"] = roofs.dtype, roofs.launch_us


def floor_info(op: str, shape: dict[str, int], value: float, unit: str, timing: Timing, environment: dict) -> dict:
    """A row of the floors suite: something without peers, that other rows are multiples of."""
    return {
        "suite": "floors",
        "op": op,
        "pass": "forward",
        "dtype": None,
        "shape": shape,
        "ms_p20": timing.ms_p20,
        "ms_p50": timing.ms_p50,
        "ms_p80": timing.ms_p80,
        "peers": {},
        "best_peer": None,
        "ratio": None,
        "floor_ms": None,
        "floor_kind": None,
        "value": value,
        "unit": unit,
        **environment,
    }


@dataclass(frozen=True)
class Row:
    """One row, read back."""

    info: dict
    # Of its test.
    name: str = ""

    @property
    def op(self) -> str:
        return self.info["op"]

    @property
    def T(self) -> int:
        return self.info["shape"].get("T", 0)

    @property
    def B(self) -> int:
        return self.info["shape"].get("B", 0)

    @property
    def tokens(self) -> int:
        return self.T * self.B

    @property
    def times(self) -> dict[str, float]:
        """Median milliseconds of every contestant, ours first."""
        return {OURS: self.info["ms_p50"], **self.info["peers"]}

    @property
    def fastest(self) -> str:
        return min(self.times, key=self.times.__getitem__)

    @property
    def ms(self) -> float:
        """Milliseconds of whoever is fastest: what this layer costs on this machine."""
        return self.times[self.fastest]


@dataclass(frozen=True)
class Results:
    """One run of the benchmarks."""

    rows: list[Row]
    machine: dict
    not_measured: list[dict]
    date: str

    @classmethod
    def load(cls, *paths: Path) -> "Results":
        """Read pytest-benchmark's JSON; rows of other suites are kept and ignored by what does not know them.

        Of several files the first tells machine and date; those from another commit or other kernels are left out.
        """
        all_found = [_read(path) for path in paths]
        machine = all_found[0].get("seqcore", {}).get("machine", {})
        rows, not_measured = [], []
        for found in all_found:
            ours = found.get("seqcore", {})
            if all(ours.get("machine", {}).get(key) == machine.get(key) for key in ("commit", "kernels")):
                of_suites = (entry for entry in found["benchmarks"] if "suite" in entry["extra_info"])
                rows += [Row(entry["extra_info"], entry.get("name", "")) for entry in of_suites]
                not_measured += ours.get("not_measured", [])
        return cls(rows, machine, not_measured, all_found[0].get("datetime", ""))

    def select(self, **wanted) -> list[Row]:
        """Rows whose ``extra_info`` has these values, ``pass`` being spelled ``pass_``; by T, then B."""
        wanted = {key.rstrip("_"): value for key, value in wanted.items()}
        found = [row for row in self.rows if wanted.items() <= _plain(row.info, wanted)]
        return sorted(found, key=lambda row: (row.T, row.B))

    def values(self, key: str, among: Iterable[str]) -> list[str]:
        """Those of ``among`` that occur as ``key`` in some row, in that order."""
        present = {row.info.get(key) for row in self.rows}
        return [value for value in among if value in present]


def _read(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
        raise ValueError(f"{path} has no 'benchmarks'; pass a bench.json that `python -m benchmarks` wrote")
    rows = [entry.get("extra_info") if isinstance(entry, dict) else None for entry in found["benchmarks"]]
    ours = found.get("seqcore", {})
    if not all(map(_is_row, rows)) or not isinstance(ours, dict) or not isinstance(ours.get("machine", {}), dict):
        raise ValueError(f"{path} has rows that `python -m benchmarks` did not write; measure them again")
    return found


def _is_row(info: Any) -> bool:
    """Whether it has what is read of every row, or is of nobody's suite."""
    if not isinstance(info, dict) or "suite" not in info:
        return isinstance(info, dict)
    numbers = (info.get(name) for name in ("ms_p20", "ms_p50", "ms_p80"))
    named = all(isinstance(info.get(name), str) for name in ("suite", "op", "pass"))
    # What a limit of the machine is measured by has no peers.
    tables = isinstance(info.get("shape"), dict) and isinstance(info.get("peers", {}), dict)
    return named and tables and all(isinstance(number, (int, float)) for number in numbers)


def _plain(info: dict, wanted: dict) -> set:
    return {(key, info[key]) for key in wanted if key in info}
