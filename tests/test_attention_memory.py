"""What memory attention takes and touches: nothing of M x N elements, far offsets right."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqcore.kernels import tuning
from seqcore.ops import attention_launch

from .attention_twins import assert_like_reference, ends, kernels, operands, qkv


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **keywords or {})
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                # What lies in memory: an expanded tensor takes none.
                self.elements = max(self.elements, tensor.untyped_storage().size() // tensor.itemsize)
        return found


class NoLaunch:
    """In a kernel's place: launches are counted, and nothing runs."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        assert all(0 < size < 2**31 for size in grid)
        return self.launch

    def launch(self, *arguments, **keywords):
        self.launches += 1


@pytest.mark.parametrize("kind", ["plain", "everything", "packed", "few queries"])
@pytest.mark.parametrize("mask", ["of queries", "of heads", "of keys"])
def test_no_tensor_grows_with_queries_times_keys(kind, mask, monkeypatch):
    """65,536 of each; the mask takes a gradient, which is summed over queries or keys or both."""
    heads, n = 2, 65_536
    m = 1 if kind == "few queries" else n
    options = {} if kind == "plain" else {
        "window": (512, None), "causal": "lower_right", "softcap": 2.0, "alibi_slopes": torch.ones(heads),
        "sinks": torch.zeros(heads), "dropout_p": 0.1, "dropout_seed": torch.tensor([3]),
        "query_lengths": torch.tensor([m]), "key_lengths": torch.tensor([n]),
    }  # fmt: skip
    if kind == "packed":
        options = {name: value for name, value in options.items() if not name.endswith("_lengths")}
        options |= {"cu_seqlens_q": ends(9, n - 9), "cu_seqlens_k": ends(n - 7, 7)}
    shape = {"of queries": (1, heads, m, 1), "of heads": (1, heads, 1, 1), "of keys": (1, 1, 1, n)}[mask]
    settings, tensors = operands(
        *qkv(1, heads, heads_kv=1, M=m, N=n, D=2), attn_mask=torch.zeros(shape), **options
    )  # fmt: skip
    kernels = []
    for name in ("forward", "decode", "backward", "bias"):
        module = importlib.import_module(f"seqcore.kernels.attention.{name}")
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels.append(NoLaunch())
            monkeypatch.setattr(module, kernel, kernels[-1])
    with Largest() as largest:
        out, lse, rows = attention_launch.forward(*tensors, *settings)
        wanted = [True, True, True, True, "sinks" in options]
        attention_launch.backward(out, lse, out, rows, wanted, *tensors, *settings)
    assert sum(kernel.launches for kernel in kernels) == (6 if kind == "few queries" else 5)
    # Backward's four statistics of a row are the largest, and what decoding leaves of each part is less.
    assert largest.elements <= 4 * heads * n


def far_apart(tensor, strides):
    """A copy of ``tensor`` that spans more than 2^31 elements, of which on a CPU only those touched take memory."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
    assert span > 2**31
    if tensor.is_cuda:
        memory = torch.zeros(span, dtype=tensor.dtype, device=tensor.device)
    else:
        # numpy leaves its pages to the system; torch would fill them with NaN here.
        memory = torch.from_numpy(np.empty(span * tensor.itemsize, dtype=np.uint8)).view(tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.kernels
@pytest.mark.parametrize("splits", [0, 2], ids=["forward", "decode"])
@pytest.mark.parametrize("shape", [(3, 21), (3, 1, 21)], ids=["rows", "heads"])
def test_offsets_beyond_31_bits_in_a_mask(shape, splits, device, monkeypatch):
    monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)
    mask = far_apart(torch.rand(shape, device=device) < 0.6, (2**30 + 1, 1, 1)[: len(shape)])
    assert_like_reference(*qkv(1, 3, heads_kv=1, M=3, N=21, D=4, device=device), attn_mask=mask)


@pytest.mark.kernels
def test_offsets_beyond_31_bits_in_keys(device):
    query, key, value = qkv(3, 2, M=5, N=7, D=4, dtype=torch.float16, device=device)
    # Strides of no whole units, which would divide them.
    far = far_apart(key, (2**30 + 9, 64, 8, 1))
    found, expected = (kernels(query, k, value) for k in (far, key))
    assert math.isfinite(found[0].sum().item())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
