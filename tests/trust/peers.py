"""What the issue trackers of other libraries tell of, which does not happen here."""

from .kinds import Guard, Promise

PEERS, EDGES = "test_peers_bugs.py", "test_attention_edges.py"
AUTOCAST, BIAS = "test_mixed_precision.py::test_autocast", f"{EDGES}::test_a_causal_bias"

PROMISES = [
    Promise(
        "A log-sum-exp far below zero behind a mask gives no NaN gradient, whatever the length (pytorch 196678).",
        "192 queries and keys under masks of -1e4 and -2e4; rows masked by the lowest finite number.",
        (
            "test_attention_kernels.py::test_a_log_sum_exp_far_from_zero",
            "test_attention_kernels.py::test_masks_of_the_lowest_finite_number",
            "test_attention_kernels.py::test_rows_masked_by_the_lowest_finite_number_are_plain_means",
        ),
    ),
    Promise(
        "A float32 mask beside half queries is read as float32 (pytorch 191612).",
        "Masks of 1e6, which half cannot hold, and of -300, where it keeps no differences, in functions and modules, "
        "under autocast too; backends that would misread them are not chosen.",
        (
            "test_attention_kernels.py::test_a_float32_mask_with_queries_of_another_dtype",
            "test_multihead_attention.py::test_a_float32_mask_of_a_half_module_stays_float32",
            "test_multihead_attention.py::test_a_mask_of_any_dtype_is_taken_for_its_numbers",
            f"{AUTOCAST}_leaves_a_mask_as_it_is",
            f"{AUTOCAST}_leaves_the_operators_mask_as_it_is",
            f"{AUTOCAST}_of_float64_beside_a_narrower_mask",
            f"{AUTOCAST}_beside_a_mask_of_another_dtype",
            "test_mixed_precision.py::test_why_torchs_operator_does_not_serve_a_mask_under_autocast",
        ),
    ),
    Promise(
        "torch's CausalBias, whose elements nobody has written, is read as the causality that it stands for, or "
        "refused.",
        "Both kinds, with more queries than keys and fewer, beside torch's attention under the mask that they spell "
        "out; through all functions, torch's own served by ours, and the kernels; beside options that go by positions.",
        (
            f"{BIAS}_is_what_it_stands_for",
            f"{EDGES}::test_torchs_own_operator_takes_a_causal_bias_as_causality",
            f"{EDGES}::test_kernels_take_a_causal_bias_as_causality",
            f"{BIAS}_that_says_something_else_is_refused",
            f"{EDGES}::test_the_module_refuses_a_causal_bias",
        ),
    ),
    Promise(
        "Sequences of nothing but padding give zeros and finite gradients, also where weights are asked for "
        "(pytorch 152028).",
        "Masks of both kinds that leave a row nothing, in the functions, the kernels and the module.",
        (
            "test_attention_weights.py::test_rows_of_nothing_but_padding_are_zeros",
            "test_multihead_attention.py::test_a_sequence_of_padding_alone_gives_zeros_and_finite_gradients",
            "test_attention_kernels.py::test_rows_that_see_nothing_give_zeros_and_finite_gradients",
            "test_attention_features.py::test_windows_where_queries_outnumber_keys",
        ),
    ),
    Promise(
        "Gradients may be asked of the mask alone (pytorch 148476).",
        "Of every single input, the others requiring none.",
        ("test_attention_bias_gradient.py::test_only_it_requires_a_gradient",),
    ),
    Promise(
        "Sequences without a step and packed sequences that are empty are served, where torch refuses to pack them.",
        "Lengths of 0, all of them too; empty queries, keys and both, first, last and side by side.",
        (
            f"{PEERS}::test_sequences_without_a_step",
            f"{PEERS}::test_packed_sequences_of_which_some_are_empty",
        ),
    ),
    Promise(
        "Dropout under the same seed drops the same elements, forward and backward, bit for bit.",
        "Between layers and in attention, with and without a seed of one's own, other draws in between.",
        (
            f"{PEERS}::test_dropout_between_layers_repeats_bit_for_bit",
            f"{PEERS}::test_dropout_of_attention_repeats_bit_for_bit",
            "test_recurrence_modules.py::test_dropout_draws_the_same_mask_under_the_same_seed",
            "test_attention_features.py::test_repeats_are_bitwise_equal",
        ),
    ),
    Promise(
        "Nothing ends at 65,535: neither steps, queries, keys nor heads.",
        "65,537 of each in plain PyTorch; of launches, that they keep to the dimension of a grid that has room for "
        "them, and on a GPU 70,000 of each.",
        (
            f"{PEERS}::test_more_steps_than_65535",
            f"{PEERS}::test_more_queries_and_keys_than_65535",
            f"{PEERS}::test_more_heads_than_a_grids_second_dimension_has_room_for",
            "test_limits.py::test_attention_fits_into_grids",
            "test_limits.py::test_recurrences_fit_into_grids",
            "test_limits_gpu.py",
        ),
    ),
    Promise(
        "Batches of none, states that lie apart in memory and sequences without a batch are taken as torch takes them.",
        "Every recurrence, and the attention module, beside torch's.",
        (
            f"{PEERS}::test_batch_first_means_nothing_without_a_batch",
            f"{PEERS}::test_a_batch_of_none_with_a_state_that_lies_apart",
            f"{PEERS}::test_the_module_on_nothing",
            "test_recurrence_modules.py::test_empty_batch",
            "test_input_forms.py::test_layouts",
        ),
    ),
    Promise(
        "Products that half precision cannot hold are summed in float32, and scaled before they are rounded.",
        "Half queries and keys whose products pass 65,504 and whose scores do not.",
        (f"{PEERS}::test_half_products_larger_than_half",),
    ),
    Promise(
        "A tensor that backward needs and that was written since is told of, and an expanded gradient read as it lies.",
        "Writing between forward and backward; the gradient that a sum sends, of stride 0.",
        (
            f"{PEERS}::test_what_backward_needs_and_was_written_since_is_told",
            f"{PEERS}::test_a_gradient_that_is_expanded",
            "test_attention_kernels.py::test_strides_of_the_outputs_gradient",
        ),
    ),
]  # fmt: skip

