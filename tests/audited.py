"""Processes of which it is known what they write, start and connect to, and those that they start as well."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Python imports this module, if it finds it, before anything else; processes that a process starts find it too.
SITECUSTOMIZE = """
import json, os, sys

_log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
          "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "os.mkfifo": 1}
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"}
_CONNECTS = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg",
             "socket.gethostbyname", "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect"}

def _text(value):
    return os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else repr(value)

def _note(kind, *values):
    os.write(_log, (json.dumps([kind, *map(_text, values)]) + "\\n").encode())

def _hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, (str, bytes, os.PathLike)) and flags & _WRITING:
            _note("writes", os.path.join(os.getcwd(), _text(path)))
    elif event in _PATHS:
        for path in arguments[1:2] if event == "os.symlink" else arguments[: _PATHS[event]]:
            if not isinstance(path, int):
                _note("writes", os.path.join(os.getcwd(), _text(path)))
    elif event in _STARTS:
        _note("starts", *arguments[:1])
    elif event in _CONNECTS:
        _note("connects", event, *arguments)

sys.addaudithook(_hook)
"""
# Not by Python's audit hooks alone: what torch and Triton write in other languages is found where it lies.
QUIET = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "SEQCORE_BACKEND": ""}


@dataclass
class Session:
    """What processes did: the paths that they wrote to, the programs that they started, what they connected to."""

    printed: str
    writes: list[Path]
    starts: list[str]
    connects: list[list[str]]

    def writes_outside(self, *folders: Path) -> list[Path]:
        """Those paths that are below none of ``folders``."""
        allowed = [folder.resolve() for folder in (*folders, Path(os.devnull))]
        paths = {Path(os.path.realpath(path)) for path in self.writes}
        return sorted(path for path in paths if not any(path.is_relative_to(folder) for folder in allowed))


def audited(script: str, folder: Path, paths: list[Path], **variables: str) -> Session:
    """Run a script in the empty ``folder``/work, with a home, a temporary folder and caches of its own beside it.

    ``paths`` is where modules are found before all others.
    """
    hook, log = folder / "hook", folder / "audit.jsonl"
    for name in ("hook", "work", "home", "tmp", "cache", "triton", "out"):
        (folder / name).mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(SITECUSTOMIZE)
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (hook, *paths))), "AUDIT_LOG": log, "HOME": folder / "home",
        "TMPDIR": folder / "tmp", "SEQCORE_CACHE": folder / "cache", "TRITON_HOME": folder / "triton",
        "TRITON_CACHE_DIR": folder / "triton", "OUT": folder / "out",
    }  # fmt: skip
    unset = ("TRITON_INTERPRET", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: str(value) for name, value in own.items()} | QUIET | variables
    command, work = [sys.executable, "-c", script], folder / "work"
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    of = lambda kind: [values for its, *values in entries if its == kind]
    return Session(
        done.stdout, [Path(path) for (path,) in of("writes")], [values[0] for values in of("starts")], of("connects")
    )
