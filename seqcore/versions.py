"""The torch and the Triton beside this library, and why kernels cannot be used with them."""

import functools
import importlib.util
import re
from pathlib import Path

import torch

# The oldest that pyproject.toml allows, and the newest that the tests have run with.
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 7)


def triton_version() -> str | None:
    """Triton's version, "unknown" if it does not state one; None if it is not installed. Does not import it."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        source = Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "unknown"
    stated = re.search(r"""^__version__ = ['"]([^'"]+)['"]""", source, re.MULTILINE)
    return stated[1] if stated else "unknown"


def _release(version: str) -> tuple[int, int] | None:
    """(3, 7) of "3.7.1+git"; None of what is no version."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _named(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def why_no_kernels(torch_version: str, triton: str | None) -> list[str]:
    """Every reason why kernels cannot be used with these versions; none if they can. Unknown ones are tried."""
    reasons, of_triton, of_torch = [], _named(OLDEST_TRITON), _named(OLDEST_TORCH)
    if triton is None:
        reasons.append(f"needs Triton, which is not installed: pip install 'triton>={of_triton}'")
    elif (_release(triton) or OLDEST_TRITON) < OLDEST_TRITON:
        reasons.append(
            f"needs Triton {of_triton} or newer, got {triton}: pip install 'triton>={of_triton}', or the torch that "
            "comes with it"
        )
    if (_release(torch_version) or OLDEST_TORCH) < OLDEST_TORCH:
        reasons.append(f"needs torch {of_torch} or newer, got {torch_version}: pip install 'torch>={of_torch}'")
    return reasons


def untested(torch_version: str, triton: str | None) -> list[str]:
    """What is newer than anything that the tests have run with; kernels are used with it all the same."""
    pairs = (("torch", torch_version, NEWEST_TORCH), ("Triton", triton or "", NEWEST_TRITON))
    return [
        f"{name} {version} is newer than {_named(newest)}, the newest that seqcore was tested with"
        for name, version, newest in pairs
        if (_release(version) or newest) > newest
    ]


# Looked up once, and not when asked: Dynamo, which asks, cannot trace a search for files.
TRITON = triton_version()
WHY_NO_KERNELS = tuple(why_no_kernels(torch.__version__, TRITON))


def why_no_triton() -> list[str]:
    """Every reason why kernels cannot be used in this process; tries to import Triton, if it is one to be used."""
    # Dynamo cannot trace an import; what it compiles has mostly been called eagerly before.
    if WHY_NO_KERNELS or torch.compiler.is_compiling():
        return list(WHY_NO_KERNELS)
    fault = _why_triton_fails()
    return [fault] if fault else []


@functools.cache
def _why_triton_fails() -> str | None:
    try:
        import triton.language  # noqa: F401
    except Exception as error:
        # A broken library, or one for another platform, raises whatever it likes.
        said = f"{type(error).__name__}: {error}"[:200]
        return f"Triton {TRITON} is installed and cannot be imported ({said}): install it anew"
    return None
