"""AOTInductor on the CPU: packages that call seqcore's operators, for every length and batch."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package

from seqcore import functional, nn

from .compile_twins import Sizes, operators

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

DOUBLE = {"dtype": torch.float64}


class Tagger(torch.nn.Module):
    """A layer of each kind, with most of what inference may ask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(4, 6, bidirectional=True, batch_first=True, **DOUBLE)
        self.narrow = nn.LSTM(12, 8, proj_size=4, batch_first=True, **DOUBLE)
        self.positions = nn.SinusoidalPositions(4, batch_first=True)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True, alibi=True, **DOUBLE)
        self.pool = nn.RNNCell(4, 3, **DOUBLE)

    def forward(self, x: Tensor, lengths: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded, _ = self.encoder(x, lengths=lengths)
        narrow, (_, c_n) = self.narrow(encoded)
        mixed, weights = self.mix(*[self.positions(narrow)] * 3, key_padding_mask=padding)
        heads = mixed.unsqueeze(1)
        local = functional.attention(heads, heads, heads, causal="lower_right", window=(3, None), softcap=2.0)
        return self.pool(local[:, 0, -1]), weights, c_n


class Step(torch.nn.Module):
    """The operators of a training step themselves: clipping is a ``float?``, the weights' gradients a ``Tensor[]``."""

    def forward(self, x: Tensor, w_ih: Tensor, w_hh: Tensor) -> tuple[Tensor, ...]:
        layer = ("gru", x, x.new_zeros(1, x.shape[1], 3), None, [w_ih, w_hh], 1, False, None, None, None)
        y, *_, saved, cells, hidden = torch.ops.seqcore.recurrence_forward(*layer, True, True)
        dx, *_, weights = torch.ops.seqcore.recurrence_backward(
            *layer, y, saved, cells, hidden, y, None, None, None, 0.1, True
        )
        q = y.unsqueeze(0)
        attention = (q, q, q, *[None] * 6, False, "top_left", None, 0, 1.0, 0.0, 0.0)
        out, lse, rows = torch.ops.seqcore.attention_forward(*attention)
        wanted = [True, False, True, False, False]
        dq, _, dv, *_ = torch.ops.seqcore.attention_backward(out, None, out, rows, wanted, *attention)
        return dx, *weights, lse, dq, dv


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tagger, self.step = Tagger(), Step()

    def forward(self, x: Tensor, lengths: Tensor, padding: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return *self.tagger(x, lengths, padding), *self.step(x.transpose(0, 1), *weights)


MODULES = ["recurrence_forward"] * 2 + ["attention_forward", "attention_weights", "attention_forward"]
OPERATORS = ["recurrence_forward", "recurrence_backward", "attention_forward", "attention_backward"]


def inputs(of: Sizes) -> tuple[Tensor, ...]:
    return of("B", "T", 4), of.counts("T", "B"), of.bools("B", "T"), of(9, 4), of(9, 3)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A module and the path of the package made of it."""
    torch.manual_seed(0)
    module, of = Both().eval(), Sizes(T=5, B=3)
    example = inputs(of)
    with torch.no_grad():
        open_sizes = of.dynamic_shapes(example)
        program = torch.export.export(module, example, dynamic_shapes=(*open_sizes[:3], open_sizes[3:]))
        assert operators(program.graph_module) == [*MODULES, "recurrence_forward", *OPERATORS]
        path = tmp_path_factory.mktemp("package") / "both.pt2"
        return module, aoti_compile_and_package(program, package_path=str(path))


@torch.no_grad()
def test_a_package_serves_every_length_and_batch(package):
    module, path = package
    run = aoti_load_package(path)
    for T, B in ((5, 3), (9, 2), (4, 17), (6, 6)):
        given = inputs(Sizes(T=T, B=B))
        torch.testing.assert_close(tuple(run(*given)), module(*given))


def test_a_process_that_has_not_imported_seqcore_is_told_what_is_missing(package):
    code = f"from torch._inductor import aoti_load_package; aoti_load_package({package[1]!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode and "Could not find schema for seqcore::recurrence_forward" in found.stderr
