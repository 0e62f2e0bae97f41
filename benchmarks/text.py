"""Real text for the character models, read from disk."""

import random
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 0.1
MIN_BYTES = 20_000


@dataclass(frozen=True)
class Corpus:
    """A text as indices into its alphabet of bytes, in two parts."""

    name: str
    train: Tensor
    held_out: Tensor
    alphabet: bytes
    # Of what each part is put together, where it is no whole: excerpts lie within one.
    piece: int = 0

    def batch(self, T: int, B: int, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Random excerpts and what follows each of their characters, [T, B] both."""
        text = self.held_out if held_out else self.train
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint((self.piece or len(text)) - T, (B,), generator=generator)
        if self.piece:
            starts += self.piece * torch.randint(len(text) // self.piece, (B,), generator=generator)
        excerpts = text[torch.arange(T + 1)[:, None] + starts]
        return excerpts[:-1], excerpts[1:]

    def scattered(self, piece: int, every: int) -> "Corpus":
        """Of pieces of so many bytes each n-th to train on, all others held out: both from all over the text."""
        text = torch.cat([self.train, self.held_out])
        pieces = text[: len(text) // piece * piece].view(-1, piece)
        trained = torch.arange(len(pieces)) % every == 0
        return replace(self, train=pieces[trained].flatten(), held_out=pieces[~trained].flatten(), piece=piece)


def load_corpus(path: str | Path | None, limit: int) -> Corpus:
    """The text file at ``path``, or by default the standard library's own sources, up to ``limit`` bytes.

    Raises:
        ValueError: if there is too little text to hold some of it out.
    """
    if path is None:
        text, name = _standard_library(limit)
    else:
        text, name = Path(path).read_bytes()[:limit], Path(path).name
    if len(text) < MIN_BYTES:
        raise ValueError(f"too little text in {name}: got {len(text)} bytes, need {MIN_BYTES}; pass a longer file")
    raw = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    alphabet, indices = raw.unique(return_inverse=True)
    cut = int(len(indices) * (1 - HELD_OUT))
    return Corpus(f"{name}, {len(text):,} bytes", indices[:cut], indices[cut:], bytes(alphabet.tolist()))


def _standard_library(limit: int) -> tuple[bytes, str]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*folder.glob("*.py"), *folder.glob("*/*.py")]
    files = sorted(path for path in files if path.parent.name not in {"site-packages", "dist-packages"})
    # Mixed, so that what is held out is not the end of the alphabet.
    random.Random(0).shuffle(files)
    text = bytearray()
    for path in files:
        if len(text) >= limit:
            break
        text += path.read_bytes()
    return bytes(text[:limit]), f"sources of the Python {sys.version_info.major}.{sys.version_info.minor} library"
