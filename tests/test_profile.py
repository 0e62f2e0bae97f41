"""``seqcore profile``: traces, kernels' rows, the parts of a step, and the campaign's file of profiles."""

import contextlib
import json
import re

import pytest
import torch

from seqcore import capabilities, cli, profiling
from seqcore.errors import InvalidInput
from seqcore.kernels.tuning import Device
from seqcore.profiling import kernel_tree, problems, session, split, trace
from seqcore.testing import launches

from .benchmark_modules import load

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def small(op="lstm", **options):
    return profiling.Recurrence(op, **({"T": 3, "B": 2, "H": 8} | options))


# --- the trace ------------------------------------------------------------------------------------------------


@no_gpu
def test_command_writes_a_trace_with_the_operation_s_range(monkeypatch, tmp_path, capsys):
    # On a CPU the operators themselves take the reference's formulas.
    monkeypatch.setattr(capabilities, "why_not_triton", lambda request: [])
    out = tmp_path / "here"
    sizes = ["--T", "3", "--B", "2", "--H", "8", "--repeats", "2"]
    assert cli.main(["profile", "gru", *sizes, "--pass", "training", "--backend", "triton", "--out", str(out)]) == 0
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    ranges = [event for event in events if event["name"] == "gru T=3 B=2 H=8 I=8 float32 training"]
    assert len(ranges) == 2
    inside = {
        event["name"]
        for event in events
        for span in ranges
        if event.get("tid") == span["tid"] and span["ts"] <= event["ts"] < span["ts"] + span["dur"]
    }
    assert "seqcore::recurrence_forward" in inside, "a range for every operator"
    assert "seqcore::recurrence_backward" in inside, "backward runs within the range"
    printed = capsys.readouterr().out
    assert str(out / "trace.json") in printed and "need a GPU" in printed
    assert [path.name for path in out.iterdir()] == ["trace.json"]


@no_gpu
@pytest.mark.parametrize(
    "problem",
    [
        small("rnn", layers=2, directions=2, packed=True, pass_="training"),
        profiling.Attention(B=1, H=4, H_kv=2, M=2, N=6, D=8, causal=True, window=3, pass_="training"),
    ],
    ids=["packed rnn", "attention"],
)
def test_function_returns_plain_json(problem):
    found = profiling.profile(problem, repeats=1)
    json.dumps(found)
    assert (found["op"], found["pass"], found["device"]) == (problem.op, problem.pass_, "cpu")
    assert problem.label in {event["name"] for event in found["trace_events"]}
    assert found["kernels"] == found["splits"] == found["files"] == [] and found["notes"]


def test_shapes_name_what_is_not_as_usual():
    assert small().shape == {"T": 3, "B": 2, "H": 8, "I": 8}
    assert small(I=4, directions=2, packed=True).shape == {"T": 3, "B": 2, "H": 8, "I": 4, "directions": 2, "packed": 1}


# --- only run -------------------------------------------------------------------------------------------------


