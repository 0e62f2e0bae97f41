"""Limits: offsets beyond 2^31 elements, sizes beyond a grid's, memory that runs out, and work that grows."""

from .kinds import Guard, Promise, interpreted_in

_GRIDS, _MEMORY, _GPU = "test_limits.py", "test_out_of_memory.py", "test_limits_gpu.py"
_ATTENTION, _RECURRENCE = "test_limits_attention.py", "test_limits_recurrence.py"

PROMISES = [
    Promise(
        "Tensors of attention may have more than 2^31 elements, along each of their dimensions.",
        "Interpreted programs at the far end of outputs, statistics, parts, masks and their gradients of billions of "
        "elements, whose memory nobody touches, give the bits of a small problem; and so with each input's strides. On "
        "a GPU, real ones: the last sequence of many.",
        (
            f"{_ATTENTION}::test_attention",
            f"{_ATTENTION}::test_packed_attention",
            f"{_ATTENTION}::test_averaged_weights",
            f"{_ATTENTION}::test_strides",
            "test_attention_memory.py::test_offsets_beyond_31_bits_in_a_mask",
            "test_attention_memory.py::test_offsets_beyond_31_bits_in_keys",
            f"{_GPU}::test_attention_of_more_elements_than_32_bits_count",
        ),
    ),
    Promise(
        "So may those of recurrences: inputs, states, what is kept for backward, and weights.",
        "Launches for the last sequences of a batch of more than 2^30, and tiles of weights at their far end; on a "
        "GPU, the last sequences of many.",
        (
            f"{_RECURRENCE}::test_sequences",
            f"{_RECURRENCE}::test_single_steps",
            f"{_RECURRENCE}::test_pointwise_steps",
            f"{_RECURRENCE}::test_weights",
            f"{_RECURRENCE}::test_exchange",
            f"{_GPU}::test_recurrence_of_more_elements_than_32_bits_count",
        ),
    ),
    Promise(
        "Batches, heads, lengths, inputs and blocks may pass 65,535, where CUDA's grids end along y and z; what not "
        "even x can count is refused.",
        "Every launch of operators given such sizes, none of which runs; on a GPU, a few of them run.",
        (
            f"{_GRIDS}::test_attention_fits_into_grids",
            f"{_GRIDS}::test_recurrences_fit_into_grids",
            f"{_GRIDS}::test_more_tiles_than_a_grid_has_are_refused",
            f"{_GRIDS}::test_more_rows_than_are_put_together_go_through_the_plain_kernel",
            f"{_GPU}::test_attention_of_many",
            f"{_GPU}::test_recurrence_of_many",
            f"{_GPU}::test_recurrence_of_many_blocks",
        ),
    ),
    Promise(
        "A call that runs out of memory raises torch's own error and leaves nothing behind: no switch, no choice of a "
        "backend, nothing in a KVCache; the next call gives the bits it would have given.",
        "Each tensor in turn that a call would make, forward and backward, raises instead; on a GPU, a request that is "
        "really too large.",
        (
            f"{_MEMORY}::test_attention_runs_out_of_memory",
            f"{_MEMORY}::test_other_backends_run_out_of_memory",
            f"{_MEMORY}::test_recurrences_run_out_of_memory",
            f"{_MEMORY}::test_what_launches_kernels_runs_out_of_memory",
            f"{_MEMORY}::test_modules_run_out_of_memory",
            f"{_MEMORY}::test_a_cache_runs_out_of_memory",
            f"{_MEMORY}::test_what_ran_out_of_memory_runs_again",
            f"{_GPU}::test_a_request_that_is_too_large",
        ),
    ),
    Promise(
        "Plain PyTorch does work in proportion to steps, and to packed sequences, backward too.",
        "Bytes of all tensors that are made, for four times as many.",
        ("test_linear_work.py",),
    ),
]


_far_attention, _far_recurrence = interpreted_in(_ATTENTION), interpreted_in(_RECURRENCE)
_HEAD = "units = batch.to(tl.int64) * matrix.stride_b + head.to(tl.int64) * matrix.stride_h"
_ROWS = "    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_column[None, :]\n"
_LOAD = '    """Rows of a matrix, zero past either end; [len(offs_row), BLOCK_COLUMNS]."""\n'
_STORE = '    """The reverse of ``load_rows``, in the matrix\'s dtype."""\n'
_COLUMN = "    offs_column = tl.arange(0, BLOCK_COLUMNS)\n"

