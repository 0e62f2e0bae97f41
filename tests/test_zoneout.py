"""Zoneout: units that keep their state, against the paper's formula step by step, and on the kernels."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import seqcore
from seqcore import InvalidInput, UnsupportedInput, functional
from seqcore.functional.zoneout import kept

from .comparisons import assert_equal_in_float64
from .compile_twins import Capture
from .recurrence_twins import assert_alike, differing, mapped, masks, ours, packed, problem, results, tensors

# What torch's own compiler does to itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")

CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]
STEPS = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell, "GRU": torch.gru_cell}
LENGTHS = [2, 4, 1, 4, 3]
BOTH_WAYS = {"T": 4, "bidirectional": True}
SEED = 7


def zoneout_of(cell):
    return (0.4, 0.2) if cell == "lstm" else 0.4


class Seeded(nn.Module):
    """``module``, drawing the same at every call."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **keywords):
        torch.manual_seed(SEED)
        return self.module(*inputs, **keywords)


class Loop(nn.Module):
    """One layer both ways, sequence by sequence and step by step: each state d s + (1 - d) s~ (Krueger et al., 2017).

    s~ is what torch's own cell makes of the state s that enters; d is drawn as by ``Seeded``, or its expectation.
    """

    def __init__(self, module, zoneout):
        super().__init__()
        self.module = module
        self.zoneout = zoneout if isinstance(zoneout, tuple) else (zoneout,)

    def step(self, x, state, suffix):
        weights = [
            getattr(self.module, f"{kind}_l0{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        if len(state) == 2:
            return torch.lstm_cell(x, state, *weights)
        return (STEPS[self.module.mode](x, state[0], *weights),)

    def keeping(self, x):
        """d of each state, [D, T, B, H], in float64."""
        rows = x.data if isinstance(x, PackedSequence) else x
        if not self.training:
            shape = (2, *(x.batch_sizes.shape if rows.dim() == 2 else ()), *rows.shape[-3:-1], self.module.hidden_size)
            return [torch.full(shape, p, dtype=torch.float64) for p in self.zoneout]
        torch.manual_seed(SEED)
        drawn = kept(self.zoneout, rows, self.module.hidden_size, 2, training=True).double()
        if isinstance(x, PackedSequence):
            pieces = (PackedSequence(d, x.batch_sizes, x.sorted_indices, x.unsorted_indices) for d in drawn)
            drawn = torch.stack([pad_packed_sequence(piece)[0] for piece in pieces])
        return drawn.chunk(len(self.zoneout), -1)

    def forward(self, x, hx, lengths=None, reset=None):
        keep, form = self.keeping(x), x
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x)
        lengths = [x.shape[0]] * x.shape[1] if lengths is None else lengths.tolist()
        rows, finals = [], []
        for b, length in enumerate(lengths):
            ways = []
            for d, suffix in enumerate(("", "_reverse")):
                state = tuple(s[d, b : b + 1] for s in tensors(hx))
                outputs = [torch.zeros_like(state[0])] * x.shape[0]
                for t in range(length) if d == 0 else range(length - 1, -1, -1):
                    # Seen from behind, the cut before step t + 1 lies after step t.
                    cut = t + d
                    if reset is not None and cut < (length if d else x.shape[0]) and reset[cut, b]:
                        state = tuple(torch.zeros_like(s) for s in state)
                    new = self.step(x[t, b : b + 1], state, suffix)
                    state = tuple(
                        (k[d, t, b] * s + (1 - k[d, t, b]) * n).to(n) for k, s, n in zip(keep, state, new, strict=True)
                    )
                    outputs[t] = state[0]
                ways.append(torch.stack(outputs))
                finals.append(torch.stack(state))
            rows.append(torch.cat(ways, -1))
        y = torch.cat(rows, 1)
        state = torch.stack(finals).view(len(lengths), 2, len(tensors(hx)), -1).permute(2, 1, 0, 3)
        y = packed(y, lengths) if isinstance(form, PackedSequence) else y
        return y, tuple(state) if len(state) == 2 else state[0]


def in_form(form, x, device=None):
    """x, and keywords."""
    return (packed(x, LENGTHS) if form == "packed" else x), masks(device) if form == "masked" else {}


# --- the reference, and operators on a CPU -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("form", ["padded", "masked", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_papers_formula(cell, form, mode):
    twin, x, hx = problem(cell, **BOTH_WAYS, dtype=torch.float64)
    x, keywords = in_form(form, x)
    twin.train(mode == "training")
    expected = results(Loop(twin, zoneout_of(cell)).train(twin.training), x, hx, **keywords)
    found = results(Seeded(ours(twin, "reference", zoneout=zoneout_of(cell))), x, hx, **keywords)
    assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("cell, mode", [*((cell, "training") for cell in CELLS), ("lstm", "evaluation")])
def test_operators_and_compiled_graphs_draw_and_compute_the_same(cell, mode, by_the_operators):
    twin, x, hx = problem(cell, **BOTH_WAYS, dtype=torch.float64)
    twin.train(mode == "training")
    zoneout = (0.7, 0.2) if mode == "evaluation" else zoneout_of(cell)
    expected = results(Loop(twin, zoneout).train(twin.training), x, hx)
    module, capture = Seeded(ours(twin, None, zoneout=zoneout)), Capture()
    assert_equal_in_float64(results(module, x, hx), expected)
    module.module.compile(fullgraph=True, backend=capture)
    assert_equal_in_float64(results(module, x, hx), expected)
    assert capture.forward == [["recurrence_forward"]] and capture.backward == [["recurrence_backward"]]


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_a_probability_of_0_changes_no_bit_and_draws_nothing(backend):
    twin, x, hx = problem("lstm", **BOTH_WAYS)
    before = torch.get_rng_state()
    found = results(ours(twin, backend, zoneout=(0.0, 0)), x, hx)
    assert not differing(found, results(ours(twin, backend), x, hx))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_probability_of_1_keeps_the_initial_state(cell, mode):
    twin, x, hx = problem(cell, **BOTH_WAYS)
    y, state = ours(twin.train(mode == "training"), "reference", zoneout=1.0)(x, hx)
    for found, initial in zip(tensors(state), tensors(hx), strict=True):
        assert torch.equal(found, initial)
    assert (y == torch.cat(list(tensors(hx)[0]), -1)).all()


@pytest.mark.parametrize("p", [0.05, 0.99, 0.999])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_an_expectation_in_16_bits(cell, p):
    twin, x, hx = problem(cell, **BOTH_WAYS, dtype=torch.bfloat16)
    # From zeros: else the rounding of what is kept hides how far a step goes.
    hx = mapped(torch.zeros_like, hx)
    module = ours(twin.eval(), "reference", zoneout=p)
    assert_alike(Seeded(module), Loop(twin, (p,) * len(tensors(hx))).eval(), x, hx)
    with torch.autocast("cpu", torch.bfloat16):
        found = copy.deepcopy(module).float()(x.float(), mapped(Tensor.float, hx))
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(module(x, hx)), strict=True))


