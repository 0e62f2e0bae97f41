"""Numbers: how far from the truth."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "A result errs at most twice as much as plain PyTorch does in the same precision, plus four roundings of the "
        "result's scale; large ones also in the mean, 1.5 times.",
        "Every numerical test judges by one helper, which is itself tested on both sides of each limit.",
        ("test_budget.py",),
    ),
    Promise(
        "That holds at the ends of what numbers can say: saturated gates, the largest inputs and states, denormal "
        "numbers, logits of a thousand, and, where one key decides a row, of a million.",
        "Recurrences, but for relu, and attention by their kernels against float64, at every such scale. Not judged "
        "are the gradients of gates that are saturated in 16 bits, which keep 0 or 1 of them, and those of query and "
        "key where one key decides. Backward makes scores anew, and can be no better than the order in which a GPU "
        "adds up products; interpreted, they are added up exactly.",
        (
            "test_extremes_kernels.py::test_recurrences_at_every_scale",
            "test_extremes_kernels.py::test_attention_at_every_scale",
            "test_extremes_kernels.py::test_logits_of_a_million",
            "test_attention_kernels.py::test_a_log_sum_exp_far_from_zero",
            "test_attention_kernels.py::test_masks_of_the_lowest_finite_number",
            "test_recurrence_kernels.py::test_tanh_over_the_whole_range",
            "test_recurrence_kernels.py::test_sigmoid_over_the_whole_range",
        ),
    ),
    Promise(
        "What overflows is infinite, or NaN, exactly where it is in torch; scores of attention's kernels, counted in "
        "base 2, from 2.35e38 on.",
        "A recurrence that grows past the largest number, in 16 and 32 bits, and float32 logits past it; of the "
        "recurrence the output, of attention the gradients, too. Masks, slopes and sinks up to the largest number, "
        "and masks that are infinite or NaN; softcaps at their limits.",
        (
            "test_extremes_kernels.py::test_what_overflows_is_infinite_where_torchs_is",
            "test_extremes_kernels.py::test_logits_past_the_largest_number_are_nan_where_torchs_are",
            "test_extremes_kernels.py::test_masks_near_the_largest_number",
            "test_extremes_kernels.py::test_slopes_and_sinks_near_the_largest_number",
            "test_extremes_kernels.py::test_masks_that_are_not_finite_are_nan_where_torchs_are",
            "test_extremes_kernels.py::test_softcaps_at_their_limits",
        ),
    ),
    Promise(
        "Gradients that come in as large as a loss scale makes them give no NaN, where plain PyTorch gives none.",
        "Up to 2^15 for each output in float16: attention whose own gradients float16 holds gives finite ones, beside "
        "lengths, masks, windows and sizes that fill no tile; recurrences overflow, but to infinity.",
        (
            "test_extremes_kernels.py::test_large_incoming_gradients",
            "test_extremes_kernels.py::test_large_incoming_gradients_of_recurrences",
            "test_attention_drawn.py::test_large_incoming_gradients_give_finite_ones",
        ),
    ),
    Promise(
        "Nothing drifts over a long sequence: what is added up over all steps errs no more than PyTorch's own loop.",
        "Recurrences that forget as little as they can, forward and backward, the LSTM over 100,000 steps in the "
        "nightly run, others over 10,000; the kernels, interpreted, over 1,000.",
        (
            "test_extremes.py::test_nothing_drifts_over_a_long_sequence",
            "test_extremes_kernels.py::test_nothing_drifts_over_a_long_sequence",
        ),
    ),
]

GUARDS = [
    Guard(
        "the limit of the largest error",
        "seqcore/testing/budget.py",
        "max_allowed = 2 * eager_error",
        "max_allowed = 3 * eager_error",
        "test_budget.py::test_twice_the_eager_error_and_four_roundings_pass_and_more_does_not",
    ),
    Guard(
        "the limit of the mean error",
        "seqcore/testing/budget.py",
        "mean_error <= mean_allowed",
        "mean_error <= 2 * mean_allowed",
        "test_budget.py::test_the_mean_rule_starts_at_a_thousand_elements",
    ),
    Guard(
        "infinities must agree",
        "seqcore/testing/budget.py",
        "Budget(same_infinities and within,",
        "Budget(within,",
        "test_budget.py::test_nan_fails_and_infinities_must_agree",
    ),
    Guard(
        "tanh keeps its relative accuracy near 0",
        "kernels/activations.py",
        "magnitude < 0.625",
        "magnitude < 0.0",
        "test_extremes_kernels.py::test_recurrences_at_every_scale[fp32-denormal-rnn_tanh]",
        interpreted=True,
    ),
    Guard(
        "tanh saturates rather than dividing infinities",
        "kernels/activations.py",
        "1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)",
        "(tl.exp(2.0 * magnitude) - 1.0) / (tl.exp(2.0 * magnitude) + 1.0)",
        "test_extremes_kernels.py::test_recurrences_at_every_scale[fp32-saturated by the input-rnn_tanh]",
        interpreted=True,
    ),
    Guard(
        "sigmoid saturates rather than dividing infinities",
        "kernels/activations.py",
        "return 1.0 / (1.0 + tl.exp(-x))",
        "return tl.exp(x) / (1.0 + tl.exp(x))",
        "test_extremes_kernels.py::test_recurrences_at_every_scale[fp32-saturated by the input-lstm]",
        interpreted=True,
    ),
    Guard(
        "the online softmax takes the largest score away before it exponentiates",
        "kernels/attention/forward.py",
        "p = tl.exp2(logits * unit - base[:, None])",
        "p = tl.exp2(logits * unit)",
        "test_extremes_kernels.py::test_attention_at_every_scale[fp32-logits of 1e3]",
        interpreted=True,
    ),
    Guard(
        "backward makes probabilities of the largest score and the sum, not of the log-sum-exp",
        "kernels/attention/scores.py",
        "return tl.exp2(tl.minimum(logits - row_max, 0.0)) * row_scale",
        "return tl.exp2(logits - (row_max - tl.log2(row_scale)))",
        "test_attention_kernels.py::test_a_log_sum_exp_far_from_zero",
        interpreted=True,
    ),
    Guard(
        "no score's gradient comes from keys that are not there",
        "kernels/attention/backward.py",
        "features, whole, end,\n        GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, PRECISION,",
        "features, whole, end,\n        GROUP, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, PRECISION,",
        "test_extremes_kernels.py::test_large_incoming_gradients[plain]",
        interpreted=True,
    ),
    Guard(
        "masks, slopes and sinks that base 2 cannot hold stay as they are",
        "kernels/attention/scores.py",
        "return given * tl.where(tl.abs(given) <= LARGEST, LOG2_E, 1.0)",
        "return given * LOG2_E",
        "test_extremes_kernels.py::test_masks_near_the_largest_number[fp32-2.5e+38-everywhere-1]",
        interpreted=True,
    ),
    Guard(
        "so does a sink in its own gradient",
        "seqcore/ops/attention_launch.py",
        "torch.where(logits.abs() <= LARGEST.value, logits * math.log2(math.e), logits)",
        "logits * math.log2(math.e)",
        "test_extremes_kernels.py::test_slopes_and_sinks_near_the_largest_number[fp32-sinks-False]",
        interpreted=True,
    ),
    Guard(
        "a softcap that the scale cannot be divided by is refused",
        "seqcore/functional/attention_checks.py",
        "return max(1.0, abs(scale)) / LARGEST_DIVISOR <= softcap <= LARGEST_DIVISOR",
        "return 0 < softcap <= LARGEST",
        "test_attention_errors.py::test_attention[softcap denormal]",
    ),
    Guard(
        "a relu lets NaN through",
        "kernels/recurrence/cells.py",
        "h = tl.where(a < 0.0, 0.0, a)",
        "h = tl.where(a > 0.0, a, 0.0)",
        "test_extremes_kernels.py::test_what_overflows_is_infinite_where_torchs_is",
        interpreted=True,
    ),
    Guard(
        "c is kept in float32 over a sequence of 16 bits",
        "seqcore/reference/recurrence.py",
        "return new_h, None if c is None else state[1]",
        "return new_h, None if c is None else state[1].to(h.dtype)",
        "test_reference_recurrence.py::test_cell_state_is_kept_in_float32",
    ),
]
