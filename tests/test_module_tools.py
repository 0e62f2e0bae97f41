"""What torch's own tools do to a module they do to ours: copies, files, dtypes, parametrizations, pruning, hooks."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from .comparisons import assert_equal_in_float64
from .every_module import EVERY, STEPS, given, main_weight, outputs, results, twin
from .recurrence_twins import mapped, ours, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

DOUBLE = {"dtype": torch.float64}


def saved_and_loaded(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def from_its_state(module):
    """A module made anew, with a state dict that went through a file."""
    state = saved_and_loaded(module.state_dict(), weights_only=True)
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    module.load_state_dict(state, strict=True)
    return module


def from_meta(module):
    state = module.state_dict()
    module = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def changed(change, *arguments, **options):
    """A tool that changes the main weight of a module in place."""

    def apply(module):
        torch.manual_seed(1)
        change(module, main_weight(module), *arguments, **options)
        return module

    return apply


def pruned_for_good(module):
    return prune.remove(changed(prune.l1_unstructured, amount=0.5)(module), main_weight(module))


def scaled_as_a_vector(module):
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, module.parameters())
    return module


TOOLS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module, weights_only=False),
    "state dict": from_its_state,
    "to another dtype": lambda module: module.half().to(torch.bfloat16).to(dtype=torch.float64),
    "to_empty": from_meta,
    "share_memory": lambda module: module.share_memory(),
    "weight_norm": changed(parametrizations.weight_norm),
    # In training each access to the weight iterates it, and torch's modules make another number of them.
    "spectral_norm": lambda module: changed(parametrizations.spectral_norm)(module).eval(),
    "orthogonal": changed(parametrizations.orthogonal),
    "old weight_norm": changed(nn.utils.weight_norm),
    "old spectral_norm": changed(nn.utils.spectral_norm),
    "prune": changed(prune.l1_unstructured, amount=0.5),
    "prune.remove": pruned_for_good,
    "parametrized and copied": lambda module: copy.deepcopy(changed(parametrizations.weight_norm)(module)),
    "pruned and pickled": lambda module: TOOLS["pickle"](changed(prune.random_unstructured, amount=0.5)(module)),
    "parameters_to_vector": scaled_as_a_vector,
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("tool", TOOLS)
def test_tools(tool, name, backend):
    theirs, x = twin(name, **DOUBLE), given(name, **DOUBLE)
    module = ours(theirs, backend)
    kind = type(module)
    untouched = results(theirs, x)
    assert_equal_in_float64(results(module, x), untouched)
    module, theirs = TOOLS[tool](module), TOOLS[tool](theirs)
    assert isinstance(module, kind) and module.backend == backend
    assert list(module.state_dict()) == list(theirs.state_dict())
    expected = results(theirs, x)
    assert_equal_in_float64(results(module, x), expected)
    changes = tool not in ("deepcopy", "pickle", "torch.save", "state dict", "to_empty", "share_memory")
    same = expected.keys() == untouched.keys() and all(torch.equal(expected[key], untouched[key]) for key in expected)
    assert same != changes, "the tool did not do what it is here for"


def hooked(module):
    """What hooks of every kind are called with: names in order, and gradients."""
    called, gradients = [], []
    module.register_forward_pre_hook(lambda m, args: called.append("pre") or tuple(2 * t for t in args))
    module.register_forward_hook(lambda m, args, out: called.append("forward") or mapped(lambda t: 3 * t, out))
    module.register_full_backward_pre_hook(lambda m, grads: called.append("backward pre") or gradients.extend(grads))
    module.register_full_backward_hook(lambda m, grads, _: called.append("backward") or gradients.extend(grads))
    module.register_state_dict_post_hook(lambda m, state, *_: called.append(sorted(state)))
    module.register_load_state_dict_pre_hook(lambda m, state, *_: called.append(sorted(state)))
    module.register_load_state_dict_post_hook(lambda m, keys: called.append(keys))
    return called, gradients


@pytest.mark.parametrize("name", EVERY)
def test_hooks(name):
    theirs, x = twin(name, **DOUBLE), given(name, **DOUBLE)
    module, told = ours(theirs, None), []
    for each in (module, theirs):
        called, gradients = hooked(each)
        leaf = x.clone().requires_grad_()
        outs = outputs(each, leaf)
        sum(out.square().sum() for out in outs).backward()
        each.load_state_dict(each.state_dict())
        told.append((called, [*outs, leaf.grad, *gradients, *(p.grad for p in each.parameters())]))
    assert told[0][0] == told[1][0] and len(told[0][0]) == 7
    torch.testing.assert_close(told[0][1], told[1][1])


@pytest.mark.parametrize("name", EVERY)
def test_clipping_the_norm_of_gradients(name):
    theirs, x = twin(name, **DOUBLE), given(name, **DOUBLE)
    module = ours(theirs, None)
    for each in (module, theirs):
        sum(out.square().sum() for out in outputs(each, x)).backward()
    norms = [nn.utils.clip_grad_norm_(each.parameters(), 0.1) for each in (module, theirs)]
    torch.testing.assert_close(*norms)
    assert norms[0] > 0.1
    assert_equal_in_float64(*({n: p.grad for n, p in each.named_parameters()} for each in (module, theirs)))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", EVERY)
def test_checkpoints_draw_the_same_dropout_again(name, backend):
    check_checkpoint(name, backend)


@pytest.mark.parametrize("name", EVERY)
def test_checkpoints_of_the_functions(name, by_the_operators):
    check_checkpoint(name, None)


def check_checkpoint(name, backend):
    options = {} if name in STEPS else {"dropout": 0.5} | ({} if name == "attention" else {"num_layers": 2})
    module, x = ours(twin(name, **DOUBLE, **options), backend), given(name, **DOUBLE)

    def gradients(run):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        outs = tensors(run(leaf))
        return torch.autograd.grad(sum(out.square().sum() for out in outs), [leaf, *module.parameters()])

    call = lambda leaf: tuple(outputs(module, leaf))
    plain, again = gradients(call), gradients(lambda leaf: checkpoint(call, leaf, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    torch.manual_seed(2)
    assert torch.equal(outputs(module, x)[0], outputs(module, x)[0]) == (not options)
