"""What a compiled kernel takes: shared memory, registers, spills, matrix instructions; read from the program."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

MATRIX_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
}


def resources(compiled) -> dict[str, Any]:
    """What a compiled kernel takes. Spills are bytes of scratch memory a thread."""
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    usage = cuda_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd_usage(assembly)
    return {
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        **usage,
        "mma": matrix_instructions(assembly),
        "specialised": "ttg.warp_specialize" in compiled.asm["ttgir"],
    }


def matrix_instructions(assembly: str) -> dict[str, int]:
    """How many of each kind of matrix instruction the program text holds, without those it has none of."""
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def cuda_usage(cubin: bytes) -> dict[str, int]:
    """Registers and spills of a cubin, by Triton's own cuobjdump."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_cuda_usage(text)


def parse_cuda_usage(text: str) -> dict[str, int]:
    """Registers and spills out of ``cuobjdump --dump-resource-usage``.

    Kernels keep no arrays of their own in local memory, so a thread's stack frame is its spilled registers.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump reports no resource usage: {text!r}")
    return {"registers": int(found[1]), "spills": int(found[2])}


def amd_usage(amdgcn: str) -> dict[str, int]:
    """Registers and spills out of the metadata that ends an AMD program.

    Vector registers spill to private memory. Scalar ones spill to lanes of vector registers, which costs no memory:
    they are told apart and have no budget.
    """

    def metadata(key: str) -> int:
        found = re.search(rf"^\s*-?\s*\.{key}:\s*(\d+)\s*$", amdgcn, re.MULTILINE)
        if found is None:
            raise ValueError(f"the program's metadata lacks .{key}")
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("private_segment_fixed_size"),
        "scalar_spills": metadata("sgpr_spill_count"),
    }


def allocations_above_loop(ttgir: str) -> int:
    """How many tensors a program puts into shared memory before its first loop begins."""
    before, _, _ = ttgir.partition("scf.for")
    return before.count("ttg.local_alloc")
