"""Tasks that ask for memory, drawn anew for every batch; [T, B] throughout.

Sources: Hochreiter & Schmidhuber, Long short-term memory (1997), for adding; Arjovsky et al., Unitary evolution
recurrent neural networks (2016), for copying.
"""

from collections.abc import Callable

import torch

from benchmarks.study.training import Batch

SYMBOLS = 8
BLANK, ASK = SYMBOLS, SYMBOLS + 1
ALPHABET = SYMBOLS + 2
COPIED = 5


def generator(device: str, *seeds: int) -> torch.Generator:
    """Random numbers of a batch: other ones for each of the seeds."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % 2**61
    return torch.Generator(device).manual_seed(mixed)


def recall(lag: int, B: int, device: str, *seeds: int) -> Batch:
    """A symbol, blanks, and after ``lag`` steps the question which it was."""
    x = torch.full((lag + 1, B), BLANK, device=device)
    x[0] = torch.randint(SYMBOLS, (B,), generator=generator(device, *seeds), device=device)
    x[lag] = ASK
    counts = torch.zeros_like(x, dtype=torch.bool)
    counts[lag] = True
    return Batch(x, x[:1].expand_as(x), counts)


def adding(lag: int, B: int, device: str, *seeds: int) -> Batch:
    """Numbers in 0 … 1, of which two are marked, one in each half; the last step is to give their sum."""
    random = generator(device, *seeds)
    T = lag + 1
    numbers = torch.rand(T, B, generator=random, device=device)
    half = T // 2
    first = torch.randint(half, (B,), generator=random, device=device)
    second = half + torch.randint(T - half, (B,), generator=random, device=device)
    marks = torch.zeros(T, B, device=device)
    batch = torch.arange(B, device=device)
    marks[first, batch] = marks[second, batch] = 1.0
    target = torch.zeros(T, B, device=device)
    target[-1] = (numbers * marks).sum(0)
    counts = torch.zeros(T, B, dtype=torch.bool, device=device)
    counts[-1] = True
    return Batch(torch.stack([numbers, marks], -1), target, counts)


def copying(lag: int, B: int, device: str, *seeds: int) -> Batch:
    """A few symbols, blanks, the question, and then the same symbols; each is asked for ``lag`` steps after it came."""
    random = generator(device, *seeds)
    copied = min(COPIED, lag)
    symbols = torch.randint(SYMBOLS, (copied, B), generator=random, device=device)
    x = torch.full((lag + copied, B), BLANK, device=device)
    x[:copied] = symbols
    x[lag - 1] = ASK if lag > copied else x[lag - 1]
    target = torch.full_like(x, BLANK)
    target[lag:] = symbols
    counts = torch.zeros_like(x, dtype=torch.bool)
    counts[lag:] = True
    return Batch(x, target, counts)


TASKS: dict[str, Callable[..., Batch]] = {"recall": recall, "adding": adding, "copying": copying}
TITLES = {"recall": "delayed recall", "adding": "adding problem", "copying": "copying"}
# What guessing gets right: of symbols, one in eight; of a sum of two numbers, its mean, 1, is within 0.1 this often.
CHANCE = {"recall": 1 / SYMBOLS, "copying": 1 / SYMBOLS, "adding": 0.19}
# Classes to choose from, or one number.
OUTPUTS = {"recall": ALPHABET, "adding": 1, "copying": ALPHABET}
