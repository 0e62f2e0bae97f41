"""Memory: what kernels read and write, and what they leave unwritten."""

from .kinds import Promise, interpreted_in

_KERNELS = "test_guarded_memory.py"

PROMISES = [
    Promise(
        "No kernel reads or writes memory that none of its arguments addresses, be it beside a tensor or in the gaps "
        "of a strided one.",
        "Every launch gets its tensors between guard bands, all else poisoned: with NaN, and integers with what leads "
        "far away; interpreted, each single load, store and atomic is looked at. Poison must stay as it was, and "
        "results be the same bits as without. For every kernel of the library, with every feature, at odd sizes; at "
        "night for all cases of `seqcore verify`, which `seqcore verify --guarded` runs so on a GPU.",
        (
            f"{_KERNELS}::test_attention",
            f"{_KERNELS}::test_other_ways_to_run_attention_forward",
            f"{_KERNELS}::test_recurrence",
            f"{_KERNELS}::test_steps",
            f"{_KERNELS}::test_units_spread_over_programs",
            f"{_KERNELS}::test_floors",
            f"{_KERNELS}::test_cases_of_verify",
            f"{_KERNELS}::test_verify_finds_a_kernel_that_goes_too_far",
            f"{_KERNELS}::test_no_kernel_of_the_library_is_left_out",
        ),
    ),
    Promise(
        "No result holds what stood in memory before: every element of every output and workspace that matters is "
        "written.",
        "Whatever torch.empty and its kin return is filled with poison, and results must be those of a run without.",
        (
            f"{_KERNELS}::test_attention",
            f"{_KERNELS}::test_recurrence",
            f"{_KERNELS}::test_steps",
            f"{_KERNELS}::test_cases_of_verify",
        ),
    ),
    Promise(
        "What finds such faults does find them.",
        "A kernel that loads or stores one element too many, or all of its tile, or in a gap, or follows an index that "
        "is not there, or leaves an element unwritten; looked at access by access, and by its bands alone.",
        (
            f"{_KERNELS}::test_stores_beside_a_tensor_are_seen",
            f"{_KERNELS}::test_loads_beside_a_tensor_are_seen",
            f"{_KERNELS}::test_an_index_too_many_is_seen",
            f"{_KERNELS}::test_elements_that_nobody_writes_are_seen",
            f"{_KERNELS}::test_a_launch_that_fails_leaves_everything_as_it_was",
            f"{_KERNELS}::test_tensors_of_one_memory_keep_sharing_it",
        ),
    ),
]


_guard = interpreted_in(_KERNELS)
_LAYOUT, _BACKWARD, _BIAS = (f"kernels/attention/{name}.py" for name in ("layout", "backward", "bias"))
_DECODE, _PRODUCTS = "kernels/attention/decode.py", "kernels/recurrence/products.py"
_ROWS = """    mask = (offs_row < rows)[:, None]
    if COLUMNS != BLOCK_COLUMNS:
        mask = mask & (offs_column < COLUMNS)[None, :]
    """

