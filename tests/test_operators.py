"""Every operator registered under seqcore keeps torch.library's rules, whatever order its tensors have in memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqcore.ops import attention, recurrence

from .attention_twins import features, operands, qkv

T, B, I, H = 4, 3, 2, 6
REGISTERED = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqcore::")]


def scattered(*shape: int) -> Tensor:
    """Random, with the last dimension where the first should be in memory, and room between its elements."""
    return torch.randn(*reversed(shape), 2).permute(*reversed(range(len(shape))), len(shape))[..., 0]


def layer() -> tuple:
    """A projected LSTM with everything to be kept for backward."""
    shapes = ((4 * H, I), (4 * H, 3), (4 * H,), (4 * H,), (3, H))
    states, weights = (scattered(1, B, 3), scattered(1, B, H)), [scattered(*shape) for shape in shapes]
    lengths, reset = torch.tensor([4, 2, 0]), torch.rand(B, T).T < 0.3
    return "lstm", scattered(T, B, I), *states, weights, 1, True, None, lengths, reset


def recurrence_backward() -> tuple:
    inputs = layer()
    y, h_n, c_n, *kept = recurrence.forward(*inputs, True, True)
    gradients = (scattered(*t.shape) for t in (y, h_n, c_n, kept[1]))
    return *inputs, y, *kept, *gradients, 0.1, True


def problem() -> tuple:
    """Attention's tensors and settings, all features of a padded batch together."""
    options = features(2, 4, T, 5)["everything"] | {"attn_mask": scattered(2, 4, T, 5)}
    inputs = (scattered(*t.shape) for t in qkv(2, 4, heads_kv=2, M=T, N=5, D=I, DV=3))
    settings, tensors = operands(*inputs, **options)
    return *(t if t is None else t.detach() for t in tensors), *settings


def attention_backward() -> tuple:
    inputs = problem()
    out, lse, rows = attention.forward(*inputs)
    return scattered(*out.shape), scattered(*lse.shape), out, rows, [True] * 5, *inputs


def attention_weights() -> tuple:
    inputs = problem()
    return attention.forward(*inputs)[2], *inputs


def attention_weights_backward() -> tuple:
    return scattered(2, T, 5), [True, True, False, True, True], *problem()


CALLS: dict[str, Callable[[], tuple]] = {
    "seqcore::recurrence_forward": lambda: (*layer(), True, True),
    "seqcore::recurrence_backward": recurrence_backward,
    "seqcore::attention_forward": problem,
    "seqcore::attention_backward": attention_backward,
    "seqcore::attention_weights": attention_weights,
    "seqcore::attention_weights_backward": attention_weights_backward,
}


@pytest.mark.parametrize("name", sorted({*REGISTERED, *CALLS}))
def test_every_registered_operator_keeps_torchs_rules(name):
    operator = getattr(torch.ops.seqcore, name.removeprefix("seqcore::"))
    torch.library.opcheck(operator, CALLS[name]())
