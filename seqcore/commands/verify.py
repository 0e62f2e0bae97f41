"""``seqcore verify``"""

import argparse
import contextlib
import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from .. import info
from ..devices import INTERPRETED
from ..errors import InvalidInput
from ..files import replaceable, write_whole
from ..testing.shares import Share, run_shares
from . import STOPPED, interpreted

HELP = "numerics of every kernel against float64, on this machine's device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--all", action="store_true", help="print every row, not one line a kernel and dtype")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this: lstm, D=128")
    parser.add_argument("--guarded", action="store_true", help="run each case also with its tensors in guard bands")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="go on from what stands here, and add to it")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work, most of it compiling")
    parser.add_argument("--share", type=Share.parse, help="only this part of the work, like 0/4; needs --journal")


def run(options: argparse.Namespace) -> int:
    if options.share is not None and options.journal is None:
        raise InvalidInput("--share needs --journal FILE, where the results of all shares are put together")
    if options.out is not None:
        replaceable(options.out).parent.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available() and not INTERPRETED:
        print("No GPU here: the kernels run interpreted on the CPU, at small sizes.", flush=True)
        return interpreted(options.arguments)

    with contextlib.ExitStack() as stack:
        if options.jobs > 1 and options.journal is None:
            options.journal = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "journal.jsonl"
        return _verify(options)


def _verify(options: argparse.Namespace) -> int:
    from ..journal import Journal, lines
    from ..testing import verify

    device = torch.device("cpu" if INTERPRETED else "cuda")
    kind = "verify guarded" if options.guarded else "verify"
    rows, stopped, journal = [], True, None
    if options.journal:
        # One that is none, or cannot be written, is a mistake of the command's, and nothing has stopped.
        lines(options.journal)
        options.journal.parent.mkdir(parents=True, exist_ok=True)
        options.journal.open("ab").close()
    # Interrupted, or by a kernel that broke the device, what is known so far is worth telling.
    try:
        if options.jobs > 1:
            _share_out(options)
        # What a process left undone, for it crashed, is done here.
        journal = Journal(options.journal, info.identity(), kind) if options.journal else None
        for row in verify.verify(device, options.case, journal, options.share, options.guarded):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} results, now {row.case[:90]:<90}", end="", file=sys.stderr, flush=True)
        stopped = False
    except (KeyboardInterrupt, RuntimeError, OSError):
        traceback.print_exc()
    if options.share is not None:
        # Whoever shared the work out tells of it.
        return STOPPED if stopped else 0
    if stopped and options.journal is not None:
        rows = verify.finished(Journal(options.journal, info.identity(), kind))
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _print_table(rows, every_row=options.all)
    if options.out:
        gathered = info.gather()
        gathered["kernels"] = info.kernel_hashes()
        gathered.pop("backends")
        left = verify.kernels_left(device, rows) if stopped or options.case else []
        found = {"info": gathered, "left": left, "rows": verify.as_json(rows)}
        write_whole(options.out, json.dumps(found, indent=1))
    if stopped:
        return STOPPED
    if not rows:
        print(f"no case is called *{options.case}*", file=sys.stderr)
    return 0 if rows and all(row.ok for row in rows) else 1


def _share_out(options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "seqcore", "verify", "--journal", str(options.journal)]
    run_shares([*command, "--case", options.case, *["--guarded"] * options.guarded], options.jobs)


def _badness(row) -> tuple:
    return not row.ok, bool(row.error), row.max_error / row.max_allowed if row.max_allowed else 0.0


def _print_table(rows: list, every_row: bool) -> None:
    """The worst row of each kernel and dtype, or all of them; error as a share of what is allowed."""
    groups: dict[tuple, list] = {}
    for row in rows:
        key = (row.kernel, row.dtype, row.case, row.quantity) if every_row else (row.kernel, row.dtype)
        groups.setdefault(key, []).append(row)
    print(f"{'kernel':<62} {'dtype':<9} {'results':>7} {'worst error / allowed':>22}   worst case")
    for (kernel, dtype, *_), members in groups.items():
        worst = max(members, key=_badness)
        share = f"{worst.max_error:.2e} / {worst.max_allowed:.2e}"
        verdict = "ok  " if all(row.ok for row in members) else "FAIL"
        note = "" if all(row.repeatable for row in members) else " (not repeatable)"
        note = f" ({worst.error.splitlines()[0]})" if worst.error else note
        print(f"{kernel:<62} {dtype:<9} {len(members):>7} {share:>22} {verdict} {worst.quantity} of {worst.case}{note}")
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows)} results, {failed} outside the error budget or not repeatable")
