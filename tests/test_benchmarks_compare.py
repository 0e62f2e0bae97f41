"""Two runs side by side: what is slower is flagged, what only the machine did is not."""

import json
import re
from pathlib import Path

import pytest

from .benchmark_modules import load, needs_pytest_benchmark, not_interpreted, run_python

needs_pytest_benchmark()
not_interpreted()

compare = load("compare")
MACHINE = {"gpu": "some GPU", "cpu": "a CPU", "torch": "2.13.0", "triton": "3.7.1", "driver": "1", "commit": "a"}


def row(H: int, ours: float, peers: dict[str, float], spread: float = 0.02, **more) -> dict:
    """As it stands in the JSON: times in ms, ours within the spread from round to round, and so the ratios."""
    best = min(peers, key=peers.__getitem__, default=None)
    ratio = peers[best] / ours if best else None
    times = {"ms_p20": ours * (1 - spread), "ms_p50": ours, "ms_p80": ours * (1 + spread)}
    ratios = {"ratio_p20": ratio and ratio * (1 - spread), "ratio_p80": ratio and ratio * (1 + spread)}
    info = {"suite": "recurrence", "op": "lstm", "pass": "forward", "dtype": "bfloat16", "sweep": "grid"}
    info |= {"shape": {"T": 512, "B": 16, "H": H}, "peers": peers, "best_peer": best, "ratio": ratio}
    return {"name": f"test_recurrence[{H}]", "extra_info": {**info, **times, **ratios, **more}}


def run(path: Path, *rows: dict, not_measured: tuple[dict, ...] = (), **machine) -> Path:
    ours = {"machine": MACHINE | machine, "not_measured": list(not_measured)}
    path.write_text(json.dumps({"benchmarks": rows, "seqcore": ours, "datetime": "today"}))
    return path


def compared(tmp_path: Path, before: list[dict], after: list[dict], *options: str, **more) -> tuple[int, str]:
    a, b, out = run(tmp_path / "a.json", *before), run(tmp_path / "b.json", *after, **more), tmp_path / "out.md"
    status = compare.main([str(a), str(b), "--out", str(out), *options])
    return status, out.read_text() if out.exists() else ""


TORCH = {"torch.nn": 2.0}
BEFORE = [row(256, 1.0, TORCH), row(512, 1.0, TORCH), row(768, 1.0, TORCH)]


def test_a_slower_row_is_flagged(tmp_path):
    status, text = compared(tmp_path, BEFORE, [row(256, 1.0, TORCH), row(512, 1.3, TORCH), row(768, 0.8, TORCH)])
    assert status == 1
    assert "geometric mean of 3 rows in both: **1.013** (recurrence 1.013). Beyond 5 %: 1 slower, 1 faster" in text
    lines = [line for line in text.splitlines() if line.startswith("| recurrence")]
    assert "H = 512" in lines[0] and " slower | +30.0 %" in lines[0]
    assert "H = 768" in lines[1] and " faster | -20.0 %" in lines[1]
    assert len(lines) == 2 and "Same machine, same versions." in text


def test_a_faster_row_is_no_failure(tmp_path):
    assert compared(tmp_path, BEFORE, [row(512, 0.5, TORCH)])[0] == 0


def test_a_slower_machine_is_not_a_slower_commit(tmp_path):
    after = [row(H, 1.4, {"torch.nn": 2.8}) for H in (256, 512, 768)]
    status, text = compared(tmp_path, BEFORE, after)
    assert status == 0 and "3 same" in text
    # A peer out of this checkout slows with it, and excuses nothing.
    own = lambda ours, its: [row(256, ours, {"reference": its})]
    status, text = compared(tmp_path, own(1.0, 2.0), own(1.4, 2.8))
    assert status == 1 and "+40.0 % |         1 |      1.4 |        ms |" in text


