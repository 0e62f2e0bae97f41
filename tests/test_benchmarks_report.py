"""The report as a page: what it says first, its tables of several peers, its plots, and that it stands alone."""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

from .benchmark_modules import load, needs_pytest_benchmark, not_interpreted

needs_pytest_benchmark()
not_interpreted()

report, rows, shapes, timing = map(load, ("report", "rows", "shapes", "timing"))
page, short = load("reporting.page"), load("reporting.short")
recurrence_report = load("reporting.recurrence")
draws = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
work = load("contest").work

ROOFS = timing.Roofs(800.0, 4000.0, "bfloat16")
MACHINE = {"gpu": "some GPU", "torch": "2.13.0", "triton": "3.7.1", "commit": "0123456789abcdef-dirty"}
MACHINE |= {"peers": {"torch.nn": "torch 2.13.0", "FlashRNN": "absent: not installed"}}


def row(suite: str, op: str, pass_: str, shape: dict, ms: float, peers: dict[str, float], **more) -> "rows.Row":
    """A row as a GPU might write it; every time varies by a tenth."""
    spread = lambda middle: timing.Timing.of([0.9 * middle, middle, 1.1 * middle])
    done = work("lstm" if op in shapes.RECURRENCES else "attention", pass_, {"I": 512, "H": 512, **shape}, 2)
    info = rows.extra_info(
        suite, op, pass_, "bfloat16", shape, spread(ms), {name: spread(its) for name, its in peers.items()}, done, {},
        **{"memory_bytes": None, **more},
    )  # fmt: skip
    rows.add_roofs(info, ROOFS)
    return rows.Row(info)


def bottleneck() -> list["rows.Row"]:
    layer = lambda op, pass_, T, B, ms, sweep: row(
        "bottleneck", op, pass_, {"T": T, "B": B, "I": 1024, "H": 1024}, ms, {"torch.nn": 2 * ms}, sweep=sweep
    )
    times = {"lstm": lambda T: 0.004 * T, "gru": lambda T: 0.0036 * T, "attention": lambda T: 1e-7 * T**2}
    found = []
    for factor, pass_ in enumerate(shapes.PASSES, 1):
        for op, ms in times.items():
            found += [layer(op, pass_, T, 16, factor * ms(T), "batch_fixed") for T in (512, 2048, 8192)]
        found += [layer("lstm", pass_, 128, B, factor * max(B, 64) / 64, "batch_sweep") for B in (1, 16, 64, 256)]
    return found


def recurrence(op: str, pass_: str, B: int, H: int, ms: float, peers: dict[str, float], **more) -> "rows.Row":
    steps = {"steps": 512, "exchange_us": 0.7, "weights_us": H / 1200, "flops": B * H * H * 8.0, "regime": "spread"}
    more = {"sweep": "grid", "cudnn_path": "standard", "kept_bytes_per_token": None, "step_floors": [steps], **more}
    return row("recurrence", op, pass_, {"T": 512, "B": B, "I": H, "H": H}, ms, peers, **more)


def recurrences() -> list["rows.Row"]:
    found = []
    for op in ("lstm", "gru"):
        for i, pass_ in enumerate(shapes.PASSES, 1):
            for B in (1, 16, 64, 256):
                for H in (256, 512, 768, 1024, 1536)[: 4 if B == 256 else 5]:
                    ms = i * (0.9 + H / 900 + B / 400)
                    found.append(recurrence(op, pass_, B, H, ms, {"torch.nn": ms * (0.3 + 900 / H + 1 / B)}))
    return found


