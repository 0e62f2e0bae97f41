"""Recurrences given anything: what was drawn, promised and guarded."""

from .kinds import Guard, Promise

CALLS, KERNELS = "test_drawn_recurrence.py", "test_drawn_recurrence_kernels.py"
MISUSE, AROUND = "test_drawn_recurrence_misuse.py", "test_drawn_recurrence_around.py"
ASKED = f"{CALLS}::test_whatever_is_asked"
ANYTHING = f"{MISUSE}::test_anything_else_is_taken_as_the_reference_or_refused"
UNREAD = "test_nan_that_no_step_reads_reaches_no_gradient"
ALONE = "test_what_is_not_finite_in_one_sequence_of_many"

# Each public name, and a test that draws calls of it.
DRAWN = {
    **{f"seqcore.functional.{name}": ASKED for name in ("rnn", "gru", "lstm", "recurrence")},
    **{f"seqcore.nn.{name}": ASKED for name in ("RNN", "GRU", "LSTM")},
    **{f"seqcore.functional.{name}_cell": f"{AROUND}::test_single_steps" for name in ("rnn", "gru", "lstm")},
    **{f"seqcore.nn.{name}Cell": f"{AROUND}::test_single_steps" for name in ("RNN", "GRU", "LSTM")},
    "seqcore.functional.locked_dropout": f"{AROUND}::test_locked_dropout",
    "seqcore.nn.LockedDropout": f"{AROUND}::test_locked_dropout",
    "seqcore.nn.init": f"{AROUND}::test_initialisers",
    "seqcore.Cell": ASKED,
    "seqcore.truncated_bptt": f"{AROUND}::test_chunks_are_the_whole",
    "seqcore.diagnostics.gradient_flow": f"{AROUND}::test_gradient_flow",
    "seqcore.diagnostics.GradientFlow": f"{AROUND}::test_gradient_flow",
    "seqcore.diagnostics.Flow": f"{AROUND}::test_gradient_flow",
    "seqcore.diagnostics.step_jacobians": f"{AROUND}::test_step_jacobians",
    "seqcore.diagnostics.StepJacobians": f"{AROUND}::test_step_jacobians",
}

PROMISES = [
    Promise(
        "A recurrence gives what its reference gives in float64, within the error budget, whatever its sizes (none "
        "among them), form, options and dtype, and however its inputs lie in memory; it leaves them as they were.",
        "Calls drawn at random, by module and by function: operators and torch's own against the reference, and "
        "kernels interpreted in float32 and float16; outputs, all gradients, every byte of the inputs' storages.",
        (ASKED, f"{KERNELS}::test_whatever_is_asked", f"{KERNELS}::test_however_inputs_lie_in_memory"),
    ),
    Promise(
        "What no step reads may be NaN: padding behind a sequence's end, gradients that arrive there, states of "
        "sequences without a step, states that resets cut off at once or put in nowhere. Results and gradients are to "
        "the bit those of other fillings.",
        "The same calls with NaN and with zeros in all such places, on reference, operators and interpreted kernels.",
        (
            f"{CALLS}::test_what_no_step_reads_may_be_nan", f"{CALLS}::{UNREAD}",
            f"{KERNELS}::test_what_no_step_reads_may_be_nan", f"{KERNELS}::{UNREAD}",
        ),
    ),
    Promise(
        "NaN or infinity in one sequence reaches no other one of the batch, forward or backward; where the reference "
        "in float64 is NaN or infinite, so is the result, and elsewhere it is right.",
        "NaN, infinity or minus infinity at a drawn step of a drawn sequence; other sequences bitwise as without it.",
        (
            f"{CALLS}::test_what_is_not_finite_stays_in_its_sequence", f"{CALLS}::{ALONE}",
            f"{KERNELS}::test_what_is_not_finite_stays_in_its_sequence", f"{KERNELS}::{ALONE}",
        ),
    ),
    Promise(
        "Inputs may be one tensor, or views that overlap: their gradients add up.",
        "All inputs as views of one leaf, at drawn offsets, against copies of them in float64.",
        (
            f"{CALLS}::test_inputs_that_share_memory", f"{CALLS}::test_inputs_that_are_the_same",
            f"{KERNELS}::test_inputs_that_share_memory",
        ),
    ),
    Promise(
        "Any other argument is taken as the reference takes it, or refused with InvalidInput or UnsupportedInput, "
        "which say what they got, or as torch.nn refuses it: no other exception, no warning.",
        "Valid calls of every public function with one or two arguments replaced by something arbitrary; of what is "
        "taken, results in float64 by the backend chosen and by the operators against the reference's.",
        (ANYTHING, f"{MISUSE}::test_what_was_found", f"{MISUSE}::test_valid_calls_are_valid"),
    ),
    Promise(
        "Single steps, locked dropout, truncated chunks, diagnostics and initialisers do what their definitions say "
        "for whatever they are given.",
        "Drawn calls against torch's Cells, the whole sequence, autograd and the matrices' own products, in float64.",
        (AROUND,),
    ),
]

_REFERENCE, _BY_HAND = "seqcore/reference/recurrence.py", "seqcore/reference/bptt.py"
_LAUNCHES = "seqcore/ops/sequence.py"

