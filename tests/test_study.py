"""The study as a whole: every experiment at its smallest, runs that stop, fail or go on, and the report."""

import json
import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from .benchmark_modules import ROOT, load, not_interpreted, run_python, start_python

not_interpreted()
pytest.importorskip("matplotlib", reason="the study draws with matplotlib")

run, report, command, experiment = (load(f"study.{name}") for name in ("run", "report", "__main__", "experiment"))
NAMES = load("study.experiments").NAMES
# Those that take least, one of which is timed and so runs in the process itself.
QUICK = ("steps", "clipping")
TINY = ("-m", "benchmarks.study", *QUICK, "--sizes", "tiny", "--jobs", "1", "--out")


@pytest.fixture(scope="module", params=NAMES)
def measured(request):
    """An experiment, and its rows at the smallest sizes."""
    setting = run.SETTINGS["tiny"]
    tasks = run.tasks_of(request.param, setting)
    return load(f"study.experiments.{request.param}"), [run.measure(task, setting) for task in tasks]


def test_a_tiny_run_is_judged_drawn_and_tabled(measured):
    module, rows = measured
    sizes = module.SIZES["tiny"]
    assert len(rows) == len(module.cases(sizes)) > 1
    assert all(verdict.claim.endswith(".") and verdict.sentence.endswith(".") for verdict in module.verdicts(rows))
    figure, caption = module.draw(rows)
    figure.canvas.draw()
    assert figure.axes and caption.endswith(".")
    for table in module.table(rows).split("\n\n"):
        header, _, *lines = table.split("\n")
        assert lines
        assert {line.count("|") for line in lines} == {header.count("|")}
    assert module.how(sizes).endswith(".") and module.QUESTION.endswith("?")


def test_the_same_case_measures_the_same():
    setting = run.SETTINGS["tiny"]
    for name in ("memory", "initialisation", "dropout", "bottleneck"):
        task = run.tasks_of(name, setting)[0]
        first, again = (run.measure(task, setting) for _ in range(2))
        assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_for_every_machine(name):
    module = load(f"study.experiments.{name}")
    assert set(module.SIZES) == set(run.SETTINGS)
    for sizes in module.SIZES.values():
        cases = module.cases(sizes)
        assert len({run.Task(name, case).name for case in cases}) == len(cases)


# the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    out = tmp_path_factory.mktemp("study")
    return out, run_python(*TINY, str(out))


def test_the_command_writes_json_plots_and_a_page(finished):
    out, printed = finished
    for name in QUICK:
        data = json.loads((out / f"{name}.json").read_text())
        module = load(f"study.experiments.{name}")
        assert len(data["rows"]) == len(module.cases(module.SIZES["tiny"]))
        assert data["sizes"] == "tiny" and data["machine"]["torch"] and data["seconds"] > 0
        said = [(each["claim"], each["holds"], each["sentence"]) for each in data["verdicts"]]
        assert said == [(each.claim, each.holds, each.sentence) for each in module.verdicts(data["rows"])]
        assert (out / f"{name}.png").stat().st_size > 1000
        assert said[0][2] in printed
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert text.startswith("# What is taught") and "Not measured in this run: gradients" in text
    assert page.count("<svg ") == len(QUICK) and '<a href="clipping.json">clipping.json</a>' in page
    assert "[steps.json](steps.json)" in text and "<script" not in page


def test_verdicts_of_the_report_follow_the_data(finished, tmp_path):
    """What stands in a JSON file decides what the report says, not what was once said of it."""
    file = tmp_path / "clipping.json"
    data = json.loads((finished[0] / file.name).read_text())

    def verdict_if(free: float, bounded: float) -> str:
        for row in data["rows"]:
            row["loss"] = {"none": free, "norm": bounded}.get(row["clip"], 0.1)
        file.write_text(json.dumps(data))
        assert command.main(["--report", "--out", str(tmp_path)]) == 0
        text = (tmp_path / "report.md").read_text()
        return next(line for line in text.splitlines() if line.startswith("**") and "bounds the damage" in line)

    assert verdict_if(free=99.0, bounded=0.2).startswith("**✓")
    assert verdict_if(free=0.2, bounded=99.0).startswith("**✗")
    assert verdict_if(free=0.2, bounded=0.2).startswith("**?")


