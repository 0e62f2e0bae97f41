"""The campaign: its bookkeeping, what it does with stages that fail, hang or are cut short, and all of it, tiny."""

import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqcore.journal import Journal

from .benchmark_modules import ROOT, load, needs_pytest_benchmark, not_interpreted, run_python, start_python

needs_pytest_benchmark()
not_interpreted()

campaign, importable, stages = load("campaign"), load("stages.importable"), load("stages.definitions")
sanitizer = load("stages.run_sanitizer")


def fake_stage(folder: Path, code: str, limit_s: float = 60.0, left: bool = False):
    """A stage that runs ``code`` and notes each run as something finished, and how often it ran."""
    journal = folder / "journal.jsonl"
    # By hand: importing seqcore, and torch with it, takes seconds.
    note = f"import json; f = open({str(journal)!r}, 'a+'); f.seek(0); runs = f.read().count('fake')\n"
    note += "f.write(json.dumps({'key': 'key', 'kind': 'fake', 'name': str(runs), 'value': 1}) + chr(10)); f.close()"
    command = [sys.executable, "-c", f"{note}\n{code}"]
    stage = stages.Stage("fake", command, limit_s, lambda: ("words", left), lambda kind, name: kind == "fake", journal)
    return stage, lambda: len(Journal(journal, "key", "fake").done)


def new_campaign(folder: Path, key: str = "key"):
    return campaign.Campaign(folder, key, dict(os.environ))


def test_a_stage_that_passed_is_not_run_again(tmp_path):
    stage, runs = fake_stage(tmp_path, "print('done')")
    assert new_campaign(tmp_path).run(stage).status == "passed"
    assert new_campaign(tmp_path).run(stage).last_lines == ["done"]
    assert runs() == 1
    new_campaign(tmp_path, key="other sources").run(stage)
    assert runs() == 2


def test_what_is_forgotten_is_run_again(tmp_path):
    stage, runs = fake_stage(tmp_path, "")
    new_campaign(tmp_path).run(stage)
    stage.forget()
    assert runs() == 0
    assert new_campaign(tmp_path).run(stage).status == "passed"
    assert runs() == 1


@pytest.mark.parametrize("code, status, left", [("raise SystemExit(1)", "failed", False), ("", "partly", True)])
def test_a_stage_that_is_not_done_is_run_again(tmp_path, code, status, left):
    stage, runs = fake_stage(tmp_path, code, left=left)
    assert new_campaign(tmp_path).run(stage).status == status
    assert new_campaign(tmp_path).run(stage).status == status
    assert runs() == 2


def test_a_crash_is_begun_again_as_long_as_it_gets_further(tmp_path, capsys):
    stage, runs = fake_stage(tmp_path, "import os; os.abort() if runs < 2 else None")
    outcome = new_campaign(tmp_path).run(stage)
    assert (outcome.status, runs()) == ("passed", 3)
    assert "stopped with status -6, 1 finished; going on" in capsys.readouterr().out


def test_a_crash_that_gets_no_further_is_the_end(tmp_path):
    stage, _ = fake_stage(tmp_path, "")
    outcome = new_campaign(tmp_path).run(replace(stage, command=[sys.executable, "-c", "import os; os.abort()"]))
    assert (outcome.status, outcome.exit_status) == ("failed", -signal.SIGABRT)


HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


@pytest.mark.parametrize("always, status", [(True, "hung"), (False, "passed")])
def test_a_stage_that_hangs_is_begun_again_as_long_as_it_gets_further(tmp_path, monkeypatch, always, status):
    for name, seconds in (("GRACE_SECONDS", 0.2), ("TELL_SECONDS", 0.5)):
        monkeypatch.setattr(campaign, name, seconds)
    stage, runs = fake_stage(tmp_path, f"if {always} or runs == 0: {HANGS}")
    if always:
        # And finishes nothing more from the second time on.
        stage.command[2] = stage.command[2].replace("f.write", "runs < 1 and f.write")
    assert new_campaign(tmp_path).run(replace(stage, patience_s=1.5)).status == status
    assert runs() == (1 if always else 2)


