"""The same bits from kernels: in repeats, in other processes, and where torch is told to be deterministic."""

import pytest
import torch

from seqcore.devices import INTERPRETED

from .determinism_problems import digests, of_another_process, problems
from .test_determinism import deterministic

pytestmark = pytest.mark.kernels
# A few of each kind: each is one of many launches, and what differs among them is tested with the kernels.
SOME = (
    "lstm T=3 B=4 H=5 ragged and reset", "attention M=5 N=7 D=16 packed=True causal=top_left",
    "attention M=5 N=7 D=16 return_weights=average dropout_p=0.3 causal=lower_right",
)  # fmt: skip


def chosen(name: str) -> bool:
    return name in SOME


@pytest.mark.skipif(not INTERPRETED, reason="problems are on a CPU")
def test_kernels_give_the_same_bits_in_another_process_and_in_deterministic_mode():
    assert {case.name for case in problems()} >= set(SOME)
    torch.use_deterministic_algorithms(False)
    expected = digests("triton", chosen)
    assert len(expected) == len(SOME)
    with deterministic(fill=True):
        assert digests("triton", chosen) == expected
    found = of_another_process("triton", *SOME, PYTHONHASHSEED="3")
    assert found["triton"] == expected
