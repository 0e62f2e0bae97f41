"""Attention, its modules and the tools on whatever is drawn: valid calls of every kind, and calls that nobody makes."""

from .kinds import Guard, Promise

ARGUMENTS, TOOLS, CACHE = "test_drawn_attention_arguments.py", "test_drawn_tools.py", "test_drawn_cache.py"
DRAWN_ATTENTION, INPUTS = "test_attention_drawn.py", "test_attention_inputs.py"

# The test that draws arguments of each public name.
DRAWN = {
    "seqcore.Device": f"{TOOLS}::test_device",
    "seqcore.explain": f"{TOOLS}::test_tools[explain]",
    "seqcore.replace": f"{TOOLS}::test_tools[replace]",
    "seqcore.replace_sdpa": f"{TOOLS}::test_tools[replace_sdpa]",
    "seqcore.restore": f"{TOOLS}::test_tools[restore]",
    "seqcore.use_backend": f"{TOOLS}::test_tools[use_backend]",
    "seqcore.functional.alibi_slopes": f"{ARGUMENTS}::test_positions_and_caches[alibi_slopes]",
    "seqcore.functional.attention": f"{DRAWN_ATTENTION}::test_whatever_is_asked",
    "seqcore.functional.rotary": f"{ARGUMENTS}::test_positions_and_caches[rotary]",
    "seqcore.functional.scaled_dot_product_attention": f"{ARGUMENTS}::test_attention[scaled_dot_product_attention]",
    "seqcore.functional.sinusoidal_positions": f"{ARGUMENTS}::test_positions_and_caches[sinusoidal_positions]",
    "seqcore.nn.KVCache": f"{CACHE}::test_whatever_is_done_to_a_cache",
    "seqcore.nn.LearnedPositions": f"{ARGUMENTS}::test_positions_and_caches[LearnedPositions]",
    "seqcore.nn.MultiheadAttention": f"{ARGUMENTS}::test_multihead_attention",
    "seqcore.nn.RotaryPositions": f"{ARGUMENTS}::test_positions_and_caches[RotaryPositions]",
    "seqcore.nn.SinusoidalPositions": f"{ARGUMENTS}::test_positions_and_caches[SinusoidalPositions]",
    "seqcore.testing.assert_within_budget": f"{TOOLS}::test_a_budget_is_kept_or_not_or_cannot_be_asked_for",
    "seqcore.testing.check_budget": f"{TOOLS}::test_tools[check_budget]",
    "seqcore.distributed.TimePipeline": f"{TOOLS}::test_tools[TimePipeline]",
    "seqcore.distributed.gather_sequence": f"{TOOLS}::test_tools[gather_sequence]",
    "seqcore.distributed.ring_attention": f"{TOOLS}::test_tools[ring_attention]",
    "seqcore.distributed.shard_sequence": f"{TOOLS}::test_tools[shard_sequence]",
    "seqcore.distributed.ulysses_attention": f"{TOOLS}::test_tools[ulysses_attention]",
}

