"""What a kernel is called in Triton's cache is the same in every process."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import triton

from seqcore import kernels
from seqcore.devices import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted functions have no names")

MODULES = sorted(module.name for module in pkgutil.walk_packages(kernels.__path__, "seqcore.kernels."))


def functions() -> dict[str, triton.JITFunction]:
    found = {}
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, triton.JITFunction) and value.module == name:
                found[f"{name}.{value.__name__}"] = value
    return found


@pytest.mark.parametrize("name", sorted(functions()) if not INTERPRETED else [])
def test_a_name_is_final(name):
    function = functions()[name]
    before = function.cache_key
    # Named again, now that all functions that it calls have names.
    function.hash = None
    assert function.cache_key == before


def test_names_do_not_depend_on_the_order_of_imports():
    code = "import importlib, sys\n"
    code += "for name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "from seqcore.kernels.attention import decode, forward\nfrom seqcore.kernels.recurrence import backward\n"
    code += "print(decode.attention_decode_kernel.cache_key, forward.attention_forward_kernel.cache_key)\n"
    code += "print(backward.recurrence_backward_kernel.cache_key)"
    found = {
        subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, check=True).stdout
        for order in (MODULES, reversed(MODULES))
    }
    assert len(found) == 1