def attention() -> list["rows.Row"]:
    found = []
    for pass_, D, causal, N in product(shapes.PASSES, (64, 128), (True, False), (1024, 4096, 16384)):
        shape = {"T": N, "B": 16384 // N, "M": N, "N": N, "H": 2048 // D, "H_kv": 2048 // D, "D": D}
        ms = N / 2**13 * (1 if causal else 2)
        peers = {"SDPA flash": ms * D / 100, "SDPA math": N / 400}
        more = {"causal": causal, "absent": {"flash-attn": "not installed"}, "peer_memory_bytes": {}}
        found.append(row("attention", "attention", pass_, shape, ms, peers, sweep="plain", **more))
    return found


def whole() -> "rows.Results":
    missing = [{"name": "test_recurrence[x]", "outcome": "skipped", "reason": "out of time"}]
    return rows.Results(bottleneck() + recurrences() + attention(), MACHINE, missing, "today")


class Page(HTMLParser):
    """What a page is made of; fails where an element is closed that is not open."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags for name in names if name in attributes]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_markdown_of_reports_is_rendered():
    text = "# A & B\n\n**bold** and *of it*, `x*y*z`, 2*3* 4\n\n- one <two>\n- three\n\n## Next"
    html = page.render(text + "\n\n| a   | b   |\n| --- | --: |\n| x   | 1   |\n", [])
    assert '<h1 id="s0">A &amp; B</h1>' in html and "<title>A &amp; B</title>" in html
    assert "<p><b>bold</b> and <em>of it</em>, <code>x*y*z</code>, 2*3* 4</p>" in html
    assert "<ul><li>one &lt;two&gt;</li><li>three</li></ul>" in html
    assert '<tr><td>x</td><td class="number">1</td></tr>' in html
    assert '<a href="#s1">Next</a>' in html
    assert Page(html).count("table") == 1


def test_ids_of_two_svgs_differ():
    svg = '<?xml?><!DOCTYPE svg><svg id="a"><style>*{}</style><use xlink:href="#m"/><g clip-path="url(#p)"/></svg>'
    assert page.inline_svg(svg, "one") == '<svg id="one-a"><use xlink:href="#one-m"/><g clip-path="url(#one-p)"/></svg>'


PROFILE = {
    "op": "lstm",
    "shape": {"T": 1024, "B": 16, "H": 768},
    "dtype": "bfloat16",
    "pass": "forward",
    "kernels": [
        {"name": "sequence_kernel", "ms": 2.0, "flops": 8e10, "bytes": 4e7},
        {"name": "not_ours", "ms": 0.1, "flops": None, "bytes": None},
    ],
    # What overlaps is counted twice.
    "split": {"rest": -0.1, "barrier": 0.7, "exchange": 0.4, "product": 0.6, "pointwise": 0.2},
}


def write(path: Path, results: "rows.Results") -> Path:
    entries = [{"name": f"test[{i}]", "extra_info": row.info} for i, row in enumerate(results.rows)]
    ours = {"machine": results.machine, "not_measured": results.not_measured}
    path.write_text(json.dumps({"benchmarks": entries, "seqcore": ours, "datetime": results.date}))
    return path


@draws
def test_page_stands_alone_with_every_plot(tmp_path):
    source, profile = write(tmp_path / "bench.json", whole()), tmp_path / "profile.json"
    profile.write_text(json.dumps({"profiles": [PROFILE]}))
    _, written = report.write_report([source], tmp_path / "a", profile=profile)
    pictures = {path.stem for path in written if path.suffix == ".png"}
    assert pictures == {
        "time_over_length", "time_of_a_step", "rate_over_batch", "ratio_over_shape", "step_over_floor",
        "split_of_a_step", "attention_rate", "roofline",
    }  # fmt: skip
    text = (tmp_path / "a" / "report.html").read_text()
    found = Page(text)
    assert found.count("svg") == found.count("figcaption") == len(pictures) == text.count('role="img"')
    ids = found.values("id")
    assert len(set(ids)) == len(ids) and pictures <= set(ids)
    # Whatever is referred to is in the page.
    references = found.values("href", "xlink:href", "src") + re.findall(r"url\(([^)]*)\)", text)
    assert {ref.removeprefix("#") for ref in references if not ref.startswith("data:")} <= set(ids)
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL):
        assert "some GPU · bfloat16 · torch 2.13.0 · Triton 3.7.1 · commit 0123456789ab, changed." in caption
    # The slopes beside the lines; an unmeasured cell; of the kernels the one that multiplies.
    assert ">LSTM T^1.00</text>" in text and ">attention T^2.00</text>" in text
    assert "hatch" in text and ">sequence_kernel</text>" in text and "not_ours" not in text
    assert ">1.8 µs</text>" in text


def test_profiles_of_another_commit_are_left_out(tmp_path):
    path, read = tmp_path / "profile.json", load("reporting.profiles").load
    for commit, count in ((MACHINE["commit"], 1), ("another", 0)):
        path.write_text(json.dumps({"profiles": [PROFILE], "machine": {"commit": commit}}))
        assert len(read(path, MACHINE)) == count


@draws
def test_parts_that_overlap_stand_on_the_other_side(tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps({"profiles": [PROFILE]}))
    profiles = load("reporting.profiles").load(tmp_path / "profile.json", MACHINE)
    drawing = load("reporting.plot_steps").split_of_a_step(whole(), profiles)
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in drawing.figure.axes[0].patches]
    assert bars[0] == (0, -0.1) and bars[1] == (0, 0.7) and bars[-1][1] == pytest.approx(1.9)
    assert drawing.figure.axes[0].get_xlim()[0] < -0.1
    load("reporting.plots").plt.close(drawing.figure)


@pytest.mark.parametrize("text, why", [("{", "is not JSON"), ("[]", "has no 'benchmarks'"), ("{}", "bench.json")])
def test_a_file_that_holds_no_rows_is_named(tmp_path, capsys, text, why):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert report.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert f"{path} " in said and why in said


@draws
@pytest.mark.parametrize("pass_", shapes.PASSES)
def test_one_pass_alone_is_drawn(tmp_path, pass_):
    results = rows.Results([row for row in whole().rows if row.info["pass"] == pass_], MACHINE, [], "today")
    _, written = report.write_report([write(tmp_path / "bench.json", results)], tmp_path)
    assert sum(path.suffix == ".png" for path in written) == 7


@draws
def test_a_length_of_one_pass_alone_has_a_tick():
    found = [row for row in bottleneck() if (row.T, row.info["pass"]) != (8192, "training")]
    drawing = load("reporting.plot_lines").time_over_length(rows.Results(found, MACHINE, [], ""))
    for ax in drawing.figure.axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["512", "2,048", "8,192"]
    load("reporting.plots").plt.close(drawing.figure)


@draws
def test_the_same_rows_draw_the_same_page(tmp_path):
    source = write(tmp_path / "bench.json", rows.Results(attention(), MACHINE, [], "today"))
    pages = [report.write_report([source], tmp_path / name)[1][0].read_text() for name in ("a", "b")]
    assert pages[0] == pages[1] and pages[0].count("<svg") == 2


def test_without_plots_words_and_tables_remain(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "bench.json", whole())
    assert len(report.write_report([source], tmp_path / "asked", with_plots=False)[1]) == 2
    for name in [name for name in sys.modules if name.startswith(("benchmarks.reporting.plot", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["benchmarks.reporting"], "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, written = report.write_report([source], tmp_path / "none")
    assert [path.name for path in written] == ["report.html", "report.md"]
    assert "matplotlib is not installed" in capsys.readouterr().err
    found = Page(written[0].read_text())
    assert found.count("svg") == 0 and found.count("table") > 5


def test_the_shortest_verdicts_come_first():
    said = short.in_short(whole())
    assert len(said) <= 8
    told = "\n".join(said)
    assert "time grows as GRU T^1.00, LSTM T^1.00, attention T^2.00." in told
    assert "Recurrences, torch.nn's time over seqcore's, geometric means: forward **1.97** over 38 shapes" in told
    assert told.count("; above 1, seqcore is faster.") == 2
    assert "A recurrence's time over the least its steps can take here, medians: forward **2." in told
    assert "Attention, the best peer's time over seqcore's, geometric means: forward **0." in told
    assert "Not measured: 1;" in said[-1]
    text = report.report(whole(), [])
    assert text.index("## In short") < text.index("## Measured on") < text.index("## Answers")
    assert "- peers: torch.nn torch 2.13.0; FlashRNN absent: not installed" in text
    assert short.in_short(rows.Results([], MACHINE, [], "")) == []


def test_means_speak_of_torch_whoever_is_best():
    found = [
        recurrence("lstm", "forward", 16, 512, 1.0, {"torch.nn": 2.0, "FlashRNN": 0.5}),
        recurrence("lstm", "forward", 16, 512, 1.0, {"Python loop of cells": 9.0}, absent={"FlashRNN": "no such H"}),
        recurrence("lstm", "forward", 16, 512, 1.0, {"torch.nn, dense": 8.0}, sweep="blocks"),
        recurrence("lstm", "forward", 16, 512, 1.0, {}, sweep="odd"),
    ]
    results = rows.Results(found, MACHINE, [], "")
    said, apart = recurrence_report.sentences(results)[:2]
    assert "geometric mean of the ratios 2.00 over 1 shapes; the worst is 2.00, LSTM" in said
    assert "what torch.nn does not know, against what takes its place: geometric mean of the ratios 8.00 over" in apart
    tables = re.sub(" +", " ", "\n".join(recurrence_report.tables(results)))
    assert "| torch.nn ms | FlashRNN ms | Python loop of cells ms | best peer | ratio |" in tables
    assert "| 2 | 0.5 | - | FlashRNN | 0.50 | 0.50 to 0.50 | 2.00 |" in tables
    assert "| - | - | 9 | Python loop of cells | 9.00 |" in tables
    assert "| 8 | torch.nn, dense | 8.00 |" in tables
    assert "- FlashRNN, 1 rows (grid): no such H" in tables
