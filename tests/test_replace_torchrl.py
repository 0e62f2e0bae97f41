"""TorchRL's LSTMModule and GRUModule with their recurrences swapped, over rollouts that hold several episodes."""

import copy

import pytest
import torch
from torch import nn

import seqcore
from seqcore.integrations import torchrl

from .comparisons import Results, assert_equal_in_float64, cotangents

pytest.importorskip("torchrl", reason="TorchRL is not installed")

from tensordict import TensorDict
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

B, T, I, H = 3, 6, 4, 5
KINDS = {"lstm": LSTMModule, "gru": GRUModule}
STATES = {"lstm": ("recurrent_state_h", "recurrent_state_c"), "gru": ("recurrent_state",)}


def module(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    keys = {"in_keys": ["x", *STATES[kind]], "out_keys": ["y", *(("next", state) for state in STATES[kind])]}
    return KINDS[kind](input_size=I, hidden_size=H, num_layers=2, **keys, **options).double()


def rollout(kind: str, episodes: bool) -> TensorDict:
    """Steps [B, T], of which some begin an episode."""
    begins = torch.zeros(B, T, 1, dtype=torch.bool)
    if episodes:
        begins[0, 2] = begins[0, 5] = begins[1, 3] = True
    states = {state: torch.randn(B, T, 2, H, dtype=torch.float64) for state in STATES[kind]}
    return TensorDict({"x": torch.randn(B, T, I, dtype=torch.float64), "is_init": begins, **states}, [B, T])


def results(policy: nn.Module, steps: TensorDict, recurrent: bool) -> Results:
    """What is written into ``steps``, and gradients of a weighing of y."""
    with set_recurrent_mode(recurrent):
        made = policy(steps.clone() if recurrent else steps[:, 0].clone())
    found = {str(key): made[key] for key in policy.out_keys}
    gradients = torch.autograd.grad(made["y"], list(policy.parameters()), cotangents([made["y"]]))
    return found | {f"gradient of {n}": g for (n, _), g in zip(policy.named_parameters(), gradients, strict=True)}


@pytest.mark.parametrize("recurrent, episodes", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_with_episodes_that_begin_inside(kind, backend, recurrent, episodes):
    theirs, steps = module(kind), rollout(kind, episodes)
    ours = copy.deepcopy(theirs)
    name = kind.upper()
    report = seqcore.replace(ours, backend=backend)
    assert report.swapped == {kind: f"torch.nn.{name} -> seqcore.integrations.torchrl.{name}"}
    assert_equal_in_float64(results(ours, steps, recurrent), results(theirs, steps, recurrent))
    report = seqcore.restore(ours)
    assert report.swapped == {kind: f"seqcore.integrations.torchrl.{name} -> torch.nn.{name}"}
    assert type(getattr(ours, kind)) is getattr(nn, name)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrences_that_were_made_as_ours_take_the_mask_too(kind):
    theirs, steps = module(kind), rollout(kind, True)
    ours = copy.deepcopy(theirs)
    name = kind.upper()
    getattr(ours, kind).__class__ = getattr(seqcore.nn, name)
    assert list(seqcore.replace(ours).swapped) == [kind]
    assert type(getattr(ours, kind)) is getattr(torchrl, name)
    assert_equal_in_float64(results(ours, steps, True), results(theirs, steps, True))


@pytest.mark.parametrize("kind", KINDS)
def test_python_based_modules_are_left_alone(kind):
    policy = module(kind, python_based=True)
    report = seqcore.replace(policy)
    assert not report.swapped and f"rnn.{kind.upper()}: derived from" in report.skipped[kind]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [torchrl.LSTM, torchrl.GRU])
def test_masked_steps_do_not_count(kind, batch_first):
    recurrence, lengths = kind(I, H, batch_first=batch_first, dtype=torch.float64), torch.tensor([2, 5, 1])
    x, mask = torch.randn(B, T, I, dtype=torch.float64), torch.arange(T) < lengths[:, None]
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    y, state = recurrence(turn(x), mask=turn(mask))
    expected, expected_state = recurrence(turn(x), lengths=lengths)
    flat = lambda state: dict(enumerate(state if isinstance(state, tuple) else (state,)))
    assert_equal_in_float64({"y": y} | flat(state), {"y": expected} | flat(expected_state))
