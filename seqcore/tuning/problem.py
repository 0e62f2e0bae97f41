"""What the search asks of a problem: one row of a table, to be found."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..kernels.tuning import Device
from ..testing.aot_entry import Entry
from ..testing.cases import Case

# A candidate: the part of a table's row that says how to launch.
Fields = dict[str, Any]


class Problem(ABC):
    """One kernel at one size.

    ``operation`` is the public one, as backends know it; ``section`` the table's, ``dtype`` what is measured, and
    ``precision`` how torch's switches stand meanwhile for float32 products.
    """

    operation: str
    section: str
    dtype: torch.dtype
    precision: str

    @property
    @abstractmethod
    def name(self) -> str:
        """By which the log knows it."""

    @property
    @abstractmethod
    def family(self) -> str:
        """The folder of its kernels."""

    @abstractmethod
    def candidates(self, device: Device) -> list[Fields]:
        """What may be tried on ``device``, the present choice first; nothing where there is no choice."""

    @abstractmethod
    def using(self, fields: Fields) -> AbstractContextManager:
        """Launches within the block are made as ``fields`` say."""

    @abstractmethod
    def entries(self, fields: Fields, device: Device) -> list[Entry]:
        """What to compile to know what a candidate takes: first the plain kernel, then one with many features."""

    @abstractmethod
    def cases(self, device: torch.device) -> list[Case]:
        """Small problems on which a candidate's results are judged."""

    @abstractmethod
    def call(self, device: torch.device) -> Callable[[], object]:
        """What is timed."""

    @abstractmethod
    def small(self) -> "Problem":
        """One whose call launches the very same programs on less."""

    @property
    def contest(self) -> str | None:
        """By which name the public operation is compared with torch's own; None if torch has none."""
        return None

    def contestant(self, device: torch.device, backend: str) -> Callable[[], object]:
        """The public operation on ``backend``, as the contest times it."""
        raise NotImplementedError

    @abstractmethod
    def row(self, fields: Fields, device: Device) -> dict[str, Any]:
        """The table's row of ``section`` with ``fields`` as the choice."""