def test_a_stage_past_its_limit_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "GRACE_SECONDS", 0.5)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    code += f"open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid))\np.wait()"
    stage, _ = fake_stage(tmp_path, code, limit_s=2.0)
    begin = time.monotonic()
    assert new_campaign(tmp_path).run(stage).status == "overran"
    assert time.monotonic() - begin < 20
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("heard", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background"])
def test_a_stage_past_its_limit_may_write_what_it_has(tmp_path, heard):
    result = tmp_path / "partial"
    code = f"import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  open({str(result)!r}, 'w').write('half')"
    # Longer where a process is so slow to begin that it is interrupted before it has.
    for limit_s in (1.0, 5.0, 25.0):
        stage, _ = fake_stage(tmp_path, code, limit_s=limit_s)
        before = signal.signal(signal.SIGINT, heard)
        try:
            assert new_campaign(tmp_path).run(stage).status == "overran"
        finally:
            signal.signal(signal.SIGINT, before)
        if result.exists():
            break
    assert result.read_text() == "half"


def test_an_older_result_is_not_taken_for_a_new_one(tmp_path):
    stage, _ = fake_stage(tmp_path, "")
    old = tmp_path / "verify.json"
    old.write_text("{}")
    new_campaign(tmp_path).run(replace(stage, written=old))
    assert not old.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_campaign_stops(tmp_path, capsys):
    assert campaign.main(["--out", str(tmp_path)]) == 2
    assert "--tiny" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_every_suite_has_a_stage_and_every_stage_ends_within_nine_minutes(tmp_path):
    found = stages.stages(tmp_path, "key", tiny=False)
    commands = [" ".join(stage.command) for stage in found]
    for suite in load("__main__").SUITES:
        assert sum(f" {suite} " in f"{command} " and "benchmarks --suite" in command for command in commands) == 1
        assert any(stage.owns("benchmark", f"benchmarks/test_{suite}.py::test[case]") for stage in found)
    assert all(stage.limit_s + campaign.GRACE_SECONDS < 560 for stage in found)
    assert all(campaign.TELL_SECONDS < stage.patience_s < stage.limit_s or stage.limit_s < 300 for stage in found)


def test_linked_package_has_its_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(importable.tempfile, "tempdir", str(tmp_path))
    folder = importable.linked_package()
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    code = "import seqcore, seqcore.kernels; print(seqcore.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(folder))


def test_a_checkout_that_is_not_installed_can_begin_a_campaign():
    # Without what an editable installation adds to find its parts.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
    code += f"sys.path.insert(0, {str(ROOT)!r}); import benchmarks.campaign, seqcore.kernels as k; print(k.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).resolve() == ROOT / "kernels" / "__init__.py"


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and how many pictures it would draw."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.pictures = [], 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        self.fetched += [found["src"]] if "src" in found else [found["href"]] if tag == "link" else []
        self.pictures += tag == "figure"


def test_the_whole_campaign_tiny(tmp_path):
    out = tmp_path / "campaign"
    printed = run_python("-m", "benchmarks.campaign", "--tiny", "--out", str(out))
    table = printed.rpartition("result\n")[2]
    ended = dict.fromkeys(("tests", "verify", "sanitize", "floors", "bench", "tune", "profile", "models"), "passed")
    if not sanitizer.find_program():
        ended["sanitize"] = "partly"
    assert [line.split()[:2] for line in table.splitlines()] == [[*pair] for pair in ended.items()]
    names = {path.name for path in out.iterdir()}
    assert names == {
        "journal.jsonl", "campaign.log", "verify.json", "bench.json", "tuned.json", "profile.json", "report.md",
        "report.html",
    }  # fmt: skip
    measured = json.loads((out / "bench.json").read_text())
    suites = {entry["extra_info"]["suite"] for entry in measured["benchmarks"]}
    assert suites == {"recurrence", "attention", "bottleneck", "models"}
    page = Page((out / "report.html").read_text())
    assert page.pictures >= 6 and not page.fetched
    again = run_python("-m", "benchmarks.campaign", "--tiny", "--out", str(out))
    assert again.count("passed before") == sum(status == "passed" for status in ended.values())


def begun(out: Path) -> tuple[tuple[str, ...], subprocess.Popen, list[int]]:
    """A campaign that is measuring: its command, its process, and those of its stage."""
    command = ("-m", "benchmarks.campaign", "--tiny", "--stage", "bench", "--out", str(out))
    process, journal = start_python(*command), out / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_text().count('"row"') < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return command, process, [int(pid) for pid in found.stdout.split()]


def test_a_killed_stage_loses_nothing_finished(tmp_path):
    command, first, stage_processes = begun(tmp_path)
    first.kill()
    first.communicate()
    for pid in stage_processes:
        # Else it may have come to its end before all that follows.
        os.kill(pid, signal.SIGSTOP)
    again = start_python(*command)
    printed, _ = again.communicate()
    assert again.returncode == 2 and "a stage of one" in printed, "what outlives its campaign still writes"
    for pid in stage_processes:
        os.kill(pid, signal.SIGKILL)
    while any(map(alive, stage_processes)):
        time.sleep(0.05)
    before = rows(tmp_path / "journal.jsonl")
    assert before and not (tmp_path / "bench.json").exists()
    run_python(*command)
    after = {entry["fullname"]: entry for entry in json.loads((tmp_path / "bench.json").read_text())["benchmarks"]}
    assert len(after) > len(before)
    assert all(after[name]["stats"] == row["stats"] for name, row in before.items()), "what was timed is timed again"


def test_a_campaign_that_is_ended_ends_its_stage_and_says_so(tmp_path):
    _, process, stage_processes = begun(tmp_path)
    process.terminate()
    printed, _ = process.communicate()
    assert process.returncode == campaign.INTERRUPTED
    assert "the same command goes on from here" in printed and "Traceback" not in printed
    assert not any(map(alive, stage_processes))


def rows(journal: Path) -> dict[str, dict]:
    found = (json.loads(line) for line in journal.read_text().splitlines())
    measured = (entry["value"] for entry in found if entry["kind"] == "benchmark" and "value" in entry)
    return {entry["row"]["fullname"]: entry["row"] for entry in measured if "row" in entry}
