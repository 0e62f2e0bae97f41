"""What is precompiled is what a call would look for, and it is found again."""

import os
import subprocess
import sys

import pytest
import torch

from seqcore import cli, nn
from seqcore.devices import INTERPRETED
from seqcore.errors import UnsupportedInput
from seqcore.kernels.tuning import Device
from seqcore.precompile import precompile
from seqcore.profiling import Attention, Recurrence
from seqcore.testing import launches

pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="compiles for a GPU that is not here")

GPU = Device("sm_90")
FORWARD, BACKWARD = "recurrence_forward_kernel", "recurrence_backward_kernel"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    """An empty one, in the process and in Triton's memory of it."""
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert triton.knobs.cache.dir == str(tmp_path / "cache")


def lstm(**options):
    sizes = {"T": 1000, "B": 5, "H": 40, "dtype": "float16", "pass_": "training"}
    return Recurrence("lstm", **(sizes | options))


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*.cubin")}


def in_a_new_process(code: str) -> str:
    # In this one Triton remembers what it has compiled, whatever its cache holds.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_launch_of_a_layer_finds_its_kernel(tmp_path):
    setup = "import torch; from seqcore import nn, precompile, profiling; from seqcore.kernels.tuning import Device\n"
    setup += "from seqcore.testing import launches; gpu = Device('sm_90')\n"
    problem = "profiling.Recurrence('lstm', T=1000, B=5, H=40, dtype='float16', pass_='training')"
    found = in_a_new_process(f"{setup}print([c.seconds > 0 for c in precompile.precompile({problem}, gpu)])")
    assert found.strip() == "[True, True, True]"
    compiled = files(tmp_path / "cache")
    assert len(compiled) == 3
    # A user's module at another length, in inference and in training.
    code = f"""{setup}
module = nn.LSTM(40, 40, dtype=torch.float16, backend="triton")
x = torch.randn(7, 5, 40, dtype=torch.float16, requires_grad=True)
with launches.compiled_for(gpu) as launched:
    module(x)[0].float().nan_to_num().sum().backward()
    with torch.no_grad():
        module(x)
print(len(launched))"""
    assert in_a_new_process(code).strip() == "3"
    assert files(tmp_path / "cache") == compiled, "a launch compiled what had not been precompiled"


def test_what_is_there_already_is_said_so():
    code = "from seqcore import cli; cli.main(['precompile', 'attention', '--arch', 'sm_90', '--M', '64', '--D', '16'])"
    first, second = in_a_new_process(code), in_a_new_process(code)
    kernels = ("attention_forward_kernel", "attention_backward_dkdv_kernel")
    assert all(kernel in first and kernel in second for kernel in kernels)
    assert " s\n" in first and "in the cache already" not in first
    assert second.count("in the cache already") == first.count(" s\n")
    assert f"Triton's cache: {os.environ['TRITON_CACHE_DIR']}" in second


def test_forward_alone_compiles_no_backward():
    found = precompile(lstm(pass_="forward", H=24), GPU)
    assert {compiled.kernel for compiled in found} == {FORWARD}


def test_another_dtype_is_another_program(tmp_path):
    with launches.compiled_for(GPU) as launched:
        for dtype in (torch.float16, torch.float32):
            with torch.no_grad():
                nn.GRU(24, 24, dtype=dtype, backend="triton")(torch.randn(3, 5, 24, dtype=dtype))
    assert len({launch.compiled.hash for launch in launched}) == 2


def test_without_a_gpu_one_must_be_named(capsys):
    with pytest.raises(UnsupportedInput, match="--arch sm_90"):
        precompile(lstm())
    assert cli.main(["precompile", "lstm", "--H", "40"]) == 2
    assert "--arch sm_90" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["lstm", "--H", "0", "--arch", "sm_90"], "H must be a positive number of at most 2^31 - 1, got 0"),
        (["attention", "--dtype", "int8", "--arch", "sm_90"], "dtype must be one of float16, bfloat16, float32"),
        (["lstm", "--arch", "sm_70"], "needs compute capability 8.0 or newer, got sm_70"),
        (["lstm", "--arch", "sm_9000"], "such as 'sm_90' or 'sm_90a', got 'sm_9000'"),
        (["lstm", "--arch", "sm_90", "--multiprocessors", "-3"], "integers that are not negative"),
        (["lstm", "--arch", "sm_90", "--H", "99999999999999999999"], "H must be a positive number of at most 2^31 - 1"),
        (["attention", "--arch", "sm_90", "--M", "99999999999999999999"], "M must be a positive number of at most"),
        (["attention", "--arch", "sm_90", "--M", "2147483647", "--B", "2147483647"], "not enough memory"),
        (["lstm", "--arch", "h100"], "--arch must be a GPU's, like sm_90 or gfx942, got 'h100'"),
        (["lstm", "--arch", "sm_90", "--multiprocessors", "8", "--H", "16384"], "run"),
    ],
)
def test_bad_input_is_refused(capsys, arguments, said):
    assert cli.main(["precompile", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_decoding_is_precompiled_by_its_own_sizes():
    found = precompile(Attention(B=1, H=8, H_kv=2, M=1, N=4000, D=64, dtype="float16"), GPU)
    assert {compiled.kernel for compiled in found} == {"attention_decode_kernel", "attention_combine_kernel"}
