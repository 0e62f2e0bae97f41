"""Derivatives beyond a gradient, of every module: double backward, forward mode, torch.func, many gradients at once."""

import re

import pytest
import torch
from torch import func
from torch.autograd import forward_ad, gradgradcheck
from torch.nn.utils.rnn import PackedSequence

import seqcore
from seqcore import UnsupportedInput, functional
from seqcore.testing.budget import assert_within_budget

from .attention_twins import features, qkv
from .every_module import EVERY, STEPS, WIDTH, batch_dim, first, given, main_weight, outputs, twin
from .recurrence_twins import ours, packed, problem, tensors
from .test_cells import MGU

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Forward-mode AD scripts some of torch's own decompositions.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]

DOUBLE = {"dtype": torch.float64}
# Attention takes other ways with weights and without.
CALLS = {name: {} for name in EVERY} | {"attention without weights": {"need_weights": False}}


def problem_of(call, backend=None):
    """torch's module, ours with the same weights, the keywords to call ours with, and x."""
    name = call.removesuffix(" without weights")
    theirs = twin(name, **DOUBLE)
    return theirs, ours(theirs, backend), CALLS[call], given(name, **DOUBLE)


def all_with(module, parameters, x, keywords):
    """All that ``module`` makes of x, with other parameters than its own."""
    arguments = (x,) * 3 if isinstance(module, torch.nn.MultiheadAttention) else (x,)
    return tensors(func.functional_call(module, parameters, arguments, keywords))


def squares(function):
    return lambda x: function(x).square().sum()


# --- double backward -----------------------------------------------------------------------------------------------


def check_second_derivative(call, backend):
    _, module, keywords, x = problem_of(call, backend)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        return tuple(all_with(module, dict(zip(parameters, values, strict=True)), x, keywords))

    assert gradgradcheck(run, [x.requires_grad_(), *parameters.values()], fast_mode=True)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call", EVERY)
def test_double_backward(call, backend):
    check_second_derivative(call, backend)


def test_double_backward_of_attention_without_weights():
    """By name: auto takes torch's fused attention, which has none."""
    check_second_derivative("attention without weights", "reference")
    with pytest.raises(RuntimeError, match=r"derivative for aten::.* is not implemented"):
        check_second_derivative("attention without weights", None)


@pytest.mark.parametrize("call", CALLS)
def test_double_backward_of_the_functions(call, by_the_operators):
    check_second_derivative(call, None)


@pytest.mark.kernels
@pytest.mark.parametrize("call", [*STEPS, "attention", "attention without weights"])
def test_double_backward_of_the_kernels(call, device):
    """Of sequences: tests/test_recurrence_kernels.py."""
    theirs, _, keywords, x = problem_of(call)
    theirs, x = theirs.float().to(device), x.float().to(device)

    def gradients(backend, dtype):
        module, leaf = ours(theirs, backend).to(dtype), x.to(dtype).requires_grad_()
        loss = squares(first(module, **keywords))
        (plain,) = torch.autograd.grad(loss(leaf), leaf)
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        penalty = torch.autograd.grad(slope.square().sum(), list(module.parameters()), materialize_grads=True)
        return [plain, slope, *penalty]

    found, eager = gradients("triton", torch.float32), gradients("reference", torch.float32)
    for values in zip(found, gradients("reference", torch.float64), eager, strict=True):
        assert_within_budget(*values)


def test_a_users_cell():
    x, *weights = (t.requires_grad_() for t in (torch.randn(3, 2, 4, **DOUBLE), torch.randn(6, 4, **DOUBLE),
                                                torch.randn(6, 3, **DOUBLE)))  # fmt: skip
    run = lambda x, *weights: functional.recurrence(x, None, weights, cell=MGU, bias=False)[0]
    assert gradgradcheck(run, [x, *weights], fast_mode=True)
    check_transforms(lambda x: run(x, *weights), lambda x: run(x, *weights), x.detach(), 1)


# --- torch.func, and forward mode ----------------------------------------------------------------------------------


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


# What each makes of a function, x, a tangent and the dimension of the batch; expected below.
TRANSFORMS = {
    "grad": lambda f, x, v, batch: func.grad(squares(f))(x),
    "vmap of grad": lambda f, x, v, batch: func.vmap(func.grad(squares(f)), in_dims=batch, out_dims=batch)(x),
    "vmap": lambda f, x, v, batch: func.vmap(f, in_dims=batch, out_dims=batch)(x),
    "jvp": lambda f, x, v, batch: func.jvp(f, (x,), (v,))[1],
    "dual": lambda f, x, v, batch: dual(f, x, v),
    "jacrev": lambda f, x, v, batch: func.jacrev(f)(x),
    "jacfwd": lambda f, x, v, batch: func.jacfwd(f)(x),
    "hessian": lambda f, x, v, batch: func.hessian(squares(f))(x),
}