def test_what_is_drawn():
    of_each, shape = (0.3, 0.05), (20, 30)
    drawn = kept(of_each, torch.empty(*shape, 4), 40, 2, training=True)
    assert drawn.shape == (2, *shape, 2 * 40) and drawn.element_size() == 1
    for p, part in zip(of_each, drawn.chunk(2, -1), strict=True):
        # Six standard deviations of the share of 48,000 draws; and along no dimension does one repeat another.
        assert abs(part.double().mean() - p) < 6 * (p * (1 - p) / part.numel()) ** 0.5
        for dim in range(part.dim()):
            slices = part.movedim(dim, 0).flatten(1)
            assert slices.unique(dim=0).shape == slices.shape


def test_each_call_draws_anew_unless_seeded():
    twin, x, hx = problem("gru", **BOTH_WAYS)
    module = ours(twin, "reference", zoneout=0.5)
    assert differing(results(module, x, hx), results(module, x, hx))
    assert not differing(results(Seeded(module), x, hx), results(Seeded(module), x, hx))


def test_every_c_is_the_one_that_is_kept():
    twin, x, hx = problem("lstm", T=4, dtype=torch.float64)
    module = ours(twin.eval(), "reference", zoneout=(0.4, 0.2))
    cells = module(x, hx, return_cells=True)[2]
    expected = torch.stack([module(x[: t + 1], hx)[1][1][0] for t in range(4)])
    torch.testing.assert_close(cells, expected)


def test_only_the_kernels_and_the_reference_have_it():
    twin, x, hx = problem("gru")
    with pytest.raises(UnsupportedInput, match="torch's gru has no zoneout"):
        ours(twin, "aten", zoneout=0.1)(x, hx)
    module = ours(twin, None, zoneout=0.1)
    [here], [there] = (seqcore.explain(module, x, device=d) for d in (None, seqcore.Device("sm_90")))
    assert (here.chosen, there.chosen) == ("reference", "triton")


@pytest.mark.parametrize("name, options, zoneout, message", [
    ("GRU", {}, 1.5, "GRU: zoneout must be a probability between 0 and 1, got 1.5"),
    ("RNN", {}, (0.1, 0.1), r"RNN: zoneout must be a probability between 0 and 1, got \(0.1, 0.1\)"),
    ("LSTM", {}, float("nan"), r"LSTM: zoneout must be .* or a pair of these for h and c, got nan"),
    ("LSTM", {}, (0.1, -0.1), r"got \(0.1, -0.1\)"),
    ("LSTM", {}, (0.1,), r"got \(0.1,\)"),
    ("LSTM", {}, "0.1", "got '0.1'"),
    ("GRU", {}, True, "got True"),
    ("LSTM", {}, (0.1, False), r"got \(0.1, False\)"),
    ("LSTM", {"proj_size": 2}, 0.1, "LSTM: zoneout keeps units of h, which proj_size mixes"),
])  # fmt: skip
def test_bad_probabilities(name, options, zoneout, message):
    with pytest.raises(InvalidInput, match=message):
        getattr(seqcore.nn, name)(4, 3, zoneout=zoneout, **options)
    module = getattr(seqcore.nn, name)(4, 3, **options)
    module.zoneout = zoneout
    with pytest.raises(InvalidInput, match=message):
        module(torch.zeros(2, 5, 4))


