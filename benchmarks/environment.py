"""On what, and with what, something was measured."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from seqcore.info import kernel_hashes, nvidia_smi

ROOT = Path(__file__).resolve().parent.parent
# Kept busy by others, from which on times are not to be trusted.
BUSY_CORES = 0.3
SOURCES = ("kernels", "seqcore", "benchmarks", "tests", "setup.py", "pyproject.toml")


def environment(device: str) -> dict:
    """Machine, versions, commit and kernel sources, each under its own key; None where there is no such thing."""
    return {**_fixed(device), "clocks": clocks(device)}


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores other programs keep busy just now, while this one waits; None where nothing tells."""
    before = _processor_ticks()
    time.sleep(seconds)
    after = _processor_ticks()
    if before is None or after is None or after[0] == before[0]:
        return None
    idle = (after[1] - before[1]) / (after[0] - before[0])
    return (1 - idle) * (os.cpu_count() or 1)


def _processor_ticks() -> tuple[int, int] | None:
    """Of all cores since the machine started: all ticks, and the idle ones."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    # user nice system idle iowait irq softirq steal; what follows is counted in user already.
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


@functools.cache
def _fixed(device: str) -> dict:
    on_gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": nvidia_smi("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit(),
        "kernels": kernel_hashes(),
    }


def clocks(device: str) -> dict | None:
    """Clocks in MHz at this moment; None where the machine does not tell."""
    if device == "cuda":
        names = ("sm_mhz", "memory_mhz")
        answers = (nvidia_smi("clocks.sm,clocks.mem") or "").split(",")
        # A GPU may answer "[N/A]".
        known = {name: int(text) for name, text in zip(names, answers, strict=False) if text.strip().isdigit()}
        return known or None
    found = [float(value) for value in _cpu_lines("cpu MHz")]
    return {"cpu_mhz": max(found)} if found else None


def cpu_name() -> str:
    names = _cpu_lines("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_lines(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(*aside: str) -> str | None:
    """The checkout's commit, with ``-dirty`` where files but those ``aside`` differ; None outside a git checkout."""
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in aside))
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def key(device: str, *conditions: str) -> str:
    """What outcomes here depend on: machine, versions, sources, and under which conditions they came about."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return " ".join((f"{name} torch {torch.__version__} triton {version('triton')} {source_hash()}", *conditions))


def source_hash() -> str:
    """One hash over every source file that can change a result, committed or not."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if path.is_file() and path.suffix in {".py", ".json", ".toml"} and "results" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
