"""The operators' own launches, through Triton's binder to machine code, for a GPU that is not here.

What is compiled ahead of time is what the catalogue says a launch passes; here it is what a launch does pass.
"""

import pytest
import torch

from seqcore import functional
from seqcore.devices import INTERPRETED
from seqcore.kernels.tuning import Device
from seqcore.testing import launches

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiles for a GPU that is not here")

B, H, H_KV, M, N, D = 2, 4, 2, 200, 300, 64


@pytest.fixture
def device():
    return Device("sm_90")


@pytest.fixture
def launched(device):
    with launches.compiled_for(device) as found:
        yield found


def assert_fits(launched, device):
    for launch in launched:
        assert launch.compiled.metadata.shared <= device.shared_memory
        assert all(0 < programs < 2**31 for programs in launch.grid)


def run(packed=False, sizes=(H, H_KV, M, N, D), dtype=torch.bfloat16, **options):
    heads, heads_kv, m, n, d = sizes
    lead = () if packed else (B,)
    q = torch.randn(*lead, heads, m, d, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(*lead, heads_kv, n, d, dtype=dtype, requires_grad=True) for _ in range(2))
    found = functional.attention(q, k, v, enable_gqa=True, return_lse=True, backend="triton", **options)
    sum(t.float().nan_to_num().sum() for t in found).backward()


FORWARD, DECODE = {"attention_forward_kernel"}, {"attention_decode_kernel", "attention_combine_kernel"}
BACKWARD = {f"attention_backward_{part}_kernel" for part in ("delta", "dkdv", "dq")}
BIAS, WEIGHTS = {"attention_backward_bias_kernel"}, {"attention_weights_kernel"}


def ends(*at):
    return torch.tensor(at, dtype=torch.int32)


CASES = {
    "plain": ({}, FORWARD | BACKWARD),
    "causal": ({"causal": "lower_right", "sizes": (H, H, M, N, 128)}, FORWARD | BACKWARD),
    "everything": (
        {
            "attn_mask": torch.randn(M, N), "sinks": torch.randn(H), "window": (70, 1), "softcap": 2.0,
            "alibi_slopes": torch.rand(H), "dropout_p": 0.1, "key_lengths": torch.tensor([3, 4]),
        },
        FORWARD | BACKWARD | BIAS,
    ),
    "packed": (
        {"packed": True, "cu_seqlens_q": ends(0, 5, M), "cu_seqlens_k": ends(0, 9, N), "causal": "top_left"},
        FORWARD | BACKWARD,
    ),
    "decode": ({"sizes": (8, 2, 1, 4000, 128), "key_lengths": torch.tensor([3, 4000])}, DECODE | BACKWARD),
    "one key": ({"sizes": (H, H, 1, 1, 16)}, FORWARD | BACKWARD),
    "float32 of odd rows": ({"sizes": (H, 1, 70, 33, 41), "dtype": torch.float32}, FORWARD | BACKWARD),
    "weights": ({"return_weights": "average", "attn_mask": torch.randn(1, N)}, FORWARD | BACKWARD | BIAS | WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_launches_compile(case, launched, device):
    options, expected = CASES[case]
    # Both take a gradient, so that what makes it is launched too.
    wanting = {"attn_mask", "sinks"}
    options = {name: t.clone().requires_grad_() if name in wanting else t for name, t in options.items()}
    run(**options)
    assert {launch.name for launch in launched} == expected
    assert_fits(launched, device)


@pytest.mark.parametrize("aligned", [True, False])
def test_descriptors_where_alignment_allows(aligned, launched):
    q, k, v = (torch.randn(B, H, N, D + 1, dtype=torch.float16)[..., :D] for _ in range(3))
    if aligned:
        q, k, v = (t.contiguous() for t in (q, k, v))
    functional.attention(q, k, v, backend="triton")
    (forward,) = launched
    assert ("cp.async.bulk.tensor" in forward.compiled.asm["ptx"]) == aligned


@pytest.mark.parametrize("device", [Device("sm_89")], ids=["sm_89"])
@pytest.mark.parametrize("sizes", [(H, H, M, N, 128), (8, 1, 8, 4000, 64)], ids=["tiles", "decode"])
def test_everything_fits_little_shared_memory(sizes, launched, device):
    options = {**CASES["everything"][0], "attn_mask": torch.randn(sizes[2], sizes[3]), "sinks": torch.randn(sizes[0])}
    run(**options | {"sizes": sizes, "alibi_slopes": torch.rand(sizes[0])})
    assert len(launched) >= 4
    assert_fits(launched, device)
