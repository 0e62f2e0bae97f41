"""Plain PyTorch does work in proportion to steps and sequences, backward too: no gradient of each as large as all."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqcore import functional, truncated_bptt
from seqcore.diagnostics import gradient_flow

from .attention_twins import ends, qkv
from .recurrence_twins import CELLS, ours, packed, problem, tensors

FEW = 24


class Made(TorchDispatchMode):
    """Within it, ``bytes`` counts those of all tensors that are made, views aside."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not any(value.alias_info for value in function._schema.returns):
            self.bytes += sum(t.nbytes for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


def assert_linear(run):
    """``run(n)`` returns what is to be differentiated."""
    made = []
    for count in (FEW, 4 * FEW):
        with Made() as mode:
            run(count)
        made.append(mode.bytes)
    assert made[1] < 4.5 * made[0], f"4 times as much made {made[1] / made[0]:.1f} times as many bytes"


def trained(outputs, inputs):
    return torch.autograd.grad([t.sum() for t in tensors(outputs)], tensors(inputs))


FORMS = {
    "padded": lambda T, B: {},
    "lengths": lambda T, B: {"lengths": torch.arange(B) * (T // B)},
    "reset": lambda T, B: {"reset": torch.arange(T * B).view(T, B) % 7 == 0},
}


@pytest.mark.parametrize("form", [*FORMS, "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrences(cell, form):
    def run(T):
        twin, x, hx = problem(cell, T=T, B=3, H=4, bidirectional=True)
        module, inputs = ours(twin, "reference"), [x.requires_grad_(), *tensors(hx)]
        given = {} if form == "packed" else FORMS[form](T, 3)
        trained(module(packed(x, [T, T // 2, 1]) if form == "packed" else x, hx, **given), inputs[:1])

    assert_linear(run)


def test_zoneout_takes_as_much_a_step():
    def run(T):
        twin, x, hx = problem("lstm", T=T, B=3, H=4)
        trained(ours(twin, "reference", zoneout=0.3).train()(x.requires_grad_(), hx), x)

    assert_linear(run)


def test_what_is_looked_at_step_by_step():
    def run(T):
        twin, x, _ = problem("lstm", T=T, B=3, H=4)
        gradient_flow(ours(twin, "reference"), x.requires_grad_())

    assert_linear(run)


def test_chunks():
    def run(T):
        twin, x, hx = problem("gru", T=T, B=3, H=4)
        for y, *_ in truncated_bptt(ours(twin, "reference"), x, 4, hx):
            y.sum().backward()

    assert_linear(run)


@pytest.mark.parametrize("mask", [None, "a bias"])
def test_packed_attention(mask):
    def run(sequences):
        cu_seqlens = ends(*[3] * sequences)
        inputs = [t.requires_grad_() for t in qkv(1, 2, M=3 * sequences, N=3 * sequences, D=4)]
        inputs = [t[0] for t in inputs]
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "backend": "reference"}
        if mask:
            # Of queries alone, or the mask itself would grow with the square.
            options["attn_mask"] = torch.zeros(3 * sequences, 1, requires_grad=True)
        out = functional.attention(*inputs, **options)
        trained(out, [*inputs, *([options["attn_mask"]] if mask else [])])

    assert_linear(run)