PROMISES = [
    Promise(
        "Whatever shapes, strides, dtypes and options come together, attention and its gradients are within the "
        "error budget, and inputs keep their bits.",
        "Hypothesis draws calls of everything at once; kernels, the operators' formulas for a CPU and the reference "
        "are held to float64, and what torch can be asked for to torch.",
        (DRAWN_ATTENTION,),
    ),
    Promise(
        "So does MultiheadAttention, whatever flags, forms of input and masks come together.",
        "Hypothesis draws modules and calls; outputs and all gradients are torch's, in float64.",
        ("test_multihead_drawn.py",),
    ),
    Promise(
        "Arguments that make no sense are refused with InvalidInput or UnsupportedInput, in words that say what was "
        "given, or, by the module, as torch's module refuses them; what attention's functions take, they answer as "
        "the reference answers it.",
        "Hypothesis replaces one or two arguments of a valid call by anything: other ranks, sizes, dtypes, devices and "
        "layouts, numbers out of range, strings, types, objects; or all tensors by sparse, nested or float8 ones. "
        "Warnings are failures. Of what the functions take, "
        "values are compared in float64; of the module's answers, shapes with those of torch's module. Of positions, "
        "caches and tools it is only asked that they answer or refuse: their results are held elsewhere, for "
        "arguments that make sense.",
        (ARGUMENTS, TOOLS, "test_attention_errors.py"),
    ),
    Promise(
        "A cache of keys and values holds what was appended, whatever is done to it, and nothing that was refused.",
        "Drawn sequences of operations beside plain lists of tokens; a module refused by its backend between steps.",
        (CACHE, "test_kv_cache.py"),
    ),
    Promise(
        "What is not finite behind lengths, or in another packed sequence, reaches no result and no gradient.",
        "NaN and infinity are put there, into inputs, masks and incoming gradients: all else must keep its bits.",
        (
            f"{INPUTS}::test_nothing_behind_lengths_reaches_anything",
            f"{INPUTS}::test_packed_sequences_never_meet",
            f"{INPUTS}::test_a_head_of_a_sequence_is_reached_by_its_own_alone",
            "test_attention_decode.py::test_nothing_in_the_padding_matters",
        ),
    ),
    Promise(
        "A key reaches the results of those queries only that see it, behind masks of bools, causality and windows "
        "too; what masks do not promise is written down, and held to.",
        "NaN and infinity in a key that some queries see, and behind masks.",
        (
            f"{INPUTS}::test_a_key_reaches_only_queries_that_see_it",
            f"{INPUTS}::test_zero_times_nan_is_nan_behind_a_mask",
        ),
    ),
    Promise(
        "Under torch's FakeTensorMode, which has shapes and no values, lengths, packed attention and caches are taken.",
        "Recurrences, attention, caches and positions.",
        ("test_fake_tensors.py",),
    ),
    Promise(
        "Query, key, value and mask may share memory: their gradients add up.",
        "One tensor for all, views of one storage, overlapping rows, rows of stride 0.",
        (f"{INPUTS}::test_gradients_of_inputs_that_share_memory_add_up",),
    ),
]  # fmt: skip

LENGTHS = f"{INPUTS}::test_nothing_behind_lengths_reaches_anything"
PACKED = f"{INPUTS}::test_packed_sequences_never_meet"

