"""``seqcore verify``"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from .. import info
from ..backends import INTERPRETED
from . import STOPPED

HELP = "numerics of every kernel against float64, on this machine's device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--all", action="store_true", help="print every row, not one line a kernel and dtype")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this: lstm, D=128")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="go on from what stands here, and add to it")


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available() and not INTERPRETED:
        print("No GPU here: the kernels run interpreted on the CPU, at small sizes.", flush=True)
        command = [sys.executable, "-m", "seqcore", *options.arguments]
        return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})

    from ..journal import Journal
    from ..testing import verify

    device = torch.device("cpu" if INTERPRETED else "cuda")
    journal = Journal(options.journal, info.identity(), "verify") if options.journal else None
    rows, complete, stopped = [], False, True
    # Interrupted, or by a kernel that broke the device, what is known so far is worth telling.
    try:
        for row in verify.verify(device, options.case, journal):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} results, now {row.case[:90]:<90}", end="", file=sys.stderr, flush=True)
        complete, stopped = not options.case, False
    except (KeyboardInterrupt, RuntimeError):
        traceback.print_exc()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _print_table(rows, every_row=options.all)
    if options.out:
        gathered = info.gather()
        gathered["kernels"] = info.kernel_hashes()
        gathered.pop("backends")
        found = {"info": gathered, "complete": complete, "rows": verify.as_json(rows)}
        options.out.write_text(json.dumps(found, indent=1))
    if stopped:
        return STOPPED
    if not rows:
        print(f"no case is called *{options.case}*", file=sys.stderr)
    return 0 if rows and all(row.ok for row in rows) else 1


def _print_table(rows: list, every_row: bool) -> None:
    """The worst row of each kernel and dtype, or all of them; error as a share of what is allowed."""
    groups: dict[tuple, list] = {}
    for row in rows:
        key = (row.kernel, row.dtype, row.case, row.quantity) if every_row else (row.kernel, row.dtype)
        groups.setdefault(key, []).append(row)
    print(f"{'kernel':<62} {'dtype':<9} {'results':>7} {'worst error / allowed':>22}   worst case")
    for (kernel, dtype, *_), members in groups.items():
        worst = max(members, key=lambda row: (not row.ok, row.max_error / row.max_allowed if row.max_allowed else 0.0))
        share = f"{worst.max_error:.2e} / {worst.max_allowed:.2e}"
        verdict = "ok  " if all(row.ok for row in members) else "FAIL"
        note = "" if all(row.repeatable for row in members) else " (not repeatable)"
        print(f"{kernel:<62} {dtype:<9} {len(members):>7} {share:>22} {verdict} {worst.quantity} of {worst.case}{note}")
    failed = sum(not row.ok for row in rows)
    print(f"{len(rows)} results, {failed} outside the error budget or not repeatable")
