"""How float32 products are made while results are judged."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """torch's switches for float32 products of the library and of recurrences at ``precision``, "ieee" or "tf32"."""
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