def test_a_stopped_run_goes_on(finished, tmp_path):
    out, _ = finished
    written = (out / command.JOURNAL).read_text().splitlines(keepends=True)
    lines = [line for line in written if '"value"' in line]
    (tmp_path / command.JOURNAL).write_text("".join(lines[:3]) + lines[3][:20])
    printed = run_python(*TINY, str(tmp_path), "--resume")
    assert f"3 of {len(lines)} cases were measured before." in printed
    kept = [json.loads(line)["value"] for line in lines[:3]]
    rows = [row for name in QUICK for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
    assert len(rows) == len(lines) and all(row in rows for row in kept)
    assert f"{len(lines)} of {len(lines)} cases" in run_python(*TINY, str(tmp_path), "--resume")


def test_a_failed_case_is_said_and_its_experiment_left_out(tmp_path, monkeypatch, capsys):
    steps, intensity = (load(f"study.experiments.{name}") for name in ("steps", "intensity"))
    whole = steps.measure
    monkeypatch.setattr(steps, "measure", lambda case, *rest: 1 / case["seed"] and whole(case, *rest))
    assert command.main(["steps", "intensity", "--sizes", "tiny", "--out", str(tmp_path)]) == 1
    assert "FAILED steps seed=0: ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "steps.json").exists() and (tmp_path / "intensity.json").exists()
    assert f"# {report.TITLE}" in (tmp_path / "report.md").read_text()
    # What no JSON holds is no result.
    monkeypatch.setattr(intensity, "measure", lambda *_: {"x": float("inf")})
    assert command.main(["intensity", "--sizes", "tiny", "--out", str(tmp_path / "none")]) == 1
    assert "Out of range float values" in capsys.readouterr().err


def workers(process) -> list[int]:
    """Processes that measure for it; multiprocessing's tracker of resources is none of them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def measuring(tmp_path):
    """A run of two processes that has measured something, and is not yet through."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc to find processes")
    process = start_python("-m", "benchmarks.study", "memory", "--sizes", "tiny", "--jobs", "2", "--out", str(tmp_path))
    assert process.stdout.readline().startswith("[1/")
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_dies_loses_nothing(measuring, tmp_path):
    os.kill(workers(measuring)[0], signal.SIGKILL)
    printed, _ = measuring.communicate()
    assert measuring.returncode == 0, printed
    assert "FAILED" not in printed and len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == 30


def test_processes_end_with_the_run_that_was_killed(measuring):
    of_it = workers(measuring)
    measuring.kill()
    measuring.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in of_it):
        assert time.monotonic() < end, "still there"
        time.sleep(0.1)


def test_what_kills_its_process_twice_is_given_up(tmp_path, monkeypatch):
    """The bookkeeping of deaths, with processes that are pretended."""
    tasks = run.tasks_of("memory", run.SETTINGS["tiny"])[:4]
    journal = run.Journal(tmp_path / "journal.jsonl", "key", run.KIND)

    def side_by_side(left, setting, journal, jobs):
        for task in left:
            journal.begin(task.name)
            if task == tasks[1]:
                return
            journal.add(task.name, {})
            yield task, {}

    monkeypatch.setattr(run, "_side_by_side", side_by_side)
    outcomes = {task.name: outcome for task, outcome in run.run(tasks, run.SETTINGS["tiny"], journal, 2)}
    assert len(outcomes) == 4 and "died, 2 times" in str(outcomes[tasks[1].name])
    assert [outcomes[task.name] for task in tasks if task != tasks[1]] == [{}] * 3


