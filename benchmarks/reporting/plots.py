"""Every plot that a run's rows allow, each as a PNG file and as SVG for the page."""

import io
from pathlib import Path

from benchmarks.reporting.page import Plot
from benchmarks.reporting.plot_kit import LOOK, conditions, head, plt
from benchmarks.reporting.plot_limits import ratio_over_shape, roofline
from benchmarks.reporting.plot_lines import (
    attention_rate,
    loss_over_time,
    rate_over_batch,
    time_of_a_step,
    time_over_length,
)
from benchmarks.reporting.plot_steps import split_of_a_step, step_over_floor
from benchmarks.reporting.profiles import Profile
from benchmarks.rows import Results


def draw_all(results: Results, out: Path, profiles: list[Profile]) -> list[Plot]:
    """Draw, and write the PNG of each into ``out``."""
    drawn = []
    with plt.rc_context(LOOK):
        for name, draw in (
            ("time_over_length", time_over_length),
            ("time_of_a_step", time_of_a_step),
            ("rate_over_batch", rate_over_batch),
            ("ratio_over_shape", ratio_over_shape),
            ("step_over_floor", step_over_floor),
            ("split_of_a_step", lambda results: split_of_a_step(results, profiles)),
            ("attention_rate", attention_rate),
            ("roofline", lambda results: roofline(results, profiles)),
            ("loss_over_time", loss_over_time),
        ):
            drawing = draw(results)
            if drawing is None:
                continue
            path, svg = out / f"{name}.png", io.StringIO()
            # Without title: the page has it in its own letters. The salt makes ids the same in every run.
            with plt.rc_context({"svg.hashsalt": name, "savefig.bbox": "tight"}):
                drawing.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
                head(drawing, results)
                drawing.figure.savefig(path)
            plt.close(drawing.figure)
            caption = f"{drawing.caption} {conditions(results, drawing.rows)}."
            drawn.append(Plot(path, drawing.title, caption, svg.getvalue()))
    return drawn
