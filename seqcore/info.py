"""What this machine offers: versions, device, and what each backend can do here and why not."""

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, capabilities, devices, kernels, versions
from .kernels import tables


def gather() -> dict[str, Any]:
    """Versions, the device the kernels would run on, and for each operation and dtype who can serve it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = devices.describe(device)
    return {
        "seqcore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions.TRITON,
        "untested": versions.untested(torch.__version__, versions.TRITON),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "arch": described.arch,
        "multiprocessors": described.multiprocessors if device.type == "cuda" else None,
        "shared_memory_bytes": described.shared_memory if device.type == "cuda" else None,
        "tuned_table": backends.tuning.is_measured(described.arch),
        "tables": _tables(described),
        "interpreter": devices.INTERPRETED,
        "default_backend": backends.resolve(None),
        "backends": [_backends(described, family, operation) for family, operation in OPERATIONS],
    }


def kernel_hashes() -> dict[str, str]:
    """A short hash of each kernel's source, by its path below ``kernels/``."""
    folder = Path(kernels.__file__).parent
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    }


def nvidia_smi(query: str, units: bool = False) -> str | None:
    """What nvidia-smi says about the first GPU; None where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", f"--format=csv,noheader{'' if units else ',nounits'}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    lines = answer.stdout.splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


def family_hash(family: str) -> str:
    """One short hash over the kernels of "attention" or "recurrence", and what those call."""
    hashes = kernel_hashes()
    own = [value for path, value in hashes.items() if path.startswith(f"{family}/") or path in SHARED_KERNELS]
    return hashlib.sha256("".join(own).encode()).hexdigest()[:12]


SHARED_KERNELS = ("activations.py", "grid.py")


def _tables(device: backends.Device) -> list[dict[str, Any]]:
    """The tables of tile sizes in force, the user's before ours, and how many rows each gives.

    A row measured with other kernels than today's is stale, and yet in force.
    """
    hashes = {section: family_hash(section.partition("_")[0]) for section in tables.SECTIONS}
    found, above = [], {}
    for path, table in backends.tuning.used(device.arch, device.shared_memory):
        rows = [(section, row) for section, row in tables.rows(table) if not tables.holds(above, section, row)]
        stale = sum(row.get("measured", {}).get("kernels", hashes[section]) != hashes[section] for section, row in rows)
        if rows:
            about = {name: table.get(name) for name in ("provenance", "measured_on")}
            found.append({"file": str(path), "rows": len(rows), "stale_rows": stale} | about)
        above = tables.merged(above, table)
    return found


def identity() -> str:
    """What a result of this library depends on: its sources, the versions below it, and the device."""
    digest = hashlib.sha256()
    for folder in (Path(kernels.__file__).parent, Path(__file__).parent):
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("tuned/*.json"))):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    interpreted = " interpreted" if devices.INTERPRETED else ""
    return f"{device}{interpreted} torch {torch.__version__} triton {versions.TRITON} {digest.hexdigest()[:12]}"


OPERATIONS = (("recurrence", "rnn_tanh"), ("recurrence", "gru"), ("recurrence", "lstm"), ("attention", "attention"))


def _backends(device: backends.Device, family: str, operation: str) -> dict[str, Any]:
    request = capabilities.Request(family, operation, device, torch.float32)
    served = {
        "triton": {"can": not capabilities.why_not_triton(request), "why_not": capabilities.why_not_triton(request)},
        "aten": {"can": True, "why_not": []},
        "reference": {"can": True, "why_not": []},
    }
    lacking = {
        "triton": sorted(capabilities.ATEN_FEATURES[family] - capabilities.TRITON_FEATURES[family]),
        "aten": sorted(capabilities.TRITON_FEATURES[family] - capabilities.ATEN_FEATURES[family]),
    }
    return {"operation": operation, "auto": backends.choose(request, "auto"), **served, "lacking": lacking}


def render(info: dict[str, Any]) -> str:
    """``gather()``'s dictionary as text."""
    lines = [f"{name:<20} {value}" for name, value in info.items() if name not in ("untested", "tables", "backends")]
    lines += info["untested"]
    for table in info["tables"]:
        lines += ["", f"{table['rows']} rows of tile sizes from {table['file']}", f"  {table['provenance']}"]
        if table["stale_rows"]:
            lines.append(f"  {table['stale_rows']} of them measured with other kernels than these: run seqcore tune")
    for entry in info["backends"]:
        lines += ["", f"{entry['operation']}: auto takes {entry['auto']}"]
        for name in ("triton", "aten", "reference"):
            state = "yes" if entry[name]["can"] else "no: " + "; ".join(entry[name]["why_not"])
            lacking = entry["lacking"].get(name)
            lines.append(f"  {name:<10} {state}" + (f" (without {', '.join(lacking)})" if lacking else ""))
    return "\n".join(lines)
