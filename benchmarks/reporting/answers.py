"""The project's questions, answered in words from the rows alone."""

from benchmarks.environment import BUSY_CORES
from benchmarks.reporting.fits import Crossover, Fit, batch_to_fill, find_crossover, fit_power
from benchmarks.rows import Results, Row
from benchmarks.shapes import PASSES, RECURRENCES

NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "attention": "attention", "transformer": "Transformer"}
PASS_NAMES = {"forward": "forward (inference)", "training": "training (forward and backward)"}
SWEEPS = {"batch_fixed": "batch fixed", "tokens_fixed": "tokens per batch fixed"}


def sweep_name(rows: list[Row]) -> str:
    """What was held fixed, and at what."""
    sweep = rows[0].info["sweep"]
    return f"batch fixed at {rows[0].B}" if sweep == "batch_fixed" else f"T·B fixed at {rows[0].tokens:,} tokens"


def caveat(results: Results) -> str | None:
    """What numbers from a CPU say, and what they do not."""
    if results.machine.get("gpu"):
        return None
    return (
        "**Measured on a CPU. These numbers do not speak for a GPU.** A CPU does few things at once, so a recurrence "
        "leaves little of it idle; a GPU does thousands at once. The questions are the same on both, the answers "
        "need not be. **None of seqcore's kernels ran**: without a GPU it calls torch's own operators, and plain "
        "PyTorch for what those cannot do, so its ratios say nothing about the kernels."
    )


def busy(results: Results) -> str | None:
    """Whether other programs were running as the run began."""
    busy_cores = results.machine.get("busy_cores_at_start")
    if busy_cores is None or busy_cores <= BUSY_CORES:
        return None
    return (
        f"**The machine was busy** as the run began: other programs took {busy_cores:.1f} of its "
        f"{results.machine['cores']} cores, so these times are too long, and uncertain. Measure again on a quiet one."
    )


def slopes(results: Results, sweep: str) -> list[dict]:
    """One line for each layer and pass: the fits of whoever is fastest, of ours and of torch.nn."""
    found = []
    for pass_ in PASSES:
        for op in ("rnn", "gru", "lstm", "attention"):
            rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_, op=op)
            fit = fit_power([row.T for row in rows], [row.ms for row in rows])
            if fit:
                found.append({"pass": pass_, "op": op, "fit": fit})
    return found


def slope_sentences(results: Results, sweep: str) -> list[str]:
    sentences = []
    for pass_ in PASSES:
        found = [line for line in slopes(results, sweep) if line["pass"] == pass_]
        rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
        if found:
            widest = max((line["fit"] for line in found), key=lambda fit: fit.last)
            sentences.append(
                f"{PASS_NAMES[pass_].capitalize()}, {sweep_name(rows)}, {_fitted(widest)}: time grows as "
                f"{', '.join(_power(line, widest) for line in found)}."
            )
    return sentences


def _power(line: dict, widest: Fit) -> str:
    fit = line["fit"]
    same = _fitted(fit) == _fitted(widest)
    return f"{NAMES[line['op']]} T^{fit.slope:.2f}" + ("" if same else f" ({_fitted(fit)})")


def _fitted(fit: Fit) -> str:
    return f"fitted over {fit.points} lengths from {fit.first:,} to {fit.last:,}"


def crossover(results: Results, sweep: str, pass_: str, op: str) -> Crossover | None:
    """Attention against one recurrence, each by whoever is fastest at it, at the lengths both were measured at."""
    rows = {
        kind: {row.T: row.ms for row in results.select(suite="bottleneck", sweep=sweep, pass_=pass_, op=kind)}
        for kind in ("attention", op)
    }
    lengths = sorted(rows["attention"].keys() & rows[op].keys())
    return find_crossover(lengths, *([rows[kind][T] for T in lengths] for kind in ("attention", op)))


