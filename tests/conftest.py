"""Which tests run where, and what every test may ask for.

A test marked ``kernels`` launches Triton kernels: it runs on a GPU, and on a CPU in a process of its own with
TRITON_INTERPRET=1. All other tests run in the ordinary process; the interpreter cannot share one with some of them.
"""

import os
import platform
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if platform.machine() in ("x86_64", "AMD64"):
    # The interpreter multiplies by NumPy, whose OpenBLAS rounds by the CPU that it finds: the same on all of them.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
# No table of this machine's user may decide a test.
os.environ["SEQCORE_CACHE"] = ""

import pytest
import torch

from seqcore.devices import INTERPRETED

from .effort import take_tried
from .routes import by_the_operators

HAS_GPU = torch.cuda.is_available() and not INTERPRETED

# One of several processes, which share the cores. Those that tests begin are not to think that of themselves.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: launches Triton kernels, on a GPU or interpreted")
    config.addinivalue_line("markers", "unfilled: what torch.empty returns in such a test is left as it is")


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        return (INTERPRETED or HAS_GPU) if item.get_closest_marker("kernels") else not INTERPRETED

    chosen = [item for item in items if runs_here(item)]
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = chosen
    for item in chosen:
        if item.get_closest_marker("kernels"):
            # The peers on a GPU may lack a deterministic form; `_poisoned` turns the mode on for its NaNs alone.
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))


@pytest.fixture(autouse=True, scope="session")
def _quicker_interpreter():
    """Prepare triton.language for a device function once a launch, not at each of its calls: a third of the time."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    prepared = set()

    def prepare_once(function):
        if function not in prepared:
            prepared.add(function)
            return prepare(function)
        return None

    def launch_afresh(executor, *arguments, **keywords):
        prepared.clear()
        return launch(executor, *arguments, **keywords)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch_afresh),
        mock.patch.object(interpreter, "_patch_lang", prepare_once),
    ):
        yield


@pytest.fixture(scope="session")
def processes():
    """``processes(n).run(job, ...)`` runs a job in each of n processes that form a group; see ``process_group``."""
    from .process_group import Processes

    groups = {}

    def of(size: int) -> Processes:
        if size not in groups or not groups[size].alive:
            groups[size] = Processes(size)
        return groups[size]

    yield of
    for group in groups.values():
        group.close()


@pytest.fixture
def device() -> torch.device:
    """Where this process's kernels run: the GPU, or the CPU when interpreted."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(name="by_the_operators")
def _by_the_operators():
    with by_the_operators():
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _counted(request):
    """Reports say how many cases each test has tried."""
    take_tried()
    yield
    request.node.user_properties.append(("cases", take_tried() or 1))


@pytest.fixture(autouse=True)
def _poisoned(request):
    """Fill what ``torch.empty`` returns with NaN in kernel tests, so that an element nobody wrote is seen."""
    if not request.node.get_closest_marker("kernels") or request.node.get_closest_marker("unfilled"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def kernel_dtype(request) -> torch.dtype:
    """Each dtype the kernels take here; Triton's interpreter miscomputes bfloat16 products."""
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter miscomputes bfloat16 products (triton issue 11584)")
    return request.param
