"""Who takes part in a case, and why the others do not; and in which versions they are here."""

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.environment import version

Peer = TypeVar("Peer")
LONGEST_REASON = 300
# Packages that are peers where they are installed, by the name of their distribution.
PACKAGES = {"FlashRNN": "flashrnn", "flash-attn": "flash-attn"}


class Absent(Exception):
    """Why a peer does not take part."""


def take_part(
    builders: dict[str, Callable[[], Peer]], run: Callable[[Peer], object], on_gpu: bool
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that could be built and run once, and why the others could not."""
    present, absent = {}, {}
    for name, build in builders.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            # Whatever goes wrong in a peer is a fact about the peer.
            try:
                peer = build()
                run(peer)
                if on_gpu:
                    torch.cuda.synchronize()
                present[name] = peer
            except Exception as error:
                absent[name] = reason(error, [str(warning.message) for warning in said])
        if name in absent and on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    return present, absent


def reason(error: Exception, warned: list[str]) -> str:
    """The error's first line and what torch warned of: why a backend that was named cannot serve."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit this GPU's memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error}"
    told = [text.partition("(Triggered internally")[0].strip() for text in warned]
    # The backends that were not named warn too, that they were turned off; and each list begins with a heading.
    told = [text for text in told if text and "disabled" not in text and not text.endswith("because:")]
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "; ".join(dict.fromkeys([first, *told]))[:LONGEST_REASON]


def versions() -> dict[str, str]:
    """What every peer is here: its own version, that of torch if it is torch's, or that it is absent."""
    from benchmarks.attention_peers import FLEX, SDPA
    from benchmarks.layers import TORCH
    from benchmarks.recurrence_peers import COMPILED_LOOP, LOOP

    torchs = f"torch {torch.__version__}"
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found = {TORCH: torchs + (f", cuDNN {cudnn}" if cudnn else "")}
    found |= dict.fromkeys((LOOP, COMPILED_LOOP, *SDPA, FLEX), torchs)
    for name, package in PACKAGES.items():
        found[name] = version(package) or "absent: not installed"
    return found