def test_what_the_spread_explains_is_unclear(tmp_path):
    noisy = lambda ours: [row(512, ours, TORCH, spread=0.2)]
    status, text = compared(tmp_path, noisy(1.0), noisy(1.3))
    assert status == 0 and "1 unclear" in text and "| unclear | +30.0 %" in text
    assert compared(tmp_path, noisy(1.0), noisy(1.6))[0] == 1


def test_what_disturbs_ours_and_its_peer_alike_is_no_spread(tmp_path):
    disturbed = lambda ours: [row(512, ours, TORCH, ms_p20=0.5 * ours, ms_p80=3 * ours)]
    assert compared(tmp_path, disturbed(1.0), disturbed(1.3))[0] == 1


def test_the_threshold_is_the_callers(tmp_path):
    after = [row(512, 1.3, TORCH)]
    assert [compared(tmp_path, BEFORE, after, "--threshold", text)[0] for text in ("40%", "0.4", "20%")] == [0, 0, 1]
    with pytest.raises(SystemExit):
        compare.main(["a", "b", "--threshold", "-5%"])


def test_rows_are_told_apart_by_all_that_distinguishes_them(tmp_path):
    status, text = compared(tmp_path, [row(512, 1.0, TORCH)], [row(512, 9.0, TORCH, causal=True), row(512, 1.0, TORCH)])
    assert status == 0 and "## Only after\n\n- test_recurrence[512]" in text


def test_a_row_that_lost_its_time_is_flagged(tmp_path):
    lost = {"name": "test_recurrence[512]", "outcome": "failed", "reason": "beyond the error budget"}
    status, text = compared(tmp_path, BEFORE, BEFORE[:1], not_measured=(lost,))
    assert status == 1
    assert "## Lost their time\n\n- test_recurrence[512]: failed, beyond the error budget" in text
    assert "## Only before\n\n- test_recurrence[768]" in text
    late = lost | {"outcome": "skipped", "reason": "out of time: the 300 s up to here are spent"}
    assert compared(tmp_path, BEFORE, BEFORE[:1], not_measured=(late,))[0] == 0


def test_what_cannot_be_compared_is_not(tmp_path, capsys):
    assert compared(tmp_path, BEFORE, BEFORE, gpu="another")[0] == 2
    assert "gpu was some GPU, is another; --force" in capsys.readouterr().err
    status, text = compared(tmp_path, BEFORE, BEFORE, "--force", gpu="another")
    assert status == 0 and "**Not the same conditions: gpu was some GPU, is another.**" in text
    assert "**Not the same conditions: torch was 2.13.0, is 3.**" in compared(tmp_path, BEFORE, BEFORE, torch="3")[1]
    assert compared(tmp_path, BEFORE, [row(1024, 1.0, TORCH)])[0] == 2
    assert compared(tmp_path, BEFORE, [])[0] == 2
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text("{}")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "other.json")]) == 2


# Ours waits at every call, as a slower commit would; its peers do not.
SLOWED = """
import sys, time
from benchmarks import __main__, layers

timed = layers.Layer.__call__

def slower(self, x):
    time.sleep(0.005 if getattr(self.module, "backend", None) == "auto" else 0)
    return timed(self, x)

layers.Layer.__call__ = slower
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_deliberately_slower_commit_is_flagged(tmp_path):
    files = [tmp_path / name / "bench.json" for name in ("before", "after")]
    for code, file in zip((["-m", "benchmarks"], ["-c", SLOWED]), files, strict=True):
        run_python(*code, "--suite", "recurrence", "--sizes", "tiny", "--no-plots", "--out", str(file.parent))
    out = tmp_path / "changes.md"
    # Twice as long, at least: what other programs do to such short times is less.
    assert compare.main([*map(str, files), "--threshold", "100%", "--out", str(out)]) == 1
    # Of so many rows one may be unclear.
    assert re.search(r"^\| recurrence LSTM forward float32 length: .* \|\s+slower \|", out.read_text(), re.MULTILINE)