def test_cells_by_name():
    twin, x, hx = problem("lstm", dtype=torch.float64)
    weights = list(twin.parameters())
    found = functional.recurrence(x, hx, weights, cell="lstm", zoneout=0.3)
    expected = functional.lstm(x, hx, weights, zoneout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))
    for plain, function in (("rnn_relu", "rnn"), ("gru", "gru"), ("lstm", "lstm")):
        message = f"{plain}_zoneout: .* pass zoneout= to {function}, or to recurrence with cell='{plain}'"
        twin, x, hx = problem(plain)
        with pytest.raises(InvalidInput, match=message):
            functional.recurrence(x, hx, list(twin.parameters()), cell=f"{plain}_zoneout")
    own = seqcore.Cell("test_own", 1, ("h",), "", "", lambda x, h, state: ((x[0] + h[0],), ()))
    weights = [torch.zeros(3, 4), torch.zeros(3, 3)]
    with pytest.raises(InvalidInput, match=r"test_own: zoneout is for 'rnn_tanh', .* in a cell of your own, leave it"):
        functional.recurrence(torch.zeros(2, 5, 4), None, weights, cell=own, bias=False, zoneout=0.1)


def test_a_swapped_module_and_its_options():
    module = nn.LSTM(4, 3)
    seqcore.replace(module)
    assert module.zoneout == 0.0 and "zoneout" not in repr(module)
    module.zoneout = (0.1, 0.2)
    assert repr(module) == "LSTM(4, 3, zoneout=(0.1, 0.2))"
    assert "zoneout=(0.1, 0.2)" in str(seqcore.restore(module))
    module.zoneout = (0.0, 0.0)
    assert seqcore.restore(module).swapped and repr(module) == "LSTM(4, 3)" and "zoneout" not in vars(module)
    assert seqcore.nn.GRU(4, 3, zoneout=0.1).zoneout == 0.1


# --- the kernels ----------------------------------------------------------------------------------------------------

# Options of our own, the form of the input, torch's options, and the cells of which each is tried.
OPTIONS = {
    "padded": ({}, "padded", {"num_layers": 2, "B": 17}, CELLS),
    "both ways": ({}, "masked", {"bidirectional": True}, ("rnn_relu", "lstm")),
    "packed": ({"recompute": True}, "packed", {"bidirectional": True, "H": 17}, ("gru", "lstm")),
    "clip": ({"recompute": True, "grad_clip": 0.05}, "masked", {"bias": False}, ("rnn_tanh", "gru")),
    "blocks": ({"blocks": 3}, "padded", {"H": 48, "T": 2}, ("gru", "lstm")),
    "a step": ({}, "padded", {"T": 1, "H": 1}, ("rnn_tanh", "lstm")),
    "evaluation": ({"training": False}, "padded", {}, ("rnn_relu", "gru", "lstm")),
    "half": ({}, "packed", {"dtype": torch.float16}, ("gru", "lstm")),
    "half evaluation": ({"training": False}, "masked", {"dtype": torch.float16}, ("lstm",)),
}  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("name, cell", [(name, cell) for name, (*_, cells) in OPTIONS.items() for cell in cells])
def test_kernels(name, cell, device):
    own, form, options, _ = OPTIONS[name]
    twin, x, hx = problem(cell, **{"T": 4, "I": 8, **options}, device=device)
    x, keywords = in_form(form, x, device)
    if cell == "lstm":
        keywords["return_cells"] = True
    module = ours(twin, "triton", zoneout=zoneout_of(cell), **own)
    assert_alike(Seeded(module), Seeded(ours(module, "reference", recompute=False)), x, hx, **keywords)


# At the last, 1 - p is less than float16 has.
@pytest.mark.kernels
@pytest.mark.parametrize("p", [0.05, 0.99, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_kernels_expect_in_16_bits(cell, p, device):
    twin, x, hx = problem(cell, T=4, I=8, dtype=torch.float16, device=device)
    module = ours(twin.eval(), "triton", zoneout=p)
    assert_alike(module, ours(module, "reference"), x, mapped(torch.zeros_like, hx))


@pytest.mark.kernels
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_at_0_and_at_1(cell, device):
    twin, x, hx = problem(cell, I=8, device=device)
    assert not differing(results(ours(twin, "triton", zoneout=0.0), x, hx), results(ours(twin, "triton"), x, hx))
    found = mapped(torch.detach, ours(twin, "triton", zoneout=1.0)(x, hx)[1])
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(hx), strict=True))
