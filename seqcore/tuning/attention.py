"""Attention: one of its kernels at one head dim."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from .. import functional
from ..kernels import tuning
from ..kernels.tuning import INTERPRETER, Device, Tiles
from ..ops import attention as ops
from ..testing.aot_attention import attention_entry
from ..testing.aot_entry import Entry, precisions
from ..testing.attention_cases import attention_case
from ..testing.cases import Case, dtype_name
from .problem import Fields, Problem

# Everything but a mask, for which tables have tiles of their own: what is chosen must fit with all of it.
MANY_FEATURES = {
    "bounds": "window", "sequences": "lengths", "softcap": "softcap", "alibi": "alibi", "sinks": "sinks",
    "dropout": "dropout", "group": "grouped",
}  # fmt: skip
# Which of q, k, v, mask and sinks a backward kernel makes the gradients of.
WANTED = {
    "backward_dq": [True, False, False, False, False],
    "backward_dkdv": [False, True, True, False, False],
    "backward_bias": [False, False, False, True, False],
}
MOST_TILE = 256
# Of a thread.
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Attention(Problem):
    """``kernel`` is the section's name without "attention_". Queries and keys alike, without and with causality.

    Decoding has one query a head and no causality. float32 means float32, as torch's switch for products has it.
    """

    kernel: str
    dtype: torch.dtype
    head_dim: int
    batch: int = 4
    heads: int = 16
    heads_kv: int = 16
    keys: int = 4096
    # M and N of the problem on which results are judged.
    judged: tuple[int, int] = (517, 517)

    operation = family = "attention"
    precision = "ieee"

    @property
    def section(self) -> str:
        return f"attention_{self.kernel}"

    @property
    def name(self) -> str:
        return f"{self.section} {dtype_name(self.dtype)} D={self.head_dim}"

    @property
    def _masked(self) -> bool:
        return self.kernel == "backward_bias"

    def _present(self, device: Device, masked: bool) -> Tiles:
        return tuning.attention_tiles(self.section, self.head_dim, 8 * self.dtype.itemsize, device, masked)

    def candidates(self, device: Device) -> list[Fields]:
        present = self._present(device, self._masked)
        found = [present.row()]
        for tiles in self._around(present, device):
            if tiles.row() not in found and self._may_run(tiles, device):
                found.append(tiles.row())
        return found

    def _may_run(self, tiles: Tiles, device: Device) -> bool:
        """Whether the kernels are made for such tiles, and a thread's registers hold its sums and scores."""
        sizes = tiles.rows, tiles.columns
        if min(sizes) < 16 or max(sizes) > MOST_TILE or tiles.num_stages < 1:
            return False
        # Newer ones have a memory of its own for sums, AMD's have more registers, and few queries have few sums.
        if self.kernel == "decode" or not device.arch.startswith(("sm_8", "sm_9")):
            return True
        summed = (2 * tiles.columns if self.kernel == "backward_dkdv" else tiles.rows) * self.head_dim
        return summed + tiles.rows * tiles.columns <= MOST_REGISTERS * 32 * tiles.num_warps

    def _around(self, present: Tiles, device: Device) -> list[Tiles]:
        rows, columns = ((size // 2, size, size * 2) for size in (present.rows, present.columns))
        # A decoding tile must hold the queries of a group, of which there are few: more rows are never used.
        rows = (present.rows,) if self.kernel == "decode" else rows
        warps = (1,) if device.arch == INTERPRETER else (2, 4, 8) if self.kernel == "decode" else (4, 8)
        stages = range(present.num_stages - 1, present.num_stages + 2)
        forward = self.kernel == "forward"
        copies = (False, True) if forward and device.arch.startswith(("sm_9", "sm_10", "sm_12")) else (False,)
        found = [
            replace(present, rows=m, columns=n, num_warps=w, num_stages=s, descriptors=described)
            for m, n, w, s, described in product(rows, columns, warps, stages, copies)
        ]
        return found + [replace(present, persistent=programs) for programs in (1, 2) if forward]

    def using(self, fields: Fields) -> AbstractContextManager:
        return tuning.overriding(self.section, Tiles.of(fields))

    def entries(self, fields: Fields, device: Device) -> list[Entry]:
        dtype, target = dtype_name(self.dtype), device.arch
        mask = {"mask": "additive"} if self._masked else {}
        with self.using(fields):
            return [
                attention_entry(self.kernel, dtype, self.head_dim, target, chosen | mask, precisions(dtype, target)[0])
                for chosen in ({"bounds": "causal"}, MANY_FEATURES)
            ]

    def cases(self, device: torch.device) -> list[Case]:
        (M, N), options = self.judged, {}
        if self._masked:
            options["mask"] = (1, 4, M, N)
        if self.kernel == "weights":
            options["return_weights"] = "average"
        causal = [None] if self.kernel == "decode" else [None, "top_left"]
        return [attention_case(device, M, N, self.head_dim, causal=bound, **options) for bound in causal]

    def call(self, device: torch.device) -> Callable[[], object]:
        q, k, v = self._tensors(device)
        mask = q.new_zeros(1, self.heads, q.shape[2], k.shape[2]) if self._masked else None
        problems = [
            (mask, None, None, None, None, None, False, causal, None, None, self.head_dim**-0.5, 0.0, 0.0)
            for causal in (("none",) if self.kernel == "decode" else ("none", "top_left"))
        ]
        if self.kernel in ("forward", "decode"):
            return lambda: [ops.forward(q, k, v, *problem) for problem in problems]
        made = [(problem, *ops.forward(q, k, v, *problem)) for problem in problems]
        if self.kernel == "weights":
            return lambda: [ops.weights(rows, q, k, v, *problem) for problem, _, _, rows in made]
        dout, wanted = torch.randn_like(q), WANTED[self.kernel]
        return lambda: [
            ops.backward(dout, None, out, rows, wanted, q, k, v, *problem) for problem, out, _, rows in made
        ]

    def _tensors(self, device: torch.device) -> list[torch.Tensor]:
        queries = 1 if self.kernel == "decode" else self.keys
        shapes = [(self.heads, queries), (self.heads_kv, self.keys), (self.heads_kv, self.keys)]
        return [torch.randn(self.batch, *shape, self.head_dim, dtype=self.dtype, device=device) for shape in shapes]

    def small(self) -> "Attention":
        # Still so many keys that decoding splits them.
        return replace(self, batch=2, keys=4096 if self.kernel == "decode" else 256)

    @property
    def contest(self) -> str | None:
        """Both kernels of the gradient belong to one: training."""
        passes = {"forward": "forward", "decode": "decode", "backward_dkdv": "training", "backward_dq": "training"}
        if self.kernel not in passes:
            return None
        return f"attention {passes[self.kernel]} {dtype_name(self.dtype)} D={self.head_dim}"

    def contestant(self, device: torch.device, backend: str) -> Callable[[], object]:
        training = self.kernel.startswith("backward")
        q, k, v = (t.requires_grad_(training) for t in self._tensors(device))
        dout = torch.ones_like(q)
        bounds = (None,) if self.kernel == "decode" else (None, "top_left")

        def forward():
            return [functional.attention(q, k, v, causal=causal, enable_gqa=True, backend=backend) for causal in bounds]

        return (lambda: [torch.autograd.grad(out, (q, k, v), dout) for out in forward()]) if training else forward

    def row(self, fields: Fields, device: Device) -> dict[str, Any]:
        """With a mask things stay as they are: that was not measured."""
        found = {"dtype_bits": 8 * self.dtype.itemsize, "head_dim": self.head_dim} | fields
        if self._masked:
            return found
        options = dict.fromkeys(("descriptors", "specialize"), False) | {"persistent": 0}
        masked = options | self._present(device, masked=True).row()
        changes = {name: value for name, value in masked.items() if value != (options | fields)[name]}
        return found | ({"masked": changes} if changes else {})
