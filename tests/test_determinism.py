"""The same bits every time: in repeats, in other processes, and where torch is told to be deterministic."""

import contextlib

import pytest
import torch

from .determinism_problems import digests, of_another_process, philox_digest, problems

BACKENDS = ("reference", "operators", "aten")
# Without a projection of their own in oneDNN torch's operators take another way, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@contextlib.contextmanager
def deterministic(fill: bool):
    """Torch's mode in which what has no deterministic form is an error; ``fill``: with NaN in what is empty."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_every_problem_is_served():
    names = {case.name for case in problems()}
    assert len(names) == len(problems()) == 40
    assert digests("reference").keys() == digests("operators").keys() == names
    assert len(digests("aten")) > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_and_deterministic_mode_give_the_same_bits(backend):
    expected = digests(backend)
    assert digests(backend) == expected
    for fill in (False, True):
        with deterministic(fill):
            assert digests(backend) == expected
    assert len(set(expected.values())) > len(expected) / 2, "digests see no difference"


def test_another_process_finds_the_same_bits():
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    found = of_another_process("reference", "operators", PYTHONHASHSEED="2", **threads)
    assert found == {"reference": digests("reference"), "operators": digests("operators"), "philox": philox_digest()}


def test_what_a_seed_drops_does_not_depend_on_threads():
    other = 1 if torch.get_num_threads() > 1 else 2
    assert of_another_process(OMP_NUM_THREADS=str(other)) == {"philox": philox_digest()}