GUARDS = [
    Guard(
        "what either mask forbids is forbidden",
        "seqcore/nn/attention.py",
        "~(masks[0] | masks[1])",
        "~masks[0]",
        "test_multihead_drawn.py::test_whatever_is_asked",
    ),
    Guard(
        "flags of attention are True or False",
        "seqcore/functional/attention_checks.py",
        "    check_flags(NAME, enable_gqa=enable_gqa, return_lse=return_lse)\n",
        "",
        f"{ARGUMENTS}::test_attention_with_each_argument_replaced[attention]",
    ),
    Guard(
        "float8 is no dtype that attention computes in",
        "seqcore/functional/arguments.py",
        "    if value.dtype not in FLOATS:",
        "    if not value.is_floating_point():",
        f"{ARGUMENTS}::test_attention_with_each_argument_replaced[attention]",
    ),
    Guard(
        "what is rotated is dense",
        "seqcore/functional/positions.py",
        '    check_floating("rotary", "x", x)\n',
        "",
        f"{ARGUMENTS}::test_positions_and_caches_with_each_argument_replaced[rotary]",
    ),
    Guard(
        "a fake tensor's values are not looked at",
        "seqcore/reference/sizes.py",
        "    return not tensor.is_meta and not is_fake(tensor)",
        "    return not tensor.is_meta",
        "test_fake_tensors.py::test_caches",
    ),
    Guard(
        "a size is none if it is a bool",
        "seqcore/functional/arguments.py",
        "    return isinstance(value, int) and not isinstance(value, bool) and",
        "    return isinstance(value, int) and",
        "test_kv_cache.py::test_wrong_input_is_named_and_nothing_written[reset of True]",
    ),
    Guard(
        "a base is a number, positive and finite",
        "seqcore/functional/positions.py",
        "    check_base(name, base)\n",
        "",
        f"{ARGUMENTS}::test_positions_and_caches_with_each_argument_replaced[rotary of each sequence]",
    ),
    Guard(
        "devices and dtypes are checked before anything is made of them",
        "seqcore/nn/cache.py",
        '        check_factory("KVCache", device, dtype)\n',
        "",
        f"{ARGUMENTS}::test_positions_and_caches_with_each_argument_replaced[KVCache]",
    ),
    Guard(
        "what is explained can be called, on a device that describes one",
        "seqcore/backends.py",
        "    if device is not None and not isinstance(device, Device):",
        "    if False:",
        f"{TOOLS}::test_tools_with_each_argument_replaced[explain]",
    ),
    Guard(
        "a device's description is made of a string and integers",
        "kernels/tuning.py",
        "any(type(number) is not int or number < 0 for number in numbers)",
        "False",
        f"{TOOLS}::test_device",
    ),
    Guard(
        "a filter can be called",
        "seqcore/replacement.py",
        "    if filter_fn is not None and not callable(filter_fn):",
        "    if False:",
        f"{TOOLS}::test_tools_with_each_argument_replaced[replace]",
    ),
    Guard(
        "a budget is asked of tensors that hold numbers",
        "seqcore/testing/budget.py",
        "        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:",
        "        if False:",
        f"{TOOLS}::test_tools_with_each_argument_replaced[check_budget]",
    ),
    Guard(
        "a group is a process group",
        "seqcore/distributed/layout.py",
        "    if not isinstance(group, dist.ProcessGroup) and",
        "    if False and",
        f"{TOOLS}::test_tools_with_each_argument_replaced[shard_sequence]",
    ),
    Guard(
        "tokens that nobody attended to are taken back",
        "seqcore/nn/attention.py",
        "                cache._take_back(key.shape[1])\n",
        "                pass\n",
        f"{CACHE}::test_what_a_backend_refuses_is_not_appended",
    ),
    Guard(
        "a cache that has no room writes nothing",
        "seqcore/nn/cache.py",
        "        self._check_room(M, counts)\n",
        "",
        f"{CACHE}::test_whatever_is_done_to_a_cache",
    ),
    Guard(
        "tokens past a sequence's own count are not written",
        "seqcore/nn/cache.py",
        "made.append(new if kept is None else torch.where(kept, new, buffer[place]))",
        "made.append(new)",
        "test_kv_cache.py::test_ragged_pieces_may_fill_a_sequence_and_leave_others_alone",
    ),
    Guard(
        "the reference takes packed sequences one by one",
        "seqcore/ops/attention.py",
        "        found = packed_reference.backward(dout,",
        "        found = packed_reference.dense_backward(dout,",
        f"{PACKED}[operators-key-nan]",
    ),
    Guard(
        "gradients that arrive behind lengths are not looked at",
        "seqcore/reference/attention_backward.py",
        '    dout = without_padding(dout, sequences["query_lengths"])\n',
        "",
        f"{LENGTHS}[operators-nan-plain]",
    ),
    Guard(
        "the reference's padding passes no gradient on",
        "seqcore/reference/attention.py",
        "    return Result(without_padding(out, query_lengths, out.dim()), lse, weights, rows)",
        "    return Result(out, lse, weights, rows)",
        f"{LENGTHS}[reference-nan-plain]",
    ),
    Guard(
        "keys behind lengths are zeros to the reference",
        "seqcore/reference/attention.py",
        "    key, value = (without_padding(t, key_lengths, rank) for t in (key, value))\n    logits, _",
        "    logits, _",
        f"{LENGTHS}[reference-inf-plain]",
    ),
    Guard(
        "a sink's gradient takes nothing from the padding",
        "seqcore/ops/attention_launch.py",
        "        inside = inside & (torch.arange(delta.shape[2], device=delta.device) < lengths[:, None, None])\n",
        "        inside = inside & (lengths[:, None, None] >= 0)\n",
        f"{LENGTHS}[triton-nan-plain]",
        interpreted=True,
    ),
    Guard(
        "the log-sum-exp's gradient behind lengths is not looked at",
        "seqcore/reference/attention_backward.py",
        'without_padding(dlse[..., None], sequences["query_lengths"]).squeeze(-1)',
        "dlse",
        f"{LENGTHS}[operators-nan-plain]",
    ),
    Guard(
        "averaged weights' gradient behind lengths is not looked at",
        "seqcore/reference/attention_backward.py",
        '    dweights = weights_without_padding(dweights, options["query_lengths"], options["key_lengths"], rank=3)\n',
        "",
        f"{LENGTHS}[operators-nan-average]",
    ),
    Guard(
        "the reference's log-sum-exp is a constant behind lengths",
        "seqcore/reference/attention.py",
        "    lse = without_padding(lse[..., None], query_lengths, rank, lse[..., None].detach()).squeeze(-1)\n",
        "",
        f"{LENGTHS}[reference-nan-plain]",
    ),
    Guard(
        "the reference's weights are constants behind lengths",
        "seqcore/reference/attention.py",
        "    weights = weights_without_padding(weights, query_lengths, key_lengths, rank)\n",
        "",
        f"{LENGTHS}[reference-nan-per_head]",
    ),
    Guard(
        "weights are constants behind the lengths of keys too",
        "seqcore/reference/attention.py",
        "    return without_padding(weights.transpose(-2, -1), key_lengths, rank).transpose(-2, -1)",
        "    return weights",
        f"{LENGTHS}[operators-nan-average]",
    ),
    Guard(
        "kernels load zeros past a sequence's rows",
        "kernels/attention/layout.py",
        "            columns = _within(tl.load(sequences.k_ptr + sequence), N)",
        "            columns = columns + 0",
        f"{LENGTHS}[triton-nan-plain]",
        interpreted=True,
    ),
    Guard(
        "kernels end a packed sequence's keys where it ends",
        "kernels/attention/layout.py",
        "        columns = _within(tl.load(sequences.k_ptr + sequence + 1) - first_column, N - first_column)",
        "        columns = N - first_column",
        f"{PACKED}[triton-value-nan]",
        interpreted=True,
    ),
    Guard(
        "a bool mask chooses, and does not add",
        "seqcore/reference/attention.py",
        "            visible = visible & attn_mask\n",
        "            logits = logits + torch.where(attn_mask, 0.0, NEGATIVE_INFINITY)\n",
        f"{INPUTS}::test_a_key_reaches_only_queries_that_see_it[reference-bool mask-nan]",
    ),
    Guard(
        "kernels choose by a bool mask, and do not add",
        "kernels/attention/scores.py",
        "            logits = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, logits, float(\"-inf\"))",
        "            logits += tl.where(tl.load(ptrs, mask=inside, other=0) != 0, 0.0, float(\"-inf\"))",
        f"{INPUTS}::test_a_key_reaches_only_queries_that_see_it[triton-bool mask-nan]",
        interpreted=True,
    ),
    Guard(
        "inputs are not written",
        "seqcore/reference/attention.py",
        "    weights, lse, rows = normalise(logits, sinks)\n",
        "    weights, lse, rows = normalise(logits, sinks)\n    query.data.mul_(2)\n",
        f"{DRAWN_ATTENTION}::test_what_torch_can_be_asked_for[reference]",
    ),
    Guard(
        "backward by hand sums a group's gradients",
        "seqcore/reference/attention_backward.py",
        "    dk, dv = (x.unflatten(1, (key.shape[1], group)).sum(2) for x in (dk, dv))",
        "    dk, dv = (x.unflatten(1, (key.shape[1], group)).select(2, 0) for x in (dk, dv))",
        f"{DRAWN_ATTENTION}::test_whatever_is_asked_of_the_operators",
    ),
    Guard(
        "each input has a gradient of its own, whatever memory it shares",
        "seqcore/autograd/attention.py",
        "        wanted = [ctx.needs_input_grad[i] for i in (1, 2, 3, 4, 6)]",
        "        alone = tensors[0].data_ptr() != tensors[1].data_ptr()\n"
        "        wanted = [ctx.needs_input_grad[i] and (i != 2 or alone) for i in (1, 2, 3, 4, 6)]",
        f"{INPUTS}::test_gradients_of_inputs_that_share_memory_add_up[operators-one tensor]",
    ),
]
