"""The ledger: only a whole run on a GPU with today's sources verifies a kernel, and README says what results say."""

import json

import pytest

from seqcore.info import kernel_hashes

from .benchmark_modules import ROOT, load, needs_pytest_benchmark

needs_pytest_benchmark()
ledger, readme = load("ledger"), load("readme")

FORWARD = "recurrence_forward_kernel"
GPU = "NVIDIA H200"


def verify_file(folder, ok=True, left=(), interpreter=False, multiprocessors=132, **hashes):
    info = {"device": GPU, "multiprocessors": multiprocessors, "interpreter": interpreter}
    info["kernels"] = kernel_hashes() | hashes
    rows = [{"kernel": FORWARD, "dtype": "bfloat16", "ok": True}, {"kernel": FORWARD, "dtype": "float32", "ok": ok}]
    path = folder / "2026-01-02-abc-verify.json"
    path.write_text(json.dumps({"info": info, "left": left, "rows": rows}))


def bench_file(path, **machine):
    machine = {"gpu": GPU, "commit": "abcdef0123456789-dirty", "torch": "2.11", "kernels": kernel_hashes()} | machine
    timed = {"ms_p50": 0.5, "ms_p20": 0.5, "ms_p80": 0.5, "dtype": "bfloat16", "pass": "forward"}
    row = timed | {"suite": "recurrence", "op": "lstm", "shape": {"T": 8, "B": 2}, "best_peer": "loop", "ratio": 0.4}
    row["peers"] = {"torch.nn": 1.5, "loop": 0.2}
    floor = timed | {"suite": "floors", "op": "barrier", "shape": {"programs": 8}}
    found = {"datetime": "2026-01-02T03:04:05", "seqcore": {"machine": machine}}
    rows = (row, row | {"peers": {"torch.nn": 0.5}}, floor)
    found["benchmarks"] = [{"extra_info": row} for row in rows]
    path.write_text(json.dumps(found))


def profile_file(folder, **machine):
    kernels = [{"name": FORWARD, "ms": ms, "flops": 1, "bytes": 1} for ms in (1.25, 0.5)]
    profile = {"op": "lstm", "shape": {"T": 8}, "dtype": "bfloat16", "pass": "forward", "kernels": kernels}
    machine = {"gpu": GPU, "kernels": kernel_hashes()} | machine
    (folder / "2026-01-03-abc-profile.json").write_text(json.dumps({"profiles": [profile], "machine": machine}))


def entry(folder, kernel=FORWARD):
    return next(entry for entry in ledger.ledger(folder) if entry.kernel == kernel)


def test_a_run_with_todays_sources_verifies(tmp_path):
    verify_file(tmp_path)
    assert entry(tmp_path).verified == f"{GPU}, 2026-01-02 (bfloat16, float32)"
    assert entry(tmp_path, "recurrence_backward_kernel").verified is None
    verify_file(tmp_path, left=["recurrence_backward_kernel"])
    assert entry(tmp_path).verified


@pytest.mark.parametrize(
    "spoiled",
    [
        {"ok": False}, {"left": [FORWARD]}, {"interpreter": True}, {"multiprocessors": None}, {"grid.py": "another"},
        {"recurrence/forward.py": "another"},
    ],
    ids=str,
)  # fmt: skip
def test_other_runs_do_not(tmp_path, spoiled):
    verify_file(tmp_path, **spoiled)
    assert entry(tmp_path).verified is None


def test_a_change_elsewhere_does_not_matter(tmp_path):
    verify_file(tmp_path, **{"attention/forward.py": "another", "work.py": "another"})
    assert entry(tmp_path).verified


def test_a_profile_times_and_so_does_a_floor(tmp_path):
    profile_file(tmp_path)
    bench_file(tmp_path / "2026-01-02-abc.json")
    assert entry(tmp_path).timed == f"1.25 ms in lstm forward bfloat16 T=8 ({GPU}, 2026-01-03)"
    assert entry(tmp_path, "barrier_kernel").timed == f"0.5 ms in barrier programs=8 ({GPU}, 2026-01-02)"
    assert entry(tmp_path).verified is None


def test_times_of_other_sources_and_of_a_cpu_do_not_count(tmp_path):
    profile_file(tmp_path, kernels={**kernel_hashes(), "grid.py": "another"})
    assert entry(tmp_path).timed is None
    profile_file(tmp_path, gpu=None)
    assert entry(tmp_path).timed is None


def test_sources_are_followed_through_imports():
    assert {"grid.py", "recurrence/layout.py", "recurrence/products.py"} <= ledger.sources("recurrence/forward.py")
    assert "attention/scores.py" not in ledger.sources("recurrence/forward.py")


def test_every_kernel_is_listed_with_its_source(capsys):
    assert ledger.main([]) == 0
    printed = capsys.readouterr().out
    names = ledger.kernels()
    assert FORWARD in names
    for name, file in names.items():
        assert f"{ledger.source_hash(file)}  " in next(line for line in printed.splitlines() if line.startswith(name))


def test_an_unreadable_result_is_named(tmp_path):
    (tmp_path / "2026-01-02-torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn\.json is not JSON"):
        ledger.ledger(tmp_path)


def test_results_of_a_campaign_are_taken(tmp_path):
    campaign, results = tmp_path / "campaign", tmp_path / "results"
    campaign.mkdir()
    bench_file(campaign / "bench.json")
    (campaign / "profile.json").write_text("{}")
    taken = [path.relative_to(results).as_posix() for path in ledger.take(campaign, results)]
    assert taken == [f"nvidia-h200/2026-01-02-abcdef0123-dirty{part}.json" for part in ("", "-profile")]


def test_results_of_a_cpu_are_not_taken(tmp_path):
    with pytest.raises(ValueError, match="holds none of"):
        ledger.take(tmp_path, tmp_path / "results")
    bench_file(tmp_path / "bench.json", gpu=None)
    with pytest.raises(ValueError, match="nothing measured on a GPU"):
        ledger.take(tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_readme_says_what_was_measured_and_what_was_not(tmp_path):
    assert "Not measured on a GPU yet" in readme.section(tmp_path)
    bench_file(tmp_path / "2026-01-02-abc.json")
    said = readme.section(tmp_path)
    assert "Not measured" not in said and f"**{GPU}**, 2026-01-02, commit abcdef0123" in said
    # 3 and 1 times as fast as torch.nn, whoever else was faster.
    line = next(line for line in said.splitlines() if line.startswith("| lstm"))
    assert [cell.strip() for cell in line.split("|")[5:-1]] == ["2", "1.73", "1.00", "3.00"]
    bench_file(tmp_path / "2026-01-02-abc.json", kernels={**kernel_hashes(), "grid.py": "another"})
    assert "since then floors.py" in readme.section(tmp_path)


def test_the_repositorys_readme_is_current(monkeypatch, capsys, tmp_path):
    assert readme.is_current(), "run `python -m benchmarks.readme`"
    spoiled = tmp_path / "README.md"
    spoiled.write_text((ROOT / "README.md").read_text().replace("Not measured on a GPU yet", "Twice as fast"))
    assert not readme.is_current(spoiled)
    monkeypatch.setattr(readme, "is_current", lambda: False)
    assert ledger.main(["--check"]) == 1
    assert "python -m benchmarks.readme" in capsys.readouterr().err
    readme.write(spoiled)
    assert spoiled.read_text() == (ROOT / "README.md").read_text()