GUARDS = [
    _guard(
        "rows past a sequence's are not loaded",
        _LAYOUT,
        f"{_ROWS}return tl.load",
        f"{_ROWS.replace('offs_row <', 'offs_row <=')}return tl.load",
        "test_attention[plain]",
    ),
    _guard(
        "columns past a head's are not loaded",
        _LAYOUT,
        f"{_ROWS}return tl.load",
        f"{_ROWS.replace('offs_column <', 'offs_column <=')}return tl.load",
        "test_attention[plain]",
    ),
    _guard(
        "rows past a sequence's are not stored",
        _LAYOUT,
        f"{_ROWS}tl.store",
        f"{_ROWS.replace('offs_row <', 'offs_row <=')}tl.store",
        "test_attention[plain]",
    ),
    _guard(
        "columns past a head's are not stored",
        _LAYOUT,
        "tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)",
        "tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(offs_row < rows)[:, None])",
        "test_attention[plain]",
    ),
    _guard(
        "no more ends of packed sequences are read than there are",
        _LAYOUT,
        "ends = tl.load(ends_ptr + offs + 1, mask=offs < S, other=0)",
        "ends = tl.load(ends_ptr + offs + 1, mask=offs <= S, other=0)",
        "test_attention[everything, packed]",
    ),
    _guard(
        "a mask is read for pairs that are there",
        "kernels/attention/scores.py",
        "inside = (queries.m < queries.rows) & (n < queries.columns)",
        "inside = (queries.m < queries.rows) & (n <= queries.columns)",
        "test_attention[bool mask]",
    ),
    _guard(
        "statistics are read of rows that are there",
        _BACKWARD,
        "four = tl.load(ptrs, mask=(offs_m < place.rows)[:, None], other=0.0)",
        "four = tl.load(ptrs, mask=(offs_m <= place.rows)[:, None], other=0.0)",
        "test_attention[plain]",
    ),
    _guard(
        "the log-sum-exp's gradient is read of rows that are there",
        _BACKWARD,
        "tl.load(dlse_ptr + row, mask=offs_m < M, other=0.0)",
        "tl.load(dlse_ptr + row, mask=offs_m <= M, other=0.0)",
        "test_attention[plain]",
    ),
    _guard(
        "forward stores the log-sum-exp of rows that are there",
        "kernels/attention/forward.py",
        "tl.store(lse_ptr + row, lse, mask=offs_m < rows)",
        "tl.store(lse_ptr + row, lse, mask=offs_m <= rows)",
        "test_attention[plain]",
    ),
    _guard(
        "the mask's gradient is stored for pairs that are there",
        _BIAS,
        "inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]",
        "inside = (offs_m < rows)[:, None] & (offs_n <= columns)[None, :]",
        "test_attention[everything]",
    ),
    _guard(
        "summed over queries, for keys that are there",
        _BIAS,
        "mask=offs_n < columns)",
        "mask=offs_n <= columns)",
        "test_attention[top_left, a mask of keys]",
    ),
    _guard(
        "summed over keys, for queries that are there",
        _BIAS,
        "mask=offs_m < rows)",
        "mask=offs_m <= rows)",
        "test_attention[plain, a mask of queries]",
    ),
    _guard(
        "parts of decoding are stored for rows that are there",
        _DECODE,
        "tl.store(part_sum_ptr + row, row_sum, mask=offs_row < GROUP * M)",
        "tl.store(part_sum_ptr + row, row_sum, mask=offs_row <= GROUP * M)",
        "test_attention[plain, decode]",
    ),
    _guard(
        "and put together for those",
        _DECODE,
        "there = offs_row < rows",
        "there = offs_row <= rows",
        "test_attention[plain, decode]",
    ),
    _guard(
        "averaged weights are stored for pairs that are there",
        "kernels/attention/weights.py",
        "(offs_n < N)[None, :]",
        "(offs_n <= N)[None, :]",
        "test_attention[top_left]",
    ),
    _guard(
        "sequences past the batch have no rows",
        "kernels/recurrence/layout.py",
        "exists = offs_b < B",
        "exists = offs_b <= B",
        "test_recurrence[gru, two groups]",
    ),
    _guard(
        "nor in a packed or masked batch",
        "kernels/recurrence/layout.py",
        "exists = offs_b < tl.load(active_ptr + t)",
        "exists = offs_b <= tl.load(active_ptr + t)",
        "test_recurrence[gru, masked]",
    ),
    _guard(
        "forward stores units that are there",
        "kernels/recurrence/forward.py",
        "own = across(units < UNITS, 1 - ROW)",
        "own = across(units <= UNITS, 1 - ROW)",
        "test_recurrence[rnn_tanh]",
    ),
    _guard(
        "so does backward",
        "kernels/recurrence/backward.py",
        "own = across(units < UNITS, 1 - ROW)",
        "own = across(units <= UNITS, 1 - ROW)",
        "test_recurrence[rnn_tanh]",
    ),
    _guard(
        "steps made again are those of rows and units that are there",
        "kernels/recurrence/pointwise.py",
        "mask = (rows < R)[:, None]",
        "mask = (rows <= R)[:, None]",
        "test_recurrence[lstm, recomputed]",
    ),
    _guard(
        "a single step has sequences that are there",
        "kernels/recurrence/step.py",
        "exists = offs_b < B",
        "exists = offs_b <= B",
        "test_steps[lstm-bias]",
    ),
    _guard(
        "forward reads weights of units that are there",
        _PRODUCTS,
        "mask=(gate < GATES) & (unit < UNITS) & (k < K)",
        "mask=(gate < GATES) & (unit <= UNITS) & (k < K)",
        "test_recurrence[gru, two groups]",
    ),
    _guard(
        "backward reads weights that are there",
        _PRODUCTS,
        "mask=(place < GATES * UNITS) & (unit < UNITS)",
        "mask=(place < GATES * UNITS) & (unit <= UNITS)",
        "test_recurrence[gru, two groups]",
    ),
    _guard(
        "biases are read of gates that are there",
        _PRODUCTS,
        "mask = (gate < GATES) & (unit < UNITS)\n",
        "mask = (gate <= GATES) & (unit < UNITS)\n",
        "test_steps[gru-bias]",
    ),
    _guard(
        "rows of states are read where their sequence has one, and no further than it has units",
        _PRODUCTS,
        "        mask = mask & (place < GATES * UNITS)\n",
        "        mask = mask & (place <= GATES * UNITS)\n",
        "test_steps[gru-bias]",
    ),
    _guard(
        "an exchange writes a program's own share",
        "kernels/floors.py",
        "mask_own = (offs_own < SHARE) & (first_column + offs_own < WIDTH)",
        "mask_own = offs_own <= SHARE",
        "test_floors[37-37]",
    ),
    _guard(
        "padding is written, forward",
        "kernels/attention/forward.py",
        "rows = place.rows if sequences.packed is not None else M\n    out_ptr",
        "rows = place.rows\n    out_ptr",
        "test_attention[everything]",
    ),
    _guard(
        "padding is written, backward",
        _BACKWARD,
        "columns = place.columns if sequences.packed is not None else N",
        "columns = place.columns",
        "test_attention[everything]",
    ),
    _guard(
        "sequences of no steps keep their state",
        "seqcore/ops/sequence.py",
        "return own.clone() if empty else own.new_empty(own.shape)",
        "return own.new_empty(own.shape)",
        "test_recurrence[gru, masked]",
    ),
    _guard(
        "and hand its gradient on",
        "seqcore/ops/sequence.py",
        "    if not map_.mapped or map_.sizes is not None:\n",
        "    if True:\n",
        "test_recurrence[gru, masked]",
    ),
    _guard(
        "bands are compared",
        "seqcore/testing/guarded.py",
        "wrong = ((room.memory != room.filling) & ~room.addressed).nonzero()",
        "wrong = ((room.memory != room.filling) & room.addressed).nonzero()[:0]",
        "test_stores_beside_a_tensor_are_seen[one too many-bands]",
    ),
    _guard(
        "gaps are poisoned",
        "seqcore/testing/guarded.py",
        "torch.where(self.addressed[self.inside], self.home, self.memory[self.inside])",
        "self.home",
        "test_loads_beside_a_tensor_are_seen[in a gap-bands]",
    ),
    _guard(
        "reads are looked at",
        "seqcore/testing/guarded.py",
        'look("read", ptrs, mask.data)',
        "pass",
        "test_an_index_too_many_is_seen",
    ),
    _guard(
        "what is allocated is poisoned",
        "seqcore/testing/guarded.py",
        "made.fill_(poison(made.dtype))",
        "made.fill_(0)",
        "test_elements_that_nobody_writes_are_seen",
    ),
    _guard(
        "verify runs between bands when it is asked to",
        "seqcore/testing/verify.py",
        "with guards() if guarded else contextlib.nullcontext():",
        "with contextlib.nullcontext():",
        "test_verify_finds_a_kernel_that_goes_too_far",
    ),
]
