"""What is installed from an archive: whole, working, and left as it is by whoever uses it."""

import hashlib
import site
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .audited import Session, audited
from .distributions import BESIDE, INSTALL, ROOT, SOURCES, contents, copied, run, sdist_of, wheel_of
from .effort import NIGHTLY

pytest.importorskip("setuptools", minversion="77", reason="older ones cannot build these archives by themselves")

# What may lie about in a checkout, and is nobody else's.
LITTER = (
    ".env", ".venv/lib/module.py", "build/lib/seqcore/old.py", "build/bench.json", "dist/old.whl",
    "profile-lstm/trace.json", "seqcore/__pycache__/cells.cpython-310.pyc", "seqcore/notes.json",
    "seqcore/cells.py.orig", "kernels/tuned/sm_90.json.7.part", "kernels/key.pem",
    "study/journal.jsonl", "tests/test_cells.py", "tests/conftest.py", "docs/tuning.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = copied(tmp_path_factory.mktemp("checkout"))
    for name in LITTER:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("litter")
    return folder


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    return sdist_of(checkout)


@pytest.fixture(scope="module")
def wheels(checkout, sdist, tmp_path_factory) -> dict[str, Path]:
    """The wheel of the sources, and the wheel of the source archive."""
    return {
        "wheel": wheel_of(copied(tmp_path_factory.mktemp("sources")), tmp_path_factory.mktemp("of-sources")),
        "sdist": wheel_of(sdist, tmp_path_factory.mktemp("of-sdist")),
    }


def test_a_source_archive_holds_what_a_build_needs_and_nothing_else(sdist):
    library = (path for name in SOURCES for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts)
    kept = {path.relative_to(ROOT).as_posix() for path in library if path.suffix in (".py", ".json", ".typed")}
    expected = kept | set(BESIDE)
    assert {"LICENSE", "seqcore/py.typed", "kernels/tuned/sm_90.json"} <= expected
    found = contents(sdist)
    made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or name.startswith("seqcore.egg-info/")}
    assert found.keys() - made == expected
    assert all(found[name] == (ROOT / name).read_bytes() for name in expected)


def test_both_archives_make_the_same_wheel(wheels):
    of_sources, of_sdist = (contents(wheels[name]) for name in ("wheel", "sdist"))
    assert of_sources == of_sdist
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in of_sources)


WORKS = """
import torch, seqcore
theirs, ours = torch.nn.LSTM(3, 5), seqcore.nn.LSTM(3, 5)
ours.load_state_dict(theirs.state_dict())
x = torch.randn(4, 2, 3)
for backend in ("aten", "reference"):
    with seqcore.use_backend(backend):
        y, _ = ours(x)
    torch.testing.assert_close(y, theirs(x)[0])
    y.sum().backward()
assert len(seqcore.kernels.tuning.table("sm_90")) > 0
print(seqcore.__file__)
"""


def environment(folder: Path) -> Path:
    """The Python of a new environment in which this one's packages are found, but for seqcore."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # Paths alone: what makes an editable installation importable is a .pth file in one of them, which is not read.
    theirs = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()))
    Path(purelib, "theirs.pth").write_text("\n".join(theirs))
    return python


@pytest.mark.skipif(sys.platform == "win32", reason="an environment lies elsewhere there")
@pytest.mark.parametrize(
    # What pip makes of the source archive is the same wheel.
    "archive", ["sdist", pytest.param("wheel", marks=pytest.mark.skipif(not NIGHTLY, reason="nightly"))]
)
def test_an_archive_can_be_installed_and_works(archive, wheels, sdist, tmp_path):
    python = environment(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python, *INSTALL[3:], "--ignore-installed")
    run(*pip, wheels["wheel"] if archive == "wheel" else sdist, cwd=tmp_path)
    # Isolated: of PYTHONPATH and of the current folder nothing is imported.
    printed = run(python, "-I", "-c", WORKS, cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(tmp_path / "venv")


@pytest.mark.skipif(not NIGHTLY, reason="downloads torch")
def test_a_wheel_brings_all_that_it_needs(wheels, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # What is to be found out is what a package lacks: the versions are those that are known to work.
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheels["wheel"], cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    assert Path(run(python, "-I", "-c", WORKS, cwd=tmp_path).strip()).is_relative_to(tmp_path / "venv")


# --- what a session does ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(*INSTALL, "--target", folder / "site", wheels["wheel"], cwd=folder)
    return folder / "site"


def digest(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


PRELUDE = """
import os, sys
from pathlib import Path
import torch, seqcore
from seqcore import cli
out = Path(os.environ["OUT"])
def command(line):
    status = cli.main([str(out / part[4:]) if part.startswith("OUT/") else part for part in line.split()])
    assert status == 0, (line, status)