GUARDS = [
    Guard(
        "The reference zeroes x past each sequence's end: backward would multiply it by 0.", _REFERENCE,
        "        x = x.masked_fill((t[:, None] >= lengths)[:, :, None], 0)\n", "",
        f"{CALLS}::{UNREAD}[gru-reference]",
    ),
    Guard(
        "A state that is only carried enters no product of the reference.", _REFERENCE,
        "            h_in, c_in = replaced(h_in, past, None), replaced(c_in, past, None)\n", "",
        f"{CALLS}::{UNREAD}[lstm-reference]",
    ),
    Guard(
        "The operators' formulas leave x past the end out of the weights' gradients.", _BY_HAND,
        "clean_x = x if valid is None else x.masked_fill(~valid, 0)", "clean_x = x",
        f"{CALLS}::{UNREAD}[gru-operators]",
    ),
    Guard(
        "The operators' formulas let no carried state into the weights' gradients.", _BY_HAND,
        "return state if layout.lengths is None else replaced(state, t >= layout.lengths, None)", "return state",
        f"{CALLS}::{UNREAD}[lstm-operators]",
    ),
    Guard(
        "What is carried past an end is selected, not multiplied by 0: a gradient may be infinite.", _BY_HAND,
        "carried_h, dh_t = dh.masked_fill(~past, 0), dh_t.masked_fill(past, 0)",
        "carried_h, dh_t = dh * past, dh_t.masked_fill(past, 0)",
        f"{CALLS}::test_an_infinite_gradient_is_clipped_beside_a_sequence_that_has_ended[operators]",
    ),
    Guard(
        "A gradient that arrives past an end stays out of the projection's.", _BY_HAND,
        "carried_h, dh_t = dh.masked_fill(~past, 0), dh_t.masked_fill(past, 0)",
        "carried_h, dh_t = dh.masked_fill(~past, 0), dh_t",
        f"{CALLS}::{UNREAD}[lstm_proj-operators]",
    ),
    Guard(
        "torch's own operators are given the states in their order.", "seqcore/functional/recurrence.py",
        "hx = h0 if c0 is None else (h0, c0)", "hx = h0 if c0 is None else (c0, h0)",
        f"{MISUSE}::test_valid_calls_are_valid[functional.lstm without masks]",
    ),
    Guard(
        "relu's backward lets the gradient of a NaN through, as torch does.", "seqcore/reference/cells.py",
        "da = torch.where(saved[0] <= 0, 0, dstate[0])", "da = dstate[0] * (saved[0] > 0)",
        f"{CALLS}::{ALONE}[nan-rnn_relu-operators]",
    ),
    Guard(
        "So does the kernels'.", "kernels/recurrence/cells.py",
        "da = tl.where(saved[0] <= 0.0, 0.0, dstate[0])", "da = tl.where(saved[0] > 0.0, dstate[0], 0.0)",
        f"{KERNELS}::{ALONE}[nan-rnn_relu]", interpreted=True,
    ),
    Guard(
        "The launches leave x past the end out of the weights' gradients.", _LAUNCHES,
        "clean_x = x if valid is None else x.masked_fill(~valid, 0)", "clean_x = x",
        f"{KERNELS}::{UNREAD}[gru-gates]", interpreted=True,
    ),
    Guard(
        "With a projection, initial states that no step takes up stay out of its gradient.",
        "seqcore/ops/projection.py",
        "return first, h0.masked_fill(~taken[:, None], 0)", "return first, h0",
        f"{KERNELS}::{UNREAD}[lstm_proj-gates]", interpreted=True,
    ),
    Guard(
        "The step kernel, which knows no stride of a bias, is given dense ones.", _LAUNCHES,
        "w.b_ih.contiguous() if bias else x", "w.b_ih if bias else x",
        f"{KERNELS}::test_however_inputs_lie_in_memory[step-every second]", interpreted=True,
    ),
    Guard(
        "Lengths are counted in int64: what is left of narrow ones may be below what they hold.",
        "seqcore/functional/recurrence_layout.py", "return lengths.to(x.device, torch.int64)",
        "return lengths.to(x.device)",
        f"{AROUND}::test_chunks_past_the_end_of_a_sequence_of_narrow_lengths[uint8]",
    ),
    Guard(
        "Flags are bools.", "seqcore/functional/recurrence_checks.py",
        "    check_flags(name, **{flag: getattr(options, flag) for flag in flags})\n", "",
        f"{MISUSE}::test_what_was_found[a flag of several]",
    ),
    Guard(
        "A probability is a number.", "seqcore/functional/arguments.py",
        "    return is_number(value) and 0 <= value <= 1", "    return 0 <= value <= 1",
        f"{MISUSE}::test_what_was_found[no number as dropout]",
    ),
    Guard(
        "A PackedSequence made by hand is looked through.", "seqcore/functional/recurrence_layout.py",
        'for which in ("sorted_indices", "unsorted_indices"):', "for which in ():",
        f"{MISUSE}::test_what_was_found[a packed order that is too long]",
    ),
    Guard(
        "Sparse and nested tensors are refused.", "seqcore/functional/arguments.py",
        "if tensor.layout != torch.strided or tensor.is_nested:", "if False:",
        f"{MISUSE}::test_what_was_found[sparse]",
    ),
]  # fmt: skip