def expectation(function, x, tangent):
    """What plain autograd, one gradient at a time, finds for each of ``TRANSFORMS``."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    gradient = torch.autograd.functional.jacobian(squares(function), x)
    along = (jacobian * tangent).flatten(-x.dim()).sum(-1)
    return {
        "grad": gradient, "vmap of grad": gradient, "vmap": function(x), "jvp": along, "dual": along,
        "jacrev": jacobian, "jacfwd": jacobian, "hessian": torch.autograd.functional.hessian(squares(function), x),
    }  # fmt: skip


def check_transforms(function, yardstick, x, batch):
    tangent = torch.randn_like(x)
    expected = expectation(yardstick, x, tangent)
    for name, transform in TRANSFORMS.items():
        torch.testing.assert_close(
            transform(function, x, tangent, batch), expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_transforms(call, backend):
    theirs, module, keywords, x = problem_of(call, backend)
    check_transforms(first(module, **keywords), first(theirs), x, batch_dim(call))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_transforms_of_torchs_operators_are_right_or_refused(call):
    theirs, module, keywords, x = problem_of(call, "aten")
    tangent = torch.randn_like(x)
    expected, refused = expectation(first(theirs), x, tangent), set()
    for name, transform in TRANSFORMS.items():
        try:
            found = transform(first(module, **keywords), x, tangent, batch_dim(call))
        except RuntimeError as error:
            if not re.search("Batching rule not implemented|use forward AD with", str(error)):
                raise
            refused.add(name)
        else:
            torch.testing.assert_close(found, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert refused <= {"vmap"} if "attention" not in call else refused <= {"jvp", "dual", "jacfwd", "hessian"}


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "dual"])
@pytest.mark.parametrize("call", CALLS)
def test_kernels_asked_for_by_name_refuse(call, transform):
    _, module, keywords, x = problem_of(call, "triton")
    with pytest.raises(UnsupportedInput, match=r"torch\.func transforms and forward-mode AD cannot pass through"):
        TRANSFORMS[transform](first(module, **keywords), x, torch.ones_like(x), batch_dim(call))


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_each_sample(call):
    theirs, module, keywords, x = problem_of(call)
    parameters, batch = dict(module.named_parameters()), batch_dim(call)

    def loss(parameters, x):
        return all_with(module, parameters, x, keywords)[0].square().sum()

    found = func.vmap(func.grad(loss), in_dims=(None, batch))(parameters, x)
    for index, sample in enumerate(x.unbind(batch)):
        alone = squares(first(theirs))(sample)
        expected = torch.autograd.grad(alone, list(theirs.parameters()), materialize_grads=True)
        torch.testing.assert_close([found[name][index] for name in parameters], list(expected))


@pytest.mark.parametrize("call", CALLS)
def test_tangents_of_parameters(call):
    theirs, module, keywords, x = problem_of(call)
    weight = main_weight(module)
    tangent = torch.randn_like(getattr(module, weight))

    def run(values):
        return all_with(module, {weight: values}, x, keywords)[0].square().sum()

    _, found = func.jvp(run, (getattr(module, weight).detach(),), (tangent,))
    (gradient,) = torch.autograd.grad(squares(first(theirs))(x), getattr(theirs, weight))
    torch.testing.assert_close(found, (gradient * tangent).sum())


@pytest.mark.parametrize("name", ["gru", "lstm cell", "attention"])
def test_an_ensemble_in_one_call(name):
    modules = [ours(twin(name, **DOUBLE), None) for _ in range(3)]
    x = given(name, **DOUBLE)
    parameters, _ = func.stack_module_state(modules)
    found = func.vmap(lambda parameters: all_with(modules[0], parameters, x, {})[0])(parameters)
    torch.testing.assert_close(found, torch.stack([first(module)(x) for module in modules]))


# --- what a call may be given besides ------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_vmap_over_lengths_and_resets(cell):
    theirs, x, _ = problem(cell, T=4, bidirectional=True, **DOUBLE)
    module = ours(theirs, None)
    lengths, reset = torch.tensor([4, 2, 0, 1, 3]), torch.rand(4, 5) < 0.4

    def one(x, length, reset):
        return module(x[:, None], lengths=length[None], reset=reset[:, None])[0][:, 0]

    each = func.vmap(one, in_dims=(1, 0, 1), out_dims=1)
    torch.testing.assert_close(each(x, lengths, reset), module(x, lengths=lengths, reset=reset)[0])
    assert torch.equal(each(x, lengths + 9, reset), each(x, torch.full_like(lengths, 4), reset))


@pytest.mark.parametrize("lengths", [[4, 3, 3, 1, 1], [1, 4, 2, 4, 3]], ids=["sorted", "unsorted"])
def test_vmap_over_the_data_of_packed_sequences(lengths):
    theirs, x, _ = problem("lstm", T=4, bidirectional=True, **DOUBLE)
    form = packed(x, lengths)
    data = torch.randn(3, *form.data.shape, **DOUBLE)
    run = lambda module: lambda data: module(PackedSequence(data, *form[1:]))[0].data
    found = func.vmap(run(ours(theirs, None)))(data)
    torch.testing.assert_close(found, torch.stack([run(theirs)(d) for d in data]))
    with pytest.raises((AssertionError, AttributeError, ValueError)):
        func.vmap(ours(theirs, None))(form)


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_dropout_under_vmap_asks_how_to_draw(name):
    options = {"num_layers": 2, "dropout": 0.5} if name == "lstm" else {"dropout": 0.5}
    run, x = first(ours(twin(name, **options), None)), given(name).expand(3, 2, WIDTH)
    with pytest.raises(RuntimeError, match="randomness"):
        func.vmap(run, in_dims=1)(x)
    same = func.vmap(run, randomness="same")(torch.ones(2, 3, WIDTH))
    different = func.vmap(run, randomness="different")(torch.ones(2, 3, WIDTH))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


@pytest.mark.parametrize("transform", ["vmap of grad", "jvp"])
def test_every_feature_of_attention(transform):
    query, key, value = qkv(2, 2, M=3, N=4, D=2, **DOUBLE)
    options = features(2, 2, 3, 4, **DOUBLE)["everything"] | {"dropout_p": 0.0, "dropout_seed": None}
    loss = lambda q: functional.attention(q, key, value, return_lse=True, **options)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss(query.requires_grad_()), query)
    query = query.detach()
    if transform == "jvp":
        tangent = torch.randn_like(query)
        torch.testing.assert_close(func.jvp(loss, (query,), (tangent,))[1], (gradient * tangent).sum())
        return
    lengths = [options.pop(name) for name in ("query_lengths", "key_lengths")]

    def one(q, k, v, m, n):
        ends = {"query_lengths": m[None], "key_lengths": n[None]}
        return functional.attention(q[None], k[None], v[None], **options, **ends)[0].square().sum()

    torch.testing.assert_close(func.vmap(func.grad(one))(query, key, value, *lengths), gradient)


@pytest.mark.parametrize("options", [{"grad_clip": 0.01}, {"recompute": True}, {"blocks": 3}], ids=str)
def test_options_of_recurrences(options):
    theirs, x, _ = problem("lstm", H=3, **DOUBLE)
    module = ours(theirs, None, **options)
    run, v = first(module), torch.randn_like(x)
    gradient = torch.autograd.functional.jacobian(squares(run), x)
    for name in ("grad", "vmap of grad"):
        torch.testing.assert_close(TRANSFORMS[name](run, x, v, 1), gradient)
    # A clipped gradient is no derivative, nor is one of it; a tangent always is.
    unclipped = torch.autograd.functional.jacobian(squares(first(ours(module, None, grad_clip=None))), x)
    assert torch.allclose(gradient, unclipped) == ("grad_clip" not in options)
    torch.testing.assert_close(func.jvp(squares(run), (x,), (v,))[1], (unclipped * v).sum())
    assert gradgradcheck(run, x[:2, :2].requires_grad_(), raise_exception=False) == ("grad_clip" not in options)


# --- many gradients at once ----------------------------------------------------------------------------------------


def check_many_gradients(y, leaf):
    """Each element's gradient, in the three ways there are to ask for them at once."""
    many = torch.eye(y.numel(), **DOUBLE).unflatten(1, y.shape)
    one = lambda cotangent: torch.autograd.grad(y, leaf, cotangent, retain_graph=True)[0]
    expected = torch.stack([one(cotangent) for cotangent in many])
    (found,) = torch.autograd.grad(y, leaf, many, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    torch.testing.assert_close(func.vmap(one)(many), expected)


@pytest.mark.parametrize("call", CALLS)
def test_many_gradients_at_once(call, by_the_operators):
    theirs, module, keywords, x = problem_of(call)
    at_once = torch.autograd.functional.jacobian(first(module, **keywords), x, vectorize=True)
    torch.testing.assert_close(at_once, torch.autograd.functional.jacobian(first(theirs), x))
    for y in outputs(module, x.requires_grad_(), **keywords):
        check_many_gradients(y, x)
        check_many_gradients(y, getattr(module, main_weight(module)))


@pytest.mark.parametrize("options", [{}, {"return_weights": "average"}], ids=["plain", "weights"])
def test_many_gradients_of_the_function_of_attention(options, by_the_operators):
    query, key, value = qkv(1, 2, M=2, N=3, D=2, **DOUBLE)
    found = functional.attention(query.requires_grad_(), key, value, **options)
    check_many_gradients(found[-1] if options else found, query)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["gru", "attention"])
def test_many_gradients_of_the_kernels(name, device):
    module, x = ours(twin(name), "triton").to(device), given(name).to(device)
    exact = ours(module, "reference").double()
    jacobian = lambda module, x, **options: torch.autograd.functional.jacobian(first(module), x, **options)
    found, eager = jacobian(module, x, vectorize=True), jacobian(ours(module, "reference"), x)
    assert_within_budget(found, jacobian(exact, x.double()), eager)


def test_explain_tells_who_computes_under_a_transform():
    module, x = seqcore.nn.GRU(WIDTH, 3), given("gru")
    (explanation,) = seqcore.explain(lambda: func.jvp(first(module), (x,), (x,)))
    assert explanation.chosen == "reference" and "cannot pass through a kernel" in explanation.notes["triton"]