"""
LIBRARY = PRELUDE + """
lstm = seqcore.nn.LSTM(3, 5, num_layers=2, dropout=0.5)
lstm(torch.randn(4, 2, 3))[0].sum().backward()
q = torch.randn(2, 3, 4, 5, requires_grad=True)
seqcore.functional.attention(q, q, q, causal="top_left", window=(2, 0)).sum().backward()
print(seqcore.explain(lstm, torch.randn(4, 2, 3), device=seqcore.Device("sm_90")))
seqcore.replace(torch.nn.Sequential(torch.nn.GRU(3, 5)))
command("info")
command("info --json")
command("profile gru --T 3 --B 2 --H 8 --repeats 1 --out OUT/profile")
command("precompile attention --arch sm_90 --B 1 --H 1 --M 16 --D 16 --pass forward")
"""
INTERPRETED = PRELUDE + """
command("verify --case T=1 --out OUT/verified.json --journal OUT/journal.jsonl")
"""
LONG = PRELUDE + """
command("tune --tiny --op gru --out OUT/table.json")
from benchmarks.__main__ import main
assert main(["--sizes", "tiny", "--suite", "attention", "--no-plots", "--out", str(out / "bench")]) == 0
"""
# The assembler; what asks a driver, the linker, or the system for what it is.
PROGRAMS = {"ptxas", "ptxas-blackwell", "nvidia-smi", "ldconfig", "uname"}


def session(script: str, folder: Path, paths: list[Path], **variables: str) -> Session:
    """Run a script with the installed package, which must neither change it nor leave anything where it stands."""
    before = digest(paths[0])
    found = audited(script, folder, paths, **variables)
    assert digest(paths[0]) == before
    assert not list((folder / "work").iterdir()) and not list((folder / "home").iterdir())
    assert found.writes_outside(*(folder / name for name in ("cache", "tmp", "triton", "out"))) == []
    assert not found.connects
    return found


def test_a_session_writes_where_it_may_and_connects_to_nothing(installed, tmp_path):
    found = session(LIBRARY, tmp_path, [installed])
    assert (tmp_path / "out" / "profile").is_dir() and found.printed.count("lstm: auto takes") == 1
    assert {Path(program).name for program in found.starts} <= PROGRAMS


@pytest.mark.skipif(not NIGHTLY, reason="nightly")
@pytest.mark.parametrize("script", [INTERPRETED, LONG], ids=["verify", "tune and benchmarks"])
def test_so_does_one_that_interprets_kernels(script, installed, tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "benchmarks").symlink_to(ROOT / "benchmarks")
    session(script, tmp_path, [installed, tmp_path / "checkout"], TRITON_INTERPRET="1")


def test_the_walk_of_a_session_sees_what_is_wrong(tmp_path):
    script = """
import os, socket, subprocess, sys
open("left.txt", "w").close()
os.mkdir(os.path.expanduser("~/made"))
subprocess.run([sys.executable, "-c", "open('by-a-child.txt', 'w')"], check=True)
with socket.socket() as connection:
    connection.connect_ex(("127.0.0.1", 9))
"""
    found = audited(script, tmp_path, [])
    outside = [str(path.relative_to(tmp_path)) for path in found.writes_outside(tmp_path / "out")]
    assert outside == ["home/made", "work/by-a-child.txt", "work/left.txt"]
    assert found.starts == [sys.executable] and len(found.connects) == 1
