"""seqcore.replace and seqcore.restore: modules of a model swapped in place, and nothing else of it changed."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import seqcore
from seqcore.testing.budget import assert_within_budget

from .comparisons import Results, assert_equal_in_float64, assert_within
from .compile_twins import Capture
from .recurrence_twins import CELLS, torch_module

B, T, I, H = 3, 7, 6, 8


class Tagger(nn.Module):
    """Something of everything: recurrences, a cell stepped by hand, attention, and weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(I, H, nonlinearity="relu")
        self.gru = parametrizations.weight_norm(nn.GRU(H, H, bidirectional=True), "weight_hh_l0")
        self.lstm = nn.LSTM(2 * H, H, num_layers=2, dropout=0.5)
        self.cells = nn.ModuleList([nn.RNNCell(H, H), nn.GRUCell(H, H), nn.LSTMCell(H, H)])
        self.attention = nn.MultiheadAttention(H, 2)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.gru(self.rnn(x)[0])[0])[0]
        steps = [self.cells[2](self.cells[1](self.cells[0](step)))[0] for step in y]
        y = torch.stack(steps) + y
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


NAMES = ["rnn", "gru", "lstm", "cells.0", "cells.1", "cells.2", "attention"]


def model(dtype: torch.dtype = torch.float64) -> Tagger:
    torch.manual_seed(0)
    return Tagger().to(dtype)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step of training on data and with dropout that ``number`` decides."""
    torch.manual_seed(number)
    parameter = next(module.parameters())
    x, target = torch.randn(T, B, I).to(parameter), torch.randn(T, B, 1).to(parameter)
    optimizer.zero_grad()
    (module(x) - target).square().mean().backward()
    optimizer.step()


def trained(dtype: torch.dtype, swap_after: int | None, backend: str | None = None, steps: int = 5) -> Results:
    """The parameters after ``steps``, the modules being swapped after some of them."""
    module = model(dtype)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for number in range(steps):
        if number == swap_after:
            assert list(seqcore.replace(module, backend=backend).swapped) == NAMES
        step(module, optimizer, number)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("backend", [None, "reference"])
def test_training_goes_on_with_the_optimizers_state(backend):
    exact = trained(torch.float64, None)
    assert_equal_in_float64(trained(torch.float64, swap_after=2, backend=backend), exact)
    assert_within(trained(torch.float32, swap_after=2, backend=backend), exact, trained(torch.float32, None))


def test_parameters_hooks_and_state_are_the_very_same():
    module, seen = model(), []
    module.lstm.register_forward_hook(lambda *_: seen.append("forward hook"))
    module.attention.in_proj_weight.register_hook(lambda _: seen.append("gradient hook"))
    parameters, buffers = dict(module.named_parameters()), list(module.state_dict())
    attributes = {name: dict(vars(inner)) for name, inner in module.named_modules()}
    for swap, kind in ((seqcore.replace, seqcore.nn), (seqcore.restore, nn)):
        assert list(swap(module).swapped) == NAMES
        assert all(parameters[name] is found for name, found in module.named_parameters())
        assert list(module.state_dict()) == buffers
        assert {name: vars(inner) for name, inner in module.named_modules()} == attributes
        assert type(module.lstm) is kind.LSTM and type(module.cells[1]) is kind.GRUCell
        module(torch.randn(T, B, I, dtype=torch.float64)).sum().backward()
        assert seen == ["forward hook", "gradient hook"]
        seen.clear()


@pytest.mark.parametrize("cell", CELLS)
def test_a_model_may_be_the_module_itself(cell):
    module, x = torch_module(cell, dtype=torch.float64), torch.randn(T, B, 4, dtype=torch.float64)
    expected, name = {"y": module(x)[0]}, type(module).__name__
    assert seqcore.replace(module).swapped == {"": f"torch.nn.{name} -> seqcore.nn.{name}"}
    assert type(module) is getattr(seqcore.nn, name)
    assert_equal_in_float64({"y": module(x)[0]}, expected)
    assert seqcore.restore(module).swapped == {"": f"seqcore.nn.{name} -> torch.nn.{name}"}
    assert torch.equal(module(x)[0], expected["y"])


# --- what is chosen, and what is said of it ------------------------------------------------------------------------


def test_a_filter_chooses_by_name_and_module():
    module = model()
    report = seqcore.replace(module, lambda name, inner: name.startswith("cells") or isinstance(inner, nn.GRU))
    assert list(report.swapped) == ["gru", "cells.0", "cells.1", "cells.2"] and not report.skipped
    report = seqcore.restore(module, lambda name, inner: name == "cells.1")
    assert list(report.swapped) == ["cells.1"]
    assert type(module.cells[1]) is nn.GRUCell and type(module.cells[0]) is seqcore.nn.RNNCell


def test_shared_modules_are_swapped_once_and_all_their_names_reported():
    module = nn.ModuleDict({"a": nn.LSTM(2, 3)})
    module["b"] = module["a"]
    report = seqcore.replace(module, lambda name, _: name == "a")
    assert report.skipped == {"a": "stands in several places, also as b; filter_fn leaves b alone"}
    assert seqcore.replace(module).swapped == {"a": "torch.nn.LSTM -> seqcore.nn.LSTM, also as b"}


def test_a_backend_is_for_what_is_swapped():
    module = nn.ModuleList([seqcore.nn.GRU(2, 3), nn.GRU(2, 3), nn.MultiheadAttention(4, 2)])
    assert seqcore.replace(module, lambda name, _: name == "0").skipped == {"0": "seqcore.nn.GRU already"}
    report = seqcore.replace(module, backend="reference")
    assert report.swapped["0"] == "seqcore.nn.GRU -> seqcore.nn.GRU, backend reference"
    assert [inner.backend for inner in module] == ["reference"] * 3
    assert seqcore.replace(module, backend="reference").skipped.keys() == {"0", "1", "2"}
    seqcore.restore(module)
    assert not any("backend" in vars(inner) for inner in module)
    with pytest.raises(seqcore.InvalidInput, match="unknown backend: got 'cudnn'"):
        seqcore.replace(module, backend="cudnn")
    assert type(module[1]) is nn.GRU
    with pytest.raises(seqcore.InvalidInput, match=r"model must be a torch\.nn\.Module, got type"):
        seqcore.replace(nn.GRU)


def test_a_filter_that_fails_leaves_all_as_it_was():
    module = nn.Sequential(nn.GRU(2, 3), nn.GRU(3, 3))
    with pytest.raises(ZeroDivisionError):
        seqcore.replace(module, lambda name, _: 1 / (name == "0"))
    assert {type(inner) for inner in module} == {nn.GRU}


def test_attributes_that_are_no_options_keep_a_module_torchs():
    module = nn.LSTM(2, 3)
    module.backend, module.recompute = "mine", True
    report = seqcore.replace(module)
    assert report.skipped == {"": "has attributes that would be options of ours: backend, recompute; rename them"}
    assert type(module) is nn.LSTM


def test_the_report_reads_well():
    module = nn.ModuleDict({"encoder": nn.LSTM(2, 3), "decoder": seqcore.nn.GRU(2, 3)})
    lines = str(seqcore.replace(module)).splitlines()
    assert lines[:3] == [
        "seqcore.replace: 1 swapped, 1 skipped",
        "  + encoder  torch.nn.LSTM -> seqcore.nn.LSTM",
        "  - decoder  seqcore.nn.GRU already",
    ]
    assert "replace_sdpa" in lines[3]
    assert str(seqcore.replace(nn.GRU(2, 3))).splitlines()[1] == "  + (model)  torch.nn.GRU -> seqcore.nn.GRU"
    assert str(seqcore.restore(nn.Linear(2, 3))) == "seqcore.restore: 0 swapped, 0 skipped"


class Peephole(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


def with_a_forward_of_its_own() -> nn.Module:
    module = nn.LSTM(2, 3)
    module.forward = lambda x: x
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Peephole(2, 3), r"Peephole: derived from torch.nn.LSTM, and may do something of its own"),
        (lambda: parametrizations.weight_norm(Peephole(2, 3), "weight_hh_l0"), "Peephole: derived from torch.nn.LSTM"),
        (with_a_forward_of_its_own, "torch.nn.LSTM with a forward of its instance's own"),
        (lambda: torch.jit.script(nn.GRU(2, 3)), "scripted GRU: its code is fixed"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(4, 2), "may do something of its own"),
        (lambda: nn.RNNBase("LSTM", 2, 3), "torch.nn.RNNBase: the base of several kinds"),
        (lambda: torch.ao.nn.quantized.dynamic.LSTM(2, 3), "LSTM: quantized"),
    ],
)
def test_what_is_skipped_and_why(make, reason):
    module = make()
    kind = type(module)
    report = seqcore.replace(module)
    assert not report.swapped and type(module) is kind
    assert reason in report.skipped[""]


def test_sharded_modules_are_skipped(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, x = init_device_mesh("cpu", (1,)), torch.randn(T, B, 2)
        module = fully_shard(nn.LSTM(2, 3), mesh=mesh)
        assert "call seqcore.replace first, then fully_shard" in seqcore.replace(module).skipped[""]
        module = nn.LSTM(2, 3)
        expected = module(x)[0]
        seqcore.replace(module)
        fully_shard(module, mesh=mesh)
        torch.testing.assert_close(module(x)[0], expected)
        assert "sharded" in seqcore.restore(module).skipped[""]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make, used",
    [
        (lambda: seqcore.nn.LSTM(4, 4, blocks=2), "blocks=2"),
        (lambda: seqcore.nn.GRU(4, 4, grad_clip=1.0), "grad_clip=1.0"),
        (lambda: seqcore.nn.RNN(4, 4, recompute=True), "recompute=True"),
        (lambda: seqcore.nn.MultiheadAttention(4, 2, alibi=True), "alibi=True"),
        (lambda: seqcore.nn.MultiheadAttention(4, 2, rotary=seqcore.nn.RotaryPositions(2)), "rotary=RotaryPositions"),
    ],
)
def test_what_torch_cannot_represent_is_not_restored(make, used):
    module = make()
    kind = type(module)
    report = seqcore.restore(module)
    assert f"uses what torch's class lacks: {used}" in report.skipped[""] and type(module) is kind


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention"])
def test_what_was_made_as_ours_is_restored_as_torch_makes_it(name):
    module, twin = (getattr(place, name)(4, 2) for place in (seqcore.nn, nn))
    module.backend = "reference"
    seqcore.restore(module)
    assert type(module) is type(twin) and repr(module) == repr(twin)
    assert vars(module).keys() == vars(twin).keys()
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 4)
    given = (x, x, x) if name == "MultiheadAttention" else (x,)
    actual, expected = (m(*given) for m in (module, twin))
    for a, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert torch.equal(a[0], e[0])


# --- what torch puts around modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", [False, True], ids=["", "and restored"])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrized_modules_stay_parametrized(name, restored):
    weight = "weight_ih_l0" if name == "LSTM" else "weight_ih"
    module = parametrizations.weight_norm(getattr(nn, name)(4, 3, dtype=torch.float64), weight)
    x = torch.randn(B, 4, dtype=torch.float64)
    y = torch.no_grad()(lambda module: {"y": module(x)[0]})
    expected, kind = y(module), getattr(nn if restored else seqcore.nn, name)
    seqcore.replace(module)
    if restored:
        seqcore.restore(module)
    assert parametrize.type_before_parametrizations(module) is kind
    duplicate = copy.deepcopy(module)
    for each in (module, duplicate):
        assert_equal_in_float64(y(each), expected)
        with torch.no_grad():
            each.parametrizations[weight].original0.mul_(2)
        assert not torch.allclose(y(each)["y"], expected["y"])
    before = y(module)
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is kind
    assert_equal_in_float64(y(module), before)


def test_spectral_norm_by_a_hook():
    module, x = nn.LSTM(4, 3, dtype=torch.float64), torch.randn(T, B, 4, dtype=torch.float64)
    nn.utils.spectral_norm(module, "weight_hh_l0")
    twin = copy.deepcopy(module)
    seqcore.replace(module)
    for _ in range(2):
        assert_equal_in_float64({"y": module(x)[0]}, {"y": twin(x)[0]})


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_compiles_anew():
    torch._dynamo.reset()
    module, x = nn.MultiheadAttention(8, 2, dtype=torch.float64), torch.randn(T, B, 8).double()
    capture = Capture()
    whole = torch.compile(module, backend=capture, fullgraph=True)
    expected = {"y": whole(x, x, x, need_weights=False)[0]}
    for swap, kind, operators in (
        (seqcore.replace, seqcore.nn, ["attention_forward"]), (seqcore.restore, nn, []),
    ):  # fmt: skip
        capture.forward.clear()
        assert list(swap(whole).swapped) == ["_orig_mod"] and type(module) is kind.MultiheadAttention
        assert_equal_in_float64({"y": whole(x, x, x, need_weights=False)[0]}, expected)
        # What was compiled for torch's class may still be there for it.
        assert [name for graph in capture.forward for name in graph] == operators


def test_saved_whole_and_loaded_again():
    module, x, file = nn.Sequential(nn.LSTM(4, 3)), torch.randn(T, B, 4), io.BytesIO()
    seqcore.replace(module)
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is seqcore.nn.LSTM and torch.equal(loaded(x)[0], module(x)[0])


# --- torch's Transformers ------------------------------------------------------------------------------------------


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(8, 2, 2, 1, 16, dropout=0.0, batch_first=True).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad()
def test_encoders_that_nest_padded_input_stop_and_begin_again():
    module, x = transformer(), torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    encoder = module.encoder
    expected = encoder(x, src_key_padding_mask=padding)
    exact = copy.deepcopy(encoder).double()(x.double(), src_key_padding_mask=padding)
    assert encoder.use_nested_tensor
    report = seqcore.replace(module)
    said = "use_nested_tensor: True -> False; in evaluation padding is no longer zeros"
    assert report.swapped.pop("encoder") == said
    assert list(report.swapped) == [
        "encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    encoder = copy.deepcopy(encoder)
    actual = encoder(x, src_key_padding_mask=padding)
    # Nested, what stands on padding is zero; else it is computed, and of no meaning.
    assert_within_budget(actual[~padding], exact[~padding], expected[~padding])
    report = seqcore.restore(encoder, lambda name, _: name == "layers.1.self_attn")
    assert list(report.swapped) == ["layers.1.self_attn"] and not encoder.use_nested_tensor
    assert seqcore.restore(encoder).swapped[""] == "use_nested_tensor: False -> True"
    assert torch.equal(encoder(x, src_key_padding_mask=padding), expected)


def test_an_encoder_whose_attention_stays_torchs_goes_on_nesting():
    module = transformer()
    assert list(seqcore.replace(module, lambda name, _: name.startswith("decoder")).swapped) == [
        "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    assert module.encoder.use_nested_tensor


def test_an_encoder_that_never_nested_does_not_begin_to():
    module = nn.TransformerEncoder(transformer().encoder.layers[0], 2, enable_nested_tensor=False)
    seqcore.replace(module)
    seqcore.restore(module)
    assert not module.use_nested_tensor


# --- what it does not do -------------------------------------------------------------------------------------------


def test_other_packages_are_not_imported(tmp_path):
    script = """
import sys, torch, seqcore
seqcore.restore(torch.nn.LSTM(2, 3))
print(seqcore.replace(torch.nn.Sequential(torch.nn.LSTM(2, 3))).swapped)
print(*{"transformers", "torchrl", "tensordict", "lightning"} & set(sys.modules))
"""
    done = subprocess.run((sys.executable, "-c", script), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "{'0': 'torch.nn.LSTM -> seqcore.nn.LSTM'}\n\n"
