"""The problems that matter most, profiled into one file: ``python -m benchmarks.stages.run_profiles --out FILE``.

The file is itself a Chrome trace ("traceEvents"), in which each problem has processes of its own and all begin at 0;
"profiles" holds what else ``seqcore.profiling.profile`` finds, "failed" which problems it could not profile and why,
"machine" on what. With a journal a problem that was finished before is not profiled again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from seqcore.files import write_whole
from seqcore.journal import Journal
from seqcore.profiling import Attention, Recurrence, profile
from seqcore.profiling.problems import PASSES, Problem

REPEATS = 2
# Of all events together, as text.
MOST_BYTES = 8 * 2**20
# Room for one problem's processes.
PROCESSES = 1000


def problems(tiny: bool) -> list[Problem]:
    """The most valuable first: a budget of time that runs out cuts the tail."""
    return list(_tiny() if tiny else _gpu())


def _gpu() -> Iterable[Problem]:
    for op, dtype, pass_ in product(("lstm", "gru"), ("bfloat16", "float16"), PASSES):
        yield Recurrence(op, T=1024, B=16, H=768, dtype=dtype, backend="triton", pass_=pass_)
    for pass_ in PASSES:
        yield Recurrence("lstm", T=1024, B=64, H=1024, dtype="bfloat16", backend="triton", pass_=pass_)
    long = Attention(B=1, H=16, M=16384, D=128, causal=True, dtype="bfloat16", backend="triton")
    yield from (replace(long, pass_=pass_) for pass_ in PASSES)
    yield Attention(B=16, H=32, H_kv=8, M=1, N=65536, D=128, dtype="bfloat16", backend="triton")


def _tiny() -> Iterable[Problem]:
    for op, pass_ in product(("lstm", "gru"), PASSES):
        yield Recurrence(op, T=4, B=2, H=8, pass_=pass_)
    for pass_ in PASSES:
        yield Attention(B=1, H=2, M=16, D=8, causal=True, pass_=pass_)
    yield Attention(B=2, H=4, H_kv=2, M=1, N=64, D=8)


def beside_others(events: list[dict[str, Any]], number: int, label: str) -> list[dict[str, Any]]:
    """A problem's events as they can stand in one trace with those of others, which have other numbers."""
    processes: dict[str, int] = {}
    begin = min((event["ts"] for event in events if event.get("ph") == "X"), default=0)
    moved = []
    for event in events:
        pid = processes.setdefault(str(event.get("pid")), PROCESSES * number + len(processes))
        event = event | {"pid": pid}
        if "ts" in event:
            event["ts"] = max(event["ts"] - begin, 0)
        if "id" in event:
            event["id"] = f"{number}.{event['id']}"
        if event.get("name") == "process_name":
            event["args"] = {"name": f"{label}: {event['args']['name']}"}
        if event.get("name") == "process_sort_index":
            event["args"] = {"sort_index": pid}
        moved.append(event)
    return moved


def merged(found: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One trace of all profiles, and the profiles without theirs; one too large for its share is left out."""
    events, profiles = [], []
    for number, one in enumerate(found):
        own = beside_others(one["trace_events"], number, one["label"])
        one = {name: value for name, value in one.items() if name not in ("trace_events", "files")}
        if len(json.dumps(own)) > MOST_BYTES / len(found):
            one["notes"] = [*one["notes"], f"no trace: its {len(own)} events are too many for one file"]
        else:
            events += own
        profiles.append(one)
    return events, profiles


def write(out: Path, found: list[dict[str, Any]], failed: list[dict[str, str]], left: int, machine: dict) -> None:
    """After each problem, since whoever runs this may be cut short at any moment."""
    events, profiles = merged(found)
    whole = {"traceEvents": events, "profiles": profiles, "failed": failed, "left": left, "machine": machine}
    write_whole(out, json.dumps(whole))


def main(arguments: list[str] | None = None) -> int:
    prog = "python -m benchmarks.stages.run_profiles"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="the same path on a CPU, at tiny sizes")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="what was finished before, and will be")
    parser.add_argument("--key", default="", help="what results depend on; others' are not taken from the journal")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no problem after these")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is False. Use --tiny to try the path on a CPU.", file=sys.stderr)
        return 2

    begin = time.monotonic()
    journal = Journal(options.journal, options.key, "profile") if options.journal else None
    machine = environment("cpu" if options.tiny else "cuda")
    chosen = problems(options.tiny)
    done: dict[str, dict[str, Any]] = {}
    failed = []
    for problem in journal.suspects_last(chosen, lambda problem: problem.label) if journal else chosen:
        name = problem.label
        if journal and name in journal:
            done[name] = journal.done[name]
        elif time.monotonic() - begin < options.seconds:
            print(name, flush=True)
            if journal:
                journal.begin(name)
            try:
                done[name] = profile(problem, REPEATS)
            except Exception as error:
                print(f"  failed: {error!r}", flush=True)
                failed.append({"label": name, "error": repr(error)})
            else:
                if journal:
                    journal.add(name, done[name])
        left = len(chosen) - len(done) - len(failed)
        write(options.out, [done[p.label] for p in chosen if p.label in done], failed, left, machine)
    print(f"{len(done)} of {len(chosen)} problems profiled, {len(failed)} failed; in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
