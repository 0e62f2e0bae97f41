"""On what, and with what, something was measured."""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "seqcore", "benchmarks", "tests", "setup.py", "pyproject.toml")


def environment(device: str) -> dict:
    """Machine, versions, commit and kernel sources, each under its own key; None where there is no such thing."""
    return {**_fixed(device), "clocks": clocks(device)}


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
        answer = nvidia_smi("clocks.sm,clocks.mem")
        if answer is None:
            return None
        sm, memory = (part.strip().removesuffix(" MHz") for part in answer.split(","))
        return {"sm_mhz": float(sm), "memory_mhz": float(memory)}
    found = [float(value) for value in _cpu_lines("cpu MHz")]
    return {"cpu_mhz": max(found)} if found else None


def nvidia_smi(query: str) -> str | None:
    """One line of what nvidia-smi says about the current GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    lines = answer.stdout.splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


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


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where files differ from it; None outside a git checkout."""
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def kernel_hashes() -> dict[str, str]:
    """A short hash of each kernel's source, by its path below ``kernels/``."""
    folder = ROOT / "kernels"
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    }


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
