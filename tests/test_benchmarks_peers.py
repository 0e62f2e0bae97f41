"""Whoever ours is raced against does the same job, and whoever does not take part is named with the reason."""

import functools
from dataclasses import replace

import pytest
import torch

from seqcore.devices import INTERPRETED

from .benchmark_modules import load, needs_pytest_benchmark

needs_pytest_benchmark()
layers, peers, recurrence_peers, shapes = (load(name) for name in ("layers", "peers", "recurrence_peers", "shapes"))
where_supported = load("contest").where_supported
pytestmark = pytest.mark.skipif(INTERPRETED, reason="launches no kernel")

OPS = pytest.mark.parametrize("op", shapes.RECURRENCES)


def torchs_layer(op: str, **more):
    """torch.nn's layer of a case in float64, and its data."""
    case = shapes.Case(op, "training", "persistent", T=9, B=3, H=8, heads=0, dtype="float64", **more)
    built = layers.build_layers(case, replace(shapes.TINY, peers=("torch.nn",)))
    built.pop("auto")
    return case, built.popitem()[1], *layers.make_data(case, "cpu")


def assert_same(layer, other, x, dy):
    """Two orders of the same float64 arithmetic, a few roundings apart: closer than torch's own tolerances ask for."""
    torch.testing.assert_close(layer.forward(x), other.forward(x), rtol=1e-12, atol=1e-12)
    found, expected = layer.gradients(x, dy), other.gradients(x, dy)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@OPS
def test_a_loop_of_cells_is_the_layer(op):
    case, torchs, x, dy = torchs_layer(op)
    assert_same(recurrence_peers.looped(case, torchs), torchs, x, dy)


@OPS
def test_a_loop_of_steps_is_the_layer(op):
    # What a GPU compiles, uncompiled.
    _, torchs, x, dy = torchs_layer(op)
    loop = functools.partial(recurrence_peers.step_loop, recurrence_peers.one_step)
    assert_same(replace(torchs, call=loop), torchs, x, dy)


@pytest.mark.filterwarnings("ignore")
def test_every_case_has_its_own_compiled_step():
    # More than torch compiles of one function before it gives up.
    compiled, cases = [], torch._dynamo.config.recompile_limit + 2

    def compile_graph(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for units in range(1, cases + 1):
        with where_supported(replace(shapes.TINY, device="cuda")):
            step = torch.compile(recurrence_peers.one_step, dynamic=False, backend=compile_graph)
            state = (torch.zeros(2, units),) * 2
            step("lstm", torch.zeros(2, 4 * units), state, torch.zeros(4 * units, units), torch.zeros(4 * units))
    assert len(compiled) == cases


@OPS
def test_loops_know_episodes(op):
    case, torchs, x, dy = torchs_layer(op, reset_every=3)
    assert torchs.inputs["reset"][1:].any()
    assert_same(recurrence_peers.looped(case, torchs), torchs, x, dy)
    whole = replace(torchs, call=layers.plain, inputs={})
    assert not torch.allclose(torchs.forward(x), whole.forward(x)), "the case has no episode that matters"


@OPS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [1, 2])
def test_flashrnn_gets_the_same_weights(op, blocks):
    package = pytest.importorskip("flashrnn", reason="FlashRNN is not installed")
    _, torchs, x, dy = torchs_layer(op, blocks=blocks)
    call = functools.partial(recurrence_peers.flash, operator=package.flashrnn, backend="vanilla", blocks=blocks)
    assert_same(replace(torchs, call=call), torchs, x, dy)


def test_a_peer_that_does_another_job_takes_no_part(monkeypatch):
    case, torchs, x, _ = torchs_layer("lstm")
    louder = replace(torchs, call=lambda module, x: 2 * layers.plain(module, x))
    monkeypatch.setattr(recurrence_peers, "PEERS", {"twice": lambda case, torchs: louder, "once": lambda c, t: torchs})
    present, absent = recurrence_peers.recurrence_peers(case, torchs, x)
    assert set(present) == {"once"}
    assert "computes something else" in absent["twice"]


def test_who_is_absent_is_named_with_the_reason():
    def missing():
        import a_package_that_nobody_has  # noqa: F401

    def unable():
        raise RuntimeError("no kernel for this\nand a long story")

    builders = {"missing": missing, "unable": unable, "able": lambda: 1}
    present, absent = peers.take_part(builders, lambda peer: None, on_gpu=False)
    assert present == {"able": 1}
    assert absent["missing"].startswith("not installed: No module named")
    assert absent["unable"] == "no kernel for this"


@pytest.mark.parametrize("more", [{"layers": 2}, {"directions": 2}, {"packed": True}, {"ragged": True}])
def test_loops_say_what_they_are_not_written_for(more):
    case, torchs, x, _ = torchs_layer("gru", **more)
    present, absent = recurrence_peers.recurrence_peers(case, torchs, x)
    assert not present
    assert "one layer in one direction" in absent[recurrence_peers.LOOP]


def test_versions_name_every_peer():
    found = peers.versions()
    assert found["torch.nn"].startswith(f"torch {torch.__version__}")
    named = {"Python loop of cells", "compiled loop", "SDPA cudnn", "FlexAttention", "FlashRNN", "flash-attn"}
    assert named <= set(found)