def crossover_sentences(results: Results, sweep: str) -> list[str]:
    sentences = []
    for pass_ in PASSES:
        rows = results.select(suite="bottleneck", sweep=sweep, pass_=pass_)
        clauses = [
            _clause(found, f"the {NAMES[op]}")
            for op in RECURRENCES
            if (found := crossover(results, sweep, pass_, op)) is not None
        ]
        if clauses:
            sentences.append(
                f"{PASS_NAMES[pass_].capitalize()}, {sweep_name(rows)}, T from {rows[0].T:,} to {rows[-1].T:,}: "
                f"attention {'; '.join(clauses)}."
            )
    return sentences


def _clause(found: Crossover, other: str) -> str:
    verdict = {
        "at": f"stops being cheaper than {other} at T ≈ {_two_digits(found.T or 0)}",
        "always": f"is cheaper than {other} at every T measured",
        "never": f"is dearer than {other} at every T measured",
        "unclear": f"and {other} have no single crossover",
    }[found.verdict]
    return f"{verdict} (at T = {found.last:,} it takes {found.at_last:.2g} times as long)"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def filling_sentences(results: Results) -> list[str]:
    sentences = []
    for pass_ in PASSES:
        for op in RECURRENCES:
            rows = results.select(suite="bottleneck", sweep="batch_sweep", pass_=pass_, op=op)
            found = batch_to_fill([row.B for row in rows], [row.tokens / row.ms * 1e3 for row in rows])
            if found is None:
                continue
            reached = " and ".join(f"{share:.0%} at B ≈ {batch:,.0f}" for share, batch in found.batch.items())
            end = "; it was still rising there, so more batch would fill it further" if found.still_rising else ""
            sentences.append(
                f"{NAMES[op]}, {pass_}, T = {rows[0].T:,}, H = {rows[0].info['shape']['H']:,}: "
                f"{reached} of its best, {found.best_rate:,.0f} tokens/s at B = {found.best_batch:,}{end}."
            )
    return sentences


def step_sentences(results: Results) -> list[str]:
    """What stepping through time costs beside attention at equal T, at the middle and the largest T."""
    sentences = []
    for pass_ in PASSES:
        attention = {
            row.T: row for row in results.select(suite="bottleneck", sweep="batch_fixed", pass_=pass_, op="attention")
        }
        lengths = sorted(attention)
        for T in dict.fromkeys((*lengths[len(lengths) // 2 :][:1], *lengths[-1:])):
            parts = [
                f"{NAMES[row.op]} {row.ms:,.1f} ms, {row.ms * 1e3 / T:,.1f} µs a step, "
                f"{row.ms / attention[T].ms:.2g} times attention"
                for op in RECURRENCES
                for row in results.select(suite="bottleneck", sweep="batch_fixed", pass_=pass_, op=op)
                if row.T == T
            ]
            if parts:
                sentences.append(
                    f"{PASS_NAMES[pass_].capitalize()}, T = {T:,}, B = {attention[T].B:,}: attention "
                    f"{attention[T].ms:,.1f} ms; {'; '.join(parts)}."
                )
    return sentences


def model_sentences(results: Results) -> list[str]:
    rows = results.select(suite="models")
    if not rows:
        return []
    sentences = [f"Text: {rows[0].info['text']}, a tenth of it held out."]
    shared = min(row.info["curves"]["seqcore"]["held_out"][-1]["wall_s"] for row in rows)
    losses = "; ".join(
        f"{NAMES[row.op]} {loss_at(row.info['curves']['seqcore']['held_out'], shared):.2f}" for row in rows
    )
    sentences.append(f"Held-out loss after {shared:.1f} s of training (nats a character): {losses}.")
    differences = "; ".join(f"{NAMES[row.op]} {row.info['max_loss_difference']:.1e}" for row in rows)
    sentences.append(
        "From the same weights on the same batches, the largest difference between seqcore's training loss and "
        f"torch.nn's, over all steps: {differences}."
    )
    return sentences


def loss_at(held_out: list[dict], wall_s: float) -> float:
    """The held-out loss at that time, interpolated linearly between evaluations."""
    before = [point for point in held_out if point["wall_s"] <= wall_s][-1]
    after = next((point for point in held_out if point["wall_s"] > wall_s), before)
    span = after["wall_s"] - before["wall_s"]
    share = (wall_s - before["wall_s"]) / span if span else 0.0
    return before["loss"] + share * (after["loss"] - before["loss"])
