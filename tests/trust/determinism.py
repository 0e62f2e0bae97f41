"""The same bits for the same inputs."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "The same inputs, options and seeds give the same bits of outputs and gradients, in every repeat and in "
        "every process on the same machine, under another PYTHONHASHSEED, too. Of backend \"aten\" that is torch's to "
        "promise, and so it is of products on a CPU with another number of threads.",
        "Digests of outputs and gradients of recurrences in every layout and of attention with every feature, as plain "
        "PyTorch, through our operators, and interpreted: repeated here and in another process.",
        ("test_determinism.py", "test_determinism_kernels.py"),
    ),
    Promise(
        "Kernels give the same bits in every repeat.",
        "Each kernel is run twice in its own tests, at sizes with many tiles; on a GPU, `seqcore verify` does it with "
        "every case.",
        (
            "test_recurrence_kernels.py::test_repeats_are_bitwise_equal",
            "test_recurrence_options.py::test_backward_twice_and_repeats_give_the_same_bits",
            "test_attention_kernels.py::test_repeats_are_bitwise_equal",
            "test_attention_features.py::test_repeats_are_bitwise_equal",
            "test_attention_decode.py::test_repeats_are_bitwise_equal",
        ),
    ),
    Promise(
        "What dropout by a seed drops does not depend on the number of threads.",
        "The mask in a process with another number of threads; and the generator against its published values.",
        ("test_determinism.py::test_what_a_seed_drops_does_not_depend_on_threads", "test_philox.py"),
    ),
    Promise(
        "torch.use_deterministic_algorithms(True) raises nothing, warns of nothing and changes no bit, with or without "
        "torch.utils.deterministic.fill_uninitialized_memory.",
        "The same digests within the mode, and every operator of torch's that we call, inside our own too, held "
        "against torch's list of those that raise on a GPU; twice differentiated as well.",
        (
            "test_determinism.py::test_repeats_and_deterministic_mode_give_the_same_bits",
            "test_determinism_operators.py",
        ),
    ),
    Promise(
        "Before and after kernels nothing is called whose bits could change on a GPU, also without that mode.",
        "Launches as for sm_90 and gfx942 that run nothing, with every operator of torch's recorded around them: no "
        "two floats are added to one place in an order that is open.",
        ("test_determinism_operators.py::test_around_kernels_nothing_is_called_whose_bits_could_change",),
    ),
]

BITS = "test_determinism.py::test_repeats_and_deterministic_mode_give_the_same_bits"

AROUND = "test_determinism_operators.py::test_around_kernels_nothing_is_called_whose_bits_could_change[sm_90]"

GUARDS = [
    Guard(
        "a seed decides what is dropped, and nothing else", "seqcore/functional/attention_checks.py",
        "return torch.tensor([seed], device=query.device)", "return torch.randint(1 << 62, [1], device=query.device)",
        f"{BITS}[reference]",
    ),
    Guard(
        "nothing depends on the order of a set or on a hash", "seqcore/functional/attention_checks.py",
        "return torch.tensor([seed], device=query.device)",
        "return torch.tensor([seed ^ hash(NAME) & 0xFFFF], device=query.device)",
        "test_determinism.py::test_another_process_finds_the_same_bits",
    ),
    Guard(
        "nothing depends on the number of threads", "seqcore/reference/philox.py", "k0, k1 = seed & _MASK,",
        "k0, k1 = seed + torch.get_num_threads() & _MASK,",
        "test_determinism.py::test_what_a_seed_drops_does_not_depend_on_threads",
    ),
    Guard(
        "a sum begins at zero, whatever stood in its memory", "seqcore/reference/bptt.py",
        "dx = torch.zeros_like(x, memory", "dx = torch.empty_like(x, memory", f"{BITS}[operators]",
    ),
    Guard(
        "so does that of a key's gradients", "seqcore/reference/attention_backward.py",
        "torch.zeros_like(key, dtype=acc)", "torch.empty_like(key, dtype=acc)",
        f"{BITS}[operators]",
    ),
    Guard(
        "kernels write all that is read", "kernels/attention/backward.py",
        "tl.store(statistics_ptr + row * 4 + 2, delta, mask=offs_m < M)",
        "tl.store(statistics_ptr + row * 4 + 2, delta, mask=offs_m < M - 1)",
        "test_determinism_kernels.py", interpreted=True,
    ),
    Guard(
        "running sums are of integers", "seqcore/ops/layout.py", "starts = batch_sizes.cumsum(0) - batch_sizes",
        "starts = batch_sizes.float().cumsum(0).long() - batch_sizes", AROUND,
    ),
    Guard(
        "rows that are added to are each of one sequence", "seqcore/ops/projection.py", "here.index_add_(0, rows,",
        "here.index_add_(0, torch.zeros_like(rows),", AROUND,
    ),
    Guard(
        "a reference calls nothing that raises in deterministic mode", "seqcore/reference/attention.py",
        "locate(M, cu_seqlens_q.long())",
        "locate(M, cu_seqlens_q.diff(prepend=cu_seqlens_q[:1]).float().cumsum(0).long())",
        "test_determinism_operators.py::test_packed_references_call_none_where_ends_cannot_be_looked_at",
    ),
]  # fmt: skip
