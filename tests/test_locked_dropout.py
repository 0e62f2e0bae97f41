"""Locked dropout: one mask per sequence and feature, as a function, a module, and between recurrent layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import seqcore
from seqcore import functional
from seqcore.nn import LockedDropout

from .comparisons import assert_equal_in_float64
from .compile_twins import Capture
from .recurrence_twins import CELLS, differing, masks, ours, packed, problem, results

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Which torch says of one layer, for which the option is to do nothing.
    pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last recurrent layer"),
    # What torch's own compiler does to itself.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

T, B, F = 4, 5, 64
LENGTHS = [2, 4, 1, 4, 3]
# Sorted and not: of the latter, rows stand in another order than their sequences.
PACKED = {"sorted": sorted(LENGTHS, reverse=True), "unsorted": LENGTHS}


def locked(x, p=0.5, **options):
    torch.manual_seed(3)
    return functional.locked_dropout(x, p, **options)


def test_one_mask_for_all_steps_another_for_each_sequence():
    y = locked(torch.ones(T, B, F))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y == y[:1]).all()
    assert not any(torch.equal(y[0, b], y[0, a]) for b in range(B) for a in range(b))


@pytest.mark.parametrize("name, size", [("batch_first", (B, T, F)), ("unbatched", (T, F)), ("half", (T, B, F))])
def test_forms(name, size):
    x = torch.ones(size, dtype=torch.float16 if name == "half" else torch.float32)
    y = locked(x, batch_first=name == "batch_first")
    time = 1 if name == "batch_first" else 0
    assert y.dtype == x.dtype and y.shape == x.shape
    assert (y == y.narrow(time, 0, 1)).all() and 0 < (y == 0).sum() < y.numel()


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_sequence_gets_the_masks_of_the_padded_batch(form):
    x = torch.randn(T, B, F)
    found = locked(packed(x, PACKED[form]))
    assert isinstance(found, PackedSequence)
    padded, lengths = pad_packed_sequence(found)
    past = torch.arange(T)[:, None, None] >= lengths[:, None]
    assert torch.equal(padded, locked(x).masked_fill(past, 0))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(p):
    kept = locked(torch.ones(2, 100, 500), p) != 0
    # 50,000 draws: six standard deviations.
    assert abs(kept[0].double().mean() - (1 - p)) < 6 * (p * (1 - p) / 50_000) ** 0.5
    torch.testing.assert_close(locked(torch.ones(2, 100, 500), p)[kept].unique(), torch.tensor([1 / (1 - p)]))


def test_the_gradient_has_the_mask():
    x = torch.randn(T, B, F, requires_grad=True)
    y = locked(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y / x).detach().round())


def test_module_draws_anew_at_each_call_and_not_in_evaluation():
    module, x = LockedDropout(0.5, batch_first=True), torch.ones(B, T, F)
    assert repr(module) == "LockedDropout(p=0.5, batch_first=True)"
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    assert (first == first[:, :1]).all()
    assert module.eval()(x) is x
    assert functional.locked_dropout(x, 0.0) is x
    assert (functional.locked_dropout(x, 1.0) == 0).all()
    assert functional.locked_dropout(x[:, :0], batch_first=True).shape == (B, 0, F)


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(2, 3, 4), 1.5), "between 0 and 1, but got 1.5"),
    ((torch.zeros(2, 3, 4), "0.5"), "between 0 and 1, but got '0.5'"),
    ((torch.zeros(4), 0.5), r"must be \[T, B, F\].* got \[4\]"),
    ((PackedSequence(torch.zeros(4), torch.tensor([2, 2])), 0.5), r"got \[4\]"),
    ((torch.zeros(2, 3).long(), 0.5), "needs floating point, got torch.int64"),
    (([[0.0]], 0.5), "a Tensor or a PackedSequence, got list"),
])  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(seqcore.InvalidInput, match=message):
        functional.locked_dropout(*arguments, training=False)


def test_module_refuses_a_bad_probability():
    with pytest.raises(seqcore.InvalidInput, match=r"LockedDropout: .* got -0\.1"):
        LockedDropout(-0.1)


# --- between the layers of a module --------------------------------------------------------------------------------

FORMS = {
    "padded": ({}, lambda x: (x, {})),
    "batch_first": ({"batch_first": True}, lambda x: (x, {})),
    "packed": ({}, lambda x: (packed(x, LENGTHS), {})),
    "lengths": ({}, lambda x: (x, {"lengths": masks()["lengths"]})),
}


class Layers(nn.Module):
    """``module``'s layers one by one, and ``dropout`` between them."""

    def __init__(self, module, dropout):
        super().__init__()
        self.dropout = dropout
        for name, parameter in module.named_parameters():
            self.register_parameter(name, parameter)
        # Not as submodules: the parameters' names are to stay those of the whole.
        self.__dict__["layers"] = []
        for layer in range(module.num_layers):
            inputs = module.input_size if layer == 0 else 2 * (module.proj_size or module.hidden_size)
            options = {"proj_size": module.proj_size} if module.proj_size else {}
            options |= {"nonlinearity": module.nonlinearity} if module.mode.startswith("RNN") else {}
            single = getattr(seqcore.nn, module.mode.partition("_")[0])(
                inputs, module.hidden_size, bidirectional=True, batch_first=module.batch_first, **options
            )
            for name in list(single._parameters):
                setattr(single, name, getattr(module, name.replace("_l0", f"_l{layer}")))
            single.backend = "reference"
            self.layers.append(single)

    def forward(self, x, hx=None, **keywords):
        finals = []
        for layer in self.layers:
            x, state = layer(x if layer is self.layers[0] else self.dropout(x), None, **keywords)
            finals.append(state)
        if isinstance(finals[0], tuple):
            return x, tuple(torch.cat(states) for states in zip(*finals, strict=True))
        return x, torch.cat(finals)