def test_only_run_runs_within_its_ranges_and_nothing_else(monkeypatch, tmp_path, capsys):
    said = []

    @contextlib.contextmanager
    def span(name):
        said.append(f"<{name}>")
        yield
        said.append(f"</{name}>")

    def build(problem, device):
        assert device == "cuda"
        return lambda: said.append("call")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems.Recurrence, "build", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", span)
    monkeypatch.setattr(trace, "record_function", span)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda: span("every operator"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("stop"))
    assert cli.main(["profile", "lstm", "--T", "3", "--B", "2", "--H", "8", "--only", "run", "--repeats", "1"]) == 0
    label = "lstm T=3 B=2 H=8 I=8 bfloat16 forward"
    inner = ["<lstm>", f"<{label}>", "call", f"</{label}>", "</lstm>"]
    assert said == ["call", "start", "<every operator>", *inner, "synchronize", "</every operator>", "stop"]
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gru", "--T", "0"], "T must be a positive number of at most 2^31 - 1, got 0"),
        (["gru", "--directions", "3"], "directions must be 1 or 2, got 3"),
        (["lstm", "--pass", "sideways"], "pass must be one of forward, training, got 'sideways'"),
        (["lstm", "--dtype", "int8"], "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        (["rnn", "--backend", "magic"], "backend must be one of auto, triton, aten, reference, got 'magic'"),
        (["rnn", "--repeats", "0"], "repeats must be a positive number, got 0"),
        (["attention", "--H", "4", "--H-kv", "3"], "H_kv must be a divisor of H = 4, got 3"),
        (["attention", "--window", "3"], "and with causal; or 0 for all, got 3"),
        (["attention", "--causal", "--window", "-1"], "and with causal; or 0 for all, got -1"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@no_gpu
def test_a_backend_that_cannot_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "gru", "--T", "2", "--B", "1", "--H", "4", "--backend", "triton"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_operation_is_refused_by_the_function_too():
    with pytest.raises(InvalidInput, match="op must be one of rnn, gru, lstm, got 'transformer'"):
        profiling.Recurrence("transformer", T=1, B=1, H=1)


def test_backward_runs_in_the_thread_that_the_ranges_are_in():
    x, seen = torch.ones(2, requires_grad=True), []

    def forward():
        seen.append(torch.autograd.is_multithreading_enabled())
        return 2 * x

    (dx,) = problems._one_pass(forward, [x], "training")()
    assert dx.shape == x.shape and seen == [True, False]


# --- kernels --------------------------------------------------------------------------------------------------


def node(name, metrics, *children):
    return {"frame": {"name": name, "type": "function"}, "metrics": metrics, "children": list(children)}


@pytest.mark.parametrize("apart", [False, True], ids=["one node", "kernel below launch"])
def test_rows_of_a_tree(apart):
    work, time = {"flops16": 8e9, "bytes": 4e6}, {"time (ns)": 4e6, "count": 2}
    ours = node("ours", work, node("ours", time)) if apart else node("ours", work | time)
    metadata = node(kernel_tree.METADATA_SCOPE, {}, node("copy", time))
    library = node("gemm", {"time (ns)": 2e6, "count": 6, "device_id": "0"})
    tree = [node("ROOT", {"time (ns)": 0}, node("lstm", {}, ours, metadata, library)), {"CUDA": {"0": {}}}]
    assert kernel_tree.rows(tree, repeats=2) == [
        {"name": "ours", "launches": 1, "ms": 2, "flops": 4e9, "bytes": 2e6, "tflops": 2, "gbytes_per_s": 1},
        {"name": "gemm", "launches": 3, "ms": 1, "flops": None, "bytes": None, "tflops": None, "gbytes_per_s": None},
    ]  # fmt: skip


@no_gpu
def test_why_there_is_no_tree_is_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"Proton wrote no tree: .*(CUDA|NVIDIA)"):
        kernel_tree.kernel_tree(small(), 1, tmp_path / "tree.hatchet")


# --- the parts of a step --------------------------------------------------------------------------------------


def test_parts_add_up_to_the_whole_with_the_rest():
    step = split.Step(whole=4.0, without_products=2.5, without_pointwise=3.75, barrier=1.0, exchange=1.5)
    parts = {"barrier": 1.0, "exchange": 0.5, "product": 1.5, "pointwise": 0.25, "rest": 0.75}
    assert step.parts == parts
    overlapping = split.Step(whole=4.0, without_products=1.0, without_pointwise=3.0, barrier=1.0, exchange=2.0)
    assert overlapping.parts["rest"] == -2.0


def test_the_first_of_several_launches_is_caught():
    class Kernel:
        arg_names, pre_run_hooks = ("x_ptr", "T"), []
        add_pre_run_hook = pre_run_hooks.append

    with split._first_launch(Kernel) as caught:
        for T in (3, 4):
            Kernel.pre_run_hooks[0]("x", T=T, num_warps=8, debug=False, instrumentation_mode="")
    assert caught == {"x_ptr": "x", "T": 3, "num_warps": 8} and not Kernel.pre_run_hooks


@no_gpu
@pytest.mark.parametrize("op", ["rnn", "gru", "lstm"])
def test_variants_of_the_library_s_own_launch(monkeypatch, op):
    """All compiled as on a GPU, where slices wait for each other; none is run."""
    T = 4
    problem = small(op, T=T, B=4, H=576, dtype="float16", backend="triton", pass_="training")
    monkeypatch.setattr(split, "barrier_samples", lambda *measured: [1e-3])
    monkeypatch.setattr(split, "exchange_samples", lambda clock, exchange: [2e-3])
    monkeypatch.setattr(split, "ROUNDS", 1)

    def clock(launch, prepare):
        assert prepare.__name__ == "zero_", "the barrier's counters begin at zero"
        launch()
        return T * 5e-3

    with launches.compiled_for(Device("sm_90")) as launched:
        call = problem.build("cpu")
        launched.clear()
        found = split.splits(problem, call, clock)
    json.dumps(found)
    assert [(one["pass"], one["regime"], one["steps"]) for one in found] == [
        ("forward", "spread", T), ("backward", "spread", T)
    ]  # fmt: skip
    for one in found:
        assert one["us_per_step"] == pytest.approx(5)
        assert one["parts"] == pytest.approx({"barrier": 1, "exchange": 1, "product": 0, "pointwise": 0, "rest": 3})
    # The library's two launches come first; then each pass's whole, without products, without pointwise math.
    assert len({launch.grid for launch in launched}) == 1 and len(launched) == 8
    for variants in (launched[2:5], launched[5:8]):
        whole, no_products, no_pointwise = (instructions(launch.compiled.asm["ptx"]) for launch in variants)
        assert whole["mma"] and no_pointwise["mma"] and not no_products["mma"]
        assert no_products["nanosleep"] and not whole["nanosleep"]
        assert whole["cg"] == no_products["cg"] == no_pointwise["cg"] > 0, "what others wrote is read in all"
        assert whole["ex2"] == no_products["ex2"] and not no_pointwise["ex2"]


def instructions(ptx):
    return {name: len(re.findall(rf"\b{name}\b", ptx)) for name in ("mma", "ex2", "cg", "nanosleep")}


def test_where_there_are_no_parts_it_says_why(monkeypatch):
    why_not = {problem: session._why_no_split(problem) for problem in (
        profiling.Attention(B=1, H=1, M=1, D=8), small(backend="aten"), small(backend="triton", packed=True),
        small(backend="triton", T=1), small(backend="triton"),
    )}  # fmt: skip
    attention, aten, packed, single, served = why_not.values()
    assert "single step" in single and "no steps" in attention and "--backend triton" in aten and "packed" in packed
    assert served is None or torch.version.hip


def test_a_gpu_s_profile_is_printed(monkeypatch):
    row = {"name": "ours", "launches": 1, "ms": 2.0, "flops": 4e9, "bytes": 2e6, "tflops": 2.0, "gbytes_per_s": 1.0}
    parts = {"barrier": 1.0, "exchange": 0.5, "product": 1.5, "pointwise": 0.25, "rest": -0.5}
    one = {"pass": "forward", "plan": "spread: …", "regime": "spread", "steps": 3, "us_per_step": 2.75, "parts": parts}
    found = {"notes": [], "splits": [], "split": {}, "kernels": []}
    monkeypatch.setattr(session, "kernel_tree", lambda problem, repeats, path: [row])
    monkeypatch.setattr(session, "splits", lambda problem, call: [one, one])
    session._on_gpu(small(backend="triton"), lambda: None, 1, None, found)
    assert found["split"] == {name: 2 * us for name, us in parts.items()}
    text = session.render(found | {"label": "lstm", "backend": "triton", "device": "cuda", "files": []})
    assert re.search(r"ours +1 +2\.0000 +4\.00 +2\.00 +2\.00 +1\.00", text)
    assert "forward: 2.750 µs a step" in text and "need not add up" in text


def test_what_cannot_be_found_is_noted_and_loses_nothing_else(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no permission")

    found = {"notes": [], "splits": [], "split": {}, "kernels": []}
    monkeypatch.setattr(session, "kernel_tree", broken)
    monkeypatch.setattr(session, "splits", broken)
    session._on_gpu(small(backend="triton"), lambda: None, 1, None, found)
    assert found["notes"] == ["no kernels: no permission", "no step's parts: RuntimeError('no permission')"]


# --- the campaign's file --------------------------------------------------------------------------------------


@pytest.fixture
def stage(monkeypatch):
    module = load("stages.run_profiles")
    monkeypatch.setattr(module, "environment", lambda device: {"device": device})
    monkeypatch.setattr(session, "device", lambda: "cpu")
    return module


@no_gpu
def test_profiles_of_all_problems_in_one_trace(stage, tmp_path, monkeypatch):
    out, journal = tmp_path / "profile.json", tmp_path / "journal.jsonl"
    arguments = ["--tiny", "--out", str(out), "--journal", str(journal), "--key", "today"]
    assert stage.main([*arguments, "--seconds", "0"]) == 0
    assert json.loads(out.read_text())["profiles"] == []
    assert stage.main(arguments) == 0
    written = json.loads(out.read_text())
    labels = [problem.label for problem in stage.problems(tiny=True)]
    assert [profile["label"] for profile in written["profiles"]] == labels
    assert load("reporting.profiles").load(out, written["machine"]), "what the report reads"
    ranges = {event["name"]: event["pid"] for event in written["traceEvents"] if event["name"] in labels}
    assert [ranges[label] // stage.PROCESSES for label in labels] == list(range(len(labels)))
    assert written["machine"] and not written["failed"]
    assert out.stat().st_size < stage.MOST_BYTES

    monkeypatch.setattr(stage, "profile", None)
    out.unlink()
    assert stage.main(arguments) == 0, "finished before, and not profiled again"
    assert json.loads(out.read_text()) == written
    assert stage.main([*arguments, "--key", "tomorrow"]) == 1
    assert len(json.loads(out.read_text())["failed"]) == len(labels)


def test_a_trace_too_large_is_left_out(stage, monkeypatch):
    one = {"label": "a", "notes": [], "trace_events": [{"ph": "X", "ts": 7.0, "pid": 3, "name": "x"}], "files": []}
    events, profiles = stage.merged([one, one])
    assert [(event["pid"], event["ts"]) for event in events] == [(0, 0), (1000, 0)]
    assert profiles == [{"label": "a", "notes": []}] * 2
    monkeypatch.setattr(stage, "MOST_BYTES", 2 * len(json.dumps(events[0])) - 1)
    events, profiles = stage.merged([one, one])
    assert not events and "too many" in profiles[0]["notes"][0]


def test_problems_of_a_gpu_are_distinct_and_valid(stage):
    chosen = stage.problems(tiny=False)
    assert len({problem.label for problem in chosen}) == len(chosen)
    assert {problem.backend for problem in chosen} == {"triton"}
    assert all(problems.problem_of(vars(problem)) == problem for problem in chosen)
