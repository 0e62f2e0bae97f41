"""A table of tile sizes as ``seqcore tune`` would write one, for tests that change it."""

from dataclasses import asdict

from seqcore.kernels import tables
from seqcore.kernels.recurrence import plan

SHAPE = plan.Shape(gates=4, units=768, blocks=1, batch=16, directions=1, itemsize=2, backward=False)
PLAN = {
    "rows": 16, "units": 8, "tile": 128, "fold": 2, "stage": 2, "chains": 1, "num_warps": 4, "hold": True,
    "swap": False, "padded": True,
}  # fmt: skip
ROW = {"dtype_bits": 16, "head_dim": 64, "BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}


def a_table(**changes) -> dict:
    """The table for sm_90, with ``changes``."""
    table = {
        "format": tables.FORMAT, "arch": "sm_90", "provenance": "by hand", "measured_on": {"device": "a GPU"},
        "no_slower": ["lstm"], "compared": {"lstm": {"here": 1.0}},
        "attention_forward": [ROW], "recurrence": [{"shape": asdict(SHAPE), "plan": PLAN}],
    }  # fmt: skip
    return table | changes
