"""How the stages of a campaign come to import this checkout, on a machine where nothing may be installed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import ROOT


def clean_environment(tiny: bool) -> dict[str, str]:
    """This process's environment without what would interpret kernels or force a backend; tiny: without GPUs."""
    unwanted = {"TRITON_INTERPRET", "SEQCORE_BACKEND", "PYTHONWARNINGS"}
    found = {key: value for key, value in os.environ.items() if key not in unwanted}
    if tiny:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def make_importable(process_environment: dict[str, str]) -> None:
    """See to it that the stages can import seqcore and its kernels from this checkout; say how."""
    if _imports(process_environment):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    # A system Python may be marked as managed by its distribution; an editable install only adds a link.
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env={**process_environment, "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode == 0 and _imports(process_environment):
        print("seqcore: installed as a link to this checkout", flush=True)
        return
    print(f"seqcore: `{' '.join(command)}` failed:\n{answer.stdout}{answer.stderr}", flush=True)
    process_environment["PYTHONPATH"] = f"{linked_package()}{os.pathsep}{ROOT}"
    # Otherwise the current folder comes first, where seqcore lacks its kernels.
    process_environment["PYTHONSAFEPATH"] = "1"
    if not _imports(process_environment):
        sys.exit("seqcore cannot be imported, neither installed nor linked: nothing can be run")
    print("seqcore: imported through links instead", flush=True)


def _imports(process_environment: dict[str, str]) -> bool:
    """Whether seqcore and its kernels are found, and in this checkout rather than another."""
    files = "import seqcore, seqcore.kernels; print(seqcore.__file__, seqcore.kernels.__file__, sep='\\n')"
    answer = subprocess.run(
        [sys.executable, "-c", files], cwd=ROOT, env=process_environment, capture_output=True, text=True, check=False
    )
    found = [Path(line).resolve() for line in answer.stdout.splitlines()]
    return answer.returncode == 0 and all(path.is_relative_to(ROOT) for path in found)


def linked_package() -> Path:
    """A folder in which ``seqcore`` is this checkout's, with its kernels inside, as an installation would have it."""
    # Not of a name that can be guessed: another user might have put other sources there.
    folder = Path(tempfile.mkdtemp(prefix="seqcore-links-"))
    package = folder / "seqcore"
    package.mkdir()
    for entry in (ROOT / "seqcore").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return folder