GUARDS = [
    _far_attention(
        "offsets of a batch are 64 bits wide",
        "kernels/attention/layout.py",
        _HEAD,
        _HEAD.replace("batch.to(tl.int64)", "batch"),
        "test_attention[batch-forward]",
    ),
    _far_attention(
        "offsets of a head are",
        "kernels/attention/layout.py",
        _HEAD,
        _HEAD.replace("head.to(tl.int64)", "head"),
        "test_attention[heads-forward]",
    ),
    _far_attention(
        "offsets of a packed sequence are",
        "kernels/attention/layout.py",
        "first_row.to(tl.int64) * matrix.stride_row",
        "first_row * matrix.stride_row",
        "test_packed_attention",
    ),
    _far_attention(
        "offsets of rows that are loaded are",
        "kernels/attention/layout.py",
        _LOAD + _COLUMN + _ROWS,
        _LOAD + _COLUMN + _ROWS.replace(".to(tl.int64)", ""),
        "test_attention[queries-forward]",
    ),
    _far_attention(
        "offsets of rows that are stored are",
        "kernels/attention/layout.py",
        _STORE + _COLUMN + _ROWS,
        _STORE + _COLUMN + _ROWS.replace(".to(tl.int64)", ""),
        "test_attention[queries-forward]",
    ),
    _far_attention(
        "offsets of statistics are",
        "kernels/attention/layout.py",
        "(place.batch.to(tl.int64) * H + head) * M",
        "(place.batch * H + head) * M",
        "test_attention[heads-forward]",
    ),
    _far_attention(
        "offsets of delta's rows are",
        "kernels/attention/backward.py",
        "batch_head = (tl.program_id(0) // blocks).to(tl.int64)",
        "batch_head = tl.program_id(0) // blocks",
        "test_attention[heads-forward]",
    ),
    _far_attention(
        "offsets of a mask's batch are",
        "kernels/attention/scores.py",
        "place.batch.to(tl.int64) * features.stride_mask_b",
        "place.batch * features.stride_mask_b",
        "test_attention[batch-forward]",
    ),
    _far_attention(
        "offsets of a mask's head are",
        "kernels/attention/scores.py",
        "head.to(tl.int64) * features.stride_mask_h",
        "head * features.stride_mask_h",
        "test_attention[heads-forward]",
    ),
    _far_attention(
        "offsets of a mask's rows are",
        "kernels/attention/scores.py",
        "(place.first_row + m).to(tl.int64) * features.stride_mask_m",
        "(place.first_row + m) * features.stride_mask_m",
        "test_attention[queries-forward]",
    ),
    _far_attention(
        "offsets of a mask's gradient are",
        "kernels/attention/bias.py",
        "batch_head = place.batch.to(tl.int64) * groups + place.head",
        "batch_head = place.batch * groups + place.head",
        "test_attention[heads-forward]",
    ),
    _far_attention(
        "offsets of a part of decoding are",
        "kernels/attention/decode.py",
        "first = split.to(tl.int64) * rows",
        "first = split * rows",
        "test_attention[heads-decode]",
    ),
    _far_attention(
        "offsets of the parts that are put together are",
        "kernels/attention/decode.py",
        "first = tl.full([], 0, tl.int64)",
        "first = tl.full([], 0, tl.int32)",
        "test_attention[heads-decode]",
    ),
    _far_attention(
        "offsets of averaged weights are",
        "kernels/attention/weights.py",
        "(place.batch.to(tl.int64) * M + offs_m[:, None]) * N",
        "(place.batch * M + offs_m[:, None]) * N",
        "test_averaged_weights[keys]",
    ),
    _far_attention(
        "rows a long way apart are not counted in units",
        "seqcore/ops/attention_arguments.py",
        " or strides[2] >= FAR else unit",
        " else unit",
        "test_strides[query]",
    ),
    _far_recurrence(
        "rows of a step are numbered in 64 bits",
        "kernels/recurrence/layout.py",
        "rows = t.to(tl.int64) * B + offs_b",
        "rows = (t * B + offs_b.to(tl.int32)).to(tl.int64)",
        "test_sequences[gru-padded]",
    ),
    _far_recurrence(
        "and in the map, for each direction",
        "kernels/recurrence/layout.py",
        "source_ptr + direction.to(tl.int64) * R + rows",
        "source_ptr + (direction * R).to(tl.int32) + rows",
        "test_sequences[gru-masked]",
    ),
    _far_recurrence(
        "offsets of forward's sequences are 64 bits wide",
        "kernels/recurrence/forward.py",
        "offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)",
        "offs_b = group * BLOCK_B + tl.arange(0, BLOCK_B)",
        "test_sequences[gru-padded]",
    ),
    _far_recurrence(
        "offsets of forward's final states are",
        "kernels/recurrence/forward.py",
        "final = direction.to(tl.int64) * B * H",
        "final = direction * B * H",
        "test_sequences[gru-padded]",
    ),
    _far_recurrence(
        "offsets of backward's sequences are",
        "kernels/recurrence/backward.py",
        "offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)",
        "offs_b = group * BLOCK_B + tl.arange(0, BLOCK_B)",
        "test_sequences[gru-padded]",
    ),
    _far_recurrence(
        "offsets of backward's initial states are",
        "kernels/recurrence/backward.py",
        "initial = direction.to(tl.int64) * initial_rows * H",
        "initial = direction * initial_rows * H",
        "test_sequences[gru-padded]",
    ),
    _far_recurrence(
        "offsets of states that are put in are",
        "kernels/recurrence/backward.py",
        "reset_offs = state_offs + B.to(tl.int64) * H",
        "reset_offs = state_offs + B * H",
        "test_sequences[gru-reset to given states]",
    ),
    _far_recurrence(
        "offsets of a single step's sequences are",
        "kernels/recurrence/step.py",
        "offs_b = (group * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)",
        "offs_b = group * BLOCK_B + tl.arange(0, BLOCK_B)",
        "test_single_steps",
    ),
    _far_recurrence(
        "offsets of steps that are made again are",
        "kernels/recurrence/pointwise.py",
        "BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)",
        "BLOCK_B + tl.arange(0, BLOCK_B))",
        "test_pointwise_steps[lstm]",
    ),
    _far_recurrence(
        "offsets of weights are where they have to be",
        "kernels/recurrence/products.py",
        "return rows.to(tl.int64) if ELEMENTS > 2**31 else rows",
        "return rows",
        "test_weights[one-]",
    ),
    _far_recurrence(
        "and for that are counted whole",
        "kernels/recurrence/products.py",
        "UNITS + place % UNITS, GATES * BLOCKS * UNITS * UNITS)",
        "UNITS + place % UNITS, GATES * UNITS * UNITS)",
        "test_weights[blocks-swapped]",
    ),
    _far_recurrence(
        "offsets of an exchange are 64 bits wide",
        "kernels/floors.py",
        "stride_step = teams.to(tl.int64) * (BLOCK_B * WIDTH)",
        "stride_step = teams * (BLOCK_B * WIDTH)",
        "test_exchange",
    ),
    Guard(
        "single steps have a grid of one dimension",
        "seqcore/ops/sequence.py",
        "kernels.recurrence_step_kernel[(plan.groups * layer.blocks * plan.slices,)](",
        "kernels.recurrence_step_kernel[(plan.groups, layer.blocks * plan.slices)](",
        f"{_GRIDS}::test_recurrences_fit_into_grids[one step of blocks-saved]",
    ),
    Guard(
        "more tiles than a grid has are refused",
        "seqcore/ops/attention_arguments.py",
        "    if programs >= FAR:\n",
        "    if programs > FAR:\n",
        f"{_GRIDS}::test_more_tiles_than_a_grid_has_are_refused[sequences]",
    ),
    Guard(
        "rows that 32 bits cannot number are not put together",
        "seqcore/ops/attention_arguments.py",
        " or batch * self.heads_kv * group * M >= FAR:",
        ":",
        f"{_GRIDS}::test_more_rows_than_are_put_together_go_through_the_plain_kernel",
    ),
    Guard(
        "the library's switch for products is put back, whatever happens",
        "seqcore/ops/precision.py",
        "        finally:\n            switch.fp32_precision = before\n",
        "        except ZeroDivisionError:\n            pass\n        switch.fp32_precision = before\n",
        f"{_MEMORY}::test_what_launches_kernels_runs_out_of_memory[rnn_tanh]",
    ),
    Guard(
        "a cache writes nothing before all that could fail is done",
        "seqcore/nn/cache.py",
        "        buffers = (self.keys, self.values, self.lengths)\n"
        "        # All or nothing, should there be no memory for one of the copies.\n"
        "        for buffer, copy in zip(buffers, [buffer[index] for buffer in buffers], strict=True):\n"
        "            buffer.copy_(copy)\n",
        "        for buffer in (self.keys, self.values, self.lengths):\n            buffer.copy_(buffer[index])\n",
        f"{_MEMORY}::test_a_cache_runs_out_of_memory[reorder]",
    ),
    Guard(
        "a cache is emptied by operations that take no memory",
        "seqcore/nn/cache.py",
        "buffer.index_fill_(0, index.flatten(), 0)",
        "buffer.copy_(buffer.index_fill(0, index.flatten(), 0))",
        f"{_MEMORY}::test_a_cache_runs_out_of_memory[reset]",
    ),
    Guard(
        "steps of the reference are split once",
        "seqcore/reference/recurrence.py",
        "advance(cell, x_gates[t], h_in",
        "advance(cell, torch.cat(x_gates)[steps.rows(t)], h_in",
        "test_linear_work.py::test_recurrences[lstm-padded]",
    ),
    Guard(
        "so are packed sequences",
        "seqcore/reference/packed.py",
        "    return tensor.split([*sizes, tensor.shape[dim] - ends[-1]], dim)[:-1]\n",
        "    return [tensor.narrow(dim, begin, end - begin) for begin, end in pairwise(ends)]\n",
        "test_linear_work.py::test_packed_attention[None]",
    ),
]
