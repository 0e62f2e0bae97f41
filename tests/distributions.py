"""Archives of the library, built from a copy of the sources, so that nothing is written into the checkout."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("seqcore", "kernels")
BESIDE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
INSTALL = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation")


def run(*command: str | Path, cwd: Path, **options) -> str:
    """What a command printed; it must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copied(folder: Path) -> Path:
    """``folder``, with the sources in it."""
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    return folder


def wheel_of(source: Path, folder: Path) -> Path:
    """The wheel that pip builds of a checkout or a source archive; needs no network."""
    options = ("--no-build-isolation", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", "dist", source, cwd=folder)
    return next((folder / "dist").glob("*.whl"))


def sdist_of(checkout: Path) -> Path:
    """The source archive of a checkout."""
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=checkout)
    return next((checkout / "dist").glob("*.tar.gz"))


def contents(archive: Path) -> dict[str, bytes]:
    """The files of a wheel, or of a source archive below its one folder, by their names."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as sdist:
        files = [member for member in sdist if not member.isdir()]
        assert all(member.isfile() for member in files), "there are links among them"
        return {member.name.partition("/")[2]: sdist.extractfile(member).read() for member in files}