def test_interrupted_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    steps = load("study.experiments.steps")
    whole, asked = steps.measure, []

    def measure(case, *rest):
        if asked:
            raise KeyboardInterrupt
        asked.append(case)
        return whole(case, *rest)

    monkeypatch.setattr(steps, "measure", measure)
    arguments = ["steps", "--sizes", "tiny", "--out", str(tmp_path)]
    assert command.main(arguments) == 130
    assert "--resume goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "steps.json").exists()
    monkeypatch.setattr(steps, "measure", whole)
    assert command.main([*arguments, "--resume"]) == 0
    assert "1 of 2 cases were measured before." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["memroy"], "no experiment memroy; there are steps, gradients"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--sizes", "gpu"], "need a GPU"),
        (["--out", str(ROOT / "README.md" / "x")], "Not a directory"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert said in capsys.readouterr().err


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert command.main(["--report", "--out", str(tmp_path)]) == 1
    assert "make them with `python -m benchmarks.study`" in capsys.readouterr().err
    for text, said in (("{", "steps.json is not JSON"), ("{}", "steps.json lacks date, how, machine")):
        (tmp_path / "steps.json").write_text(text)
        assert command.main(["--report", "--out", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err


def test_rows_that_cannot_be_judged_leave_the_others_their_report(finished, tmp_path, capsys):
    for name in QUICK:
        data = json.loads((finished[0] / f"{name}.json").read_text())
        data["rows"] = [{"seed": 0}] if name == "steps" else data["rows"]
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert command.main(["--report", "--out", str(tmp_path)]) == 1
    assert "FAILED to report steps: KeyError" in capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    assert "**steps.json cannot be reported:** KeyError" in text and "## 1. Exploding gradients" in text


def test_an_experiment_measured_again_leaves_the_others_journal(finished, tmp_path):
    out, _ = finished
    journal = (out / command.JOURNAL).read_text()
    (tmp_path / command.JOURNAL).write_text(journal)
    assert command.main(["steps", "--sizes", "tiny", "--out", str(tmp_path)]) == 0
    kept = (tmp_path / command.JOURNAL).read_text()
    assert kept.count('"clipping ') == journal.count('"clipping ') > 0


def test_the_report_says_how_rows_came_about_not_how_they_would_today(finished, tmp_path):
    data = json.loads((finished[0] / "steps.json").read_text())
    assert data["parameters"]["B"] == load("study.experiments.steps").SIZES["tiny"].B
    (tmp_path / "steps.json").write_text(json.dumps({**data, "how": "By rolling dice."}))
    assert command.main(["--report", "--out", str(tmp_path)]) == 0
    assert "**How it was measured.** By rolling dice." in (tmp_path / "report.md").read_text()


# what verdicts rest on


def test_repeats_are_told_apart_where_chance_seldom_would():
    low, high, both = (experiment.spread(each) for each in ([1, 2, 3], [4, 5, 9], [2, 6, 0]))
    assert (high.median, high.low, high.high, high.repeats) == (5, 4, 9, 3)
    assert [experiment.order_of(a, b) for a, b in ((high, low), (low, high), (both, low))] == [True, False, None]
    # Two against two are parted by chance one time in three; of five one may lie among the others.
    assert experiment.order_of(experiment.spread([3, 4]), experiment.spread([1, 2])) is None
    assert experiment.order_of(experiment.spread([3, 4, 5, 6, 2.5]), experiment.spread([1, 2, 3.5, 0, 0.5])) is True
    assert experiment.order_of(experiment.spread([1, 1, 1]), experiment.spread([1, 1, 1])) is None
    # Many are judged by the normal distribution that the sum of ranks nears, few exactly.
    assert experiment.order_of(experiment.spread(range(5, 15)), experiment.spread(range(10))) is True
    assert experiment.order_of(experiment.spread(range(1, 11)), experiment.spread(range(10))) is None
    assert str(high) == "5 (4 to 9)" and str(experiment.spread([1.001, 1.002])) == "1"
    nothing = experiment.spread([None])
    assert str(nothing) == "nothing finite" and experiment.order_of(nothing, high) is None
    beyond = [experiment.beyond(each, 2.5) for each in (high, low, experiment.spread([1, 2]), nothing)]
    assert beyond == [True, None, False, None]


def test_chance_decides_one_time_in_ten():
    random = Random(0)
    draw = lambda: experiment.spread(random.gauss(0, 1) for _ in range(5))
    decided = sum(experiment.order_of(draw(), draw()) is not None for _ in range(1000))
    assert 50 < decided < 130
    every = [[True, True], [True, None], [None, False], []]
    assert [experiment.all_of(each) for each in every] == [True, None, False, None]