def seeded(module, x, **keywords):
    torch.manual_seed(7)
    return results(module, x, **keywords)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_between_layers(cell, form):
    options, given = FORMS[form]
    twin, x, _ = problem(cell, T=T, num_layers=3, dropout=0.5, bidirectional=True, dtype=torch.float64, **options)
    x, keywords = given(x)
    expected = seeded(Layers(twin, LockedDropout(0.5, twin.batch_first)), x, **keywords)
    for backend in ("reference", "aten", None) if form != "lengths" else ("reference", None):
        assert_equal_in_float64(seeded(ours(twin, backend, locked=True), x, **keywords), expected)


@pytest.mark.parametrize("case", ["evaluation", "p=0", "one layer"])
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_where_nothing_is_dropped_nothing_changes(backend, case):
    options = {"num_layers": 1 if case == "one layer" else 2, "dropout": 0.0 if case == "p=0" else 0.5}
    twin, x, _ = problem("lstm", bidirectional=True, **options)
    twin.train(case != "evaluation")
    assert not differing(results(ours(twin, backend, locked=True), x), results(ours(twin, backend), x))


def test_without_the_option_the_mask_is_drawn_for_each_step():
    """Else all of the above could compare locked with locked."""
    twin, x, _ = problem("gru", num_layers=2, dropout=0.5, dtype=torch.float64)
    assert differing(seeded(ours(twin, "reference"), x), seeded(ours(twin, "reference", locked=True), x))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_by_the_operators_and_compiled(form, by_the_operators):
    twin, x, _ = problem("gru", T=T, num_layers=2, dropout=0.5, bidirectional=True, dtype=torch.float64)
    x = packed(x, LENGTHS) if form == "packed" else x
    expected = seeded(Layers(twin, LockedDropout(0.5)), x)
    module, capture = ours(twin, None, locked=True), Capture()
    assert_equal_in_float64(seeded(module, x), expected)
    module.compile(fullgraph=True, backend=capture)
    assert_equal_in_float64(seeded(module, x), expected)
    assert capture.forward == [["recurrence_forward"] * 2]


@pytest.mark.parametrize("locked", [1, 0.5, None, "yes"])
def test_locked_is_a_bool(locked):
    for make in (
        lambda: seqcore.nn.GRU(4, 3, num_layers=2, dropout=0.5, locked=locked),
        lambda: ours(nn.GRU(4, 3), None, locked=locked)(torch.zeros(2, 5, 4)),
    ):
        with pytest.raises(seqcore.InvalidInput, match="GRU: locked must be True or False, got"):
            make()


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"dropout": 0.5}], ids=["p=0", "one layer"])
def test_what_does_nothing_is_no_reason_not_to_restore(options):
    module = seqcore.nn.LSTM(4, 3, locked=True, **options)
    assert seqcore.restore(module).swapped and type(module) is nn.LSTM and "locked" not in vars(module)


def test_dropconnect_by_a_parametrization():
    """As LockedDropout recommends: one mask on the recurrent weights per call."""
    twin, x, hx = problem("lstm", dtype=torch.float64)
    module = ours(twin, "reference")
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Dropout(0.5))
    whole = module.parametrizations.weight_hh_l0.original
    torch.manual_seed(3)
    y = module(x, hx)[0]
    torch.manual_seed(3)
    dropped = nn.functional.dropout(whole, 0.5)
    with torch.no_grad():
        twin.weight_hh_l0.copy_(dropped)
    assert torch.equal(y, ours(twin, "reference")(x, hx)[0])
    y.sum().backward()
    assert torch.equal(whole.grad == 0, dropped == 0)


def test_a_swapped_module_and_its_options():
    module = nn.LSTM(4, 3, num_layers=2, dropout=0.5)
    seqcore.replace(module)
    assert module.locked is False and "locked" not in repr(module)
    module.locked = True
    assert repr(module).endswith("dropout=0.5, locked=True)")
    assert "locked=True" in str(seqcore.restore(module))
    assert seqcore.nn.GRU(4, 3, num_layers=2, dropout=0.5, locked=True).locked