GUARDS = [
    Guard(
        "backward rebuilds probabilities from the largest score and the sum, and not from the log-sum-exp",
        "kernels/attention/forward.py",
        "    tl.store(row_max_ptr + row, row_max, mask=offs_m < rows)",
        "    tl.store(row_max_ptr + row, row_max + tl.log2(1.0 / row_scale), mask=offs_m < rows)",
        "test_attention_kernels.py::test_a_log_sum_exp_far_from_zero_with_a_tile_half_full[fp32]",
        interpreted=True,
    ),
    Guard(
        "a float32 mask is widened, not narrowed",
        "kernels/attention/scores.py",
        "            bias = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)",
        "            bias = tl.load(ptrs, mask=inside, other=0.0).to(tl.float16).to(tl.float32)",
        "test_attention_kernels.py::test_a_float32_mask_with_queries_of_another_dtype[fp16]",
        interpreted=True,
    ),
    Guard(
        "the module leaves a float32 mask float32",
        "seqcore/nn/attention.py",
        "self.dtype if alike else wide(self.dtype)",
        "self.dtype",
        "test_multihead_attention.py::test_a_float32_mask_of_a_half_module_stays_float32[reference-no weights-torch."
        "bfloat16-None]",
    ),
    Guard(
        "torch's operator gets no mask that autocast would narrow",
        "seqcore/functional/attention.py",
        "    return autocasting(mask.device.type) or (mask.is_cuda and dtype.itemsize == 2)",
        "    return mask.is_cuda and dtype.itemsize == 2",
        f"{AUTOCAST}_leaves_a_mask_as_it_is[fp16-auto]",
    ),
    Guard(
        "torch's operator gets no mask that autocast would leave wider than the queries",
        "seqcore/functional/attention.py",
        "    if mask.dtype in (torch.bool, dtype):",
        "    if mask.dtype in (torch.bool, torch.float64, dtype):",
        f"{AUTOCAST}_beside_a_mask_of_another_dtype[fp16-torch.float64]",
    ),
    Guard(
        "a causal bias is not read",
        "seqcore/functional/attention_checks.py",
        "        attn_mask, causal = None, _causality(attn_mask, M, N)",
        "        attn_mask = attn_mask.as_subclass(torch.Tensor)[0]",
        f"{BIAS}_is_what_it_stands_for[causal_upper_left-3-5]",
    ),
    Guard(
        "a causal bias is aligned as it says",
        "seqcore/functional/attention_checks.py",
        '    return "top_left" if bias.variant.name == "UPPER_LEFT" else "lower_right"',
        '    return "top_left"',
        f"{BIAS}_is_what_it_stands_for[causal_lower_right-3-5]",
    ),
    Guard(
        "torch's operator is told of the causality that a bias stands for",
        "seqcore/functional/attention.py",
        "problem.mask, dropout_p, problem.causal is not None,",
        "problem.mask, dropout_p, causal is not None,",
        f"{EDGES}::test_torchs_own_operator_takes_a_causal_bias_as_causality[causal_upper_left]",
    ),
    Guard(
        "a row that has seen no key divides by one",
        "kernels/attention/forward.py",
        "    row_sum = tl.where(empty, 1.0, row_sum)\n",
        "",
        "test_attention_weights.py::test_rows_of_nothing_but_padding_are_zeros",
        interpreted=True,
    ),
    Guard(
        "gradients are made of what is wanted",
        "seqcore/ops/attention_launch.py",
        "    dmask = _dmask(given, inputs, mask) if want_mask else None",
        "    dmask = _dmask(given, inputs, mask) if want_mask and want_q else None",
        "test_attention_bias_gradient.py::test_only_it_requires_a_gradient",
        interpreted=True,
    ),
    Guard(
        "a packed sequence's queries stand by its own end",
        "seqcore/reference/packed.py",
        "    sizes = [end - begin for begin, end in pairwise(ends)]\n",
        "    sizes = [max(end - begin, 1) for begin, end in pairwise(ends)]\n",
        f"{PEERS}::test_packed_sequences_of_which_some_are_empty[reference]",
    ),
    Guard(
        "dropout hangs on the seed it is given",
        "seqcore/functional/attention_checks.py",
        "        return torch.tensor([seed], device=query.device)",
        "        return torch.randint(2**62, (1,), device=query.device)",
        f"{PEERS}::test_dropout_of_attention_repeats_bit_for_bit[reference-a seed]",
    ),
    Guard(
        "launches have one dimension",
        "seqcore/ops/attention_launch.py",
        "    attention_forward_kernel[(programs,)](",
        "    attention_forward_kernel[(1, programs)](",
        f"{PEERS}::test_more_heads_than_a_grids_second_dimension_has_room_for[65537-1]",
    ),
    Guard(
        "kernels sum products in float32",
        "kernels/attention/forward.py",
        "        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)\n        if EDGE or not PLAIN:",
        "        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION).to(tl.float16).to(tl.float32)\n"
        "        if EDGE or not PLAIN:",
        f"{PEERS}::test_half_products_larger_than_half[triton]",
        interpreted=True,
    ),
    Guard(
        "tensors for backward are kept where autograd sees that they are written",
        "seqcore/autograd/attention.py",
        "        ctx.save_for_backward(out, rows, *tensors)\n\n    @staticmethod\n"
        "    def backward(ctx, dout, dlse, _drows):\n        out, rows, *tensors = ctx.saved_tensors",
        "        ctx.kept = (out, rows, *tensors)\n\n    @staticmethod\n"
        "    def backward(ctx, dout, dlse, _drows):\n        out, rows, *tensors = ctx.kept",
        f"{PEERS}::test_what_backward_needs_and_was_written_since_is_told",
    ),
]
