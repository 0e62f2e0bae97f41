"""Programs that wait for each other, threads, streams and graphs."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "Programs that wait for each other give the same bits, the right ones, in whatever order they run.",
        "Five cells, two of one's own, in every form of input and every kind of plan, interpreted, under seeded random "
        "schedules that switch before every access to memory, with a GPU's weak memory and without: more than two "
        "thousand in a night; larger ones with relu and both directions, and the kernels that measure waiting. "
        "Barriers with any of their lines taken out fail under nearly every schedule.",
        (
            "test_explored_schedules.py",
            "test_explored_recurrence.py",
            "test_explorer.py",
            "test_weak_memory.py",
        ),
    ),
    Promise(
        "No launch has more programs that wait for each other than its device runs at once: a plan that is forced, or "
        "made for another device, raises UnsupportedInput before anything starts.",
        "Plans for whole GPUs and slices of 1 to 60 multiprocessors, chosen and forced, through the launch itself; "
        "what a compiled program takes beyond its device; rows of tables that do not fit.",
        (
            "test_residency.py::test_no_launch_has_more_programs_than_its_device_holds",
            "test_residency.py::test_a_plan_of_another_device_is_refused_before_anything_starts",
            "test_residency.py::test_what_a_compiled_program_takes_beyond_its_device_is_said_before_it_starts",
            "test_residency.py::test_a_forced_plan_that_is_too_large_raises_and_says_what_to_do",
            "test_residency.py::test_a_plan_forced_between_forward_and_backward_raises_too",
            "test_residency.py::test_a_row_of_the_table_that_does_not_fit_is_passed_over",
            "test_recurrence_launches.py::test_programs_that_wait_for_each_other_are_launched_together",
            "test_plans.py::test_every_plan_fits_its_device_and_covers_its_problem",
        ),
    ),
    Promise(
        "Launches in flight never count in the same memory, and each counts from zero, in every replay of a graph too.",
        "The counters of all launches of two calls, two layers and both passes are held, compared by address and "
        "looked at before use; on a GPU graphs are replayed beside eager launches.",
        (
            "test_residency.py::test_every_launch_counts_from_zero_in_memory_of_its_own",
            "test_residency.py::test_layers_passes_and_calls_in_flight_share_no_counters",
            "test_streams.py::test_a_graph_of_two_launches_is_replayed_beside_eager_ones",
        ),
    ),
    Promise(
        "With SEQCORE_DEBUG=1 a program that has polled 2^24 times for the others of its launch stops it; without it "
        "nothing is compiled that could.",
        "Interpreted, kernels without their signal raise; compiled for sm_80, sm_90, sm_100 and gfx942, they hold the "
        "trap with the variable and not without.",
        ("test_watchdog.py",),
    ),
    Promise(
        "Threads that call models at once, their own or the same one, get what each would get alone, and so do calls "
        "inside of hooks, custom Functions and checkpoints, and backward in another thread.",
        "Bit for bit against one after the other, with threads that switch every hundredth of a millisecond, on each "
        "backend; interpreted launches of two threads never overlap.",
        ("test_concurrency.py", "test_backends.py::test_a_context_is_of_one_thread"),
    ),
    Promise(
        "On a GPU, streams, threads with a stream each, and several models side by side give the same bits.",
        "Forward and backward on several streams, backward on another stream than forward, graphs beside eager "
        "launches, against one after the other; needs a GPU.",
        ("test_streams.py",),
    ),
    Promise(
        "`make gpu` runs every kernel under compute-sanitizer's four tools, and what they find, or cannot look at, is "
        "in its results.",
        "A program in its place prints what it would: clean, errors, a crash, a hang; needs a GPU for the real one.",
        ("test_sanitizer_stage.py",),
    ),
]

LAUNCH, GRID = "seqcore/ops/sequence.py", "kernels/grid.py"

GUARDS = [
    Guard(
        "a wait waits",
        GRID,
        'while tl.atomic_add(counter_ptr, 0, sem="acquire") - target < 0:',
        'if tl.atomic_add(counter_ptr, 0, sem="acquire") - target < 0:',
        "test_explored_schedules.py::test_exchanges_and_barriers_are_right_under_every_schedule[0]",
        interpreted=True,
    ),
    Guard(
        "a signal releases what was stored",
        GRID,
        'tl.atomic_add(counter_ptr, 1, sem="release")',
        'tl.atomic_add(counter_ptr, 1, sem="relaxed")',
        "test_explored_schedules.py::test_exchanges_and_barriers_are_right_under_every_schedule[0]",
        interpreted=True,
    ),
    Guard(
        "forward waits for all slices of the step before",
        "kernels/recurrence/forward.py",
        "wait(counter_ptr, step * SLICES)",
        "wait(counter_ptr, step * SLICES - 1)",
        "test_explored_schedules.py::test_results_are_right_and_the_same_bits_under_every_schedule"
        "[test_mgu-padded-three slices-0]",
        interpreted=True,
    ),
    Guard(
        "backward waits for all slices of the step",
        "kernels/recurrence/backward.py",
        "wait(counter_ptr, (walked + 1) * SLICES)",
        "wait(counter_ptr, (walked + 1) * SLICES - 1)",
        "test_explored_schedules.py::test_results_are_right_and_the_same_bits_under_every_schedule"
        "[test_mgu-padded-three slices-0]",
        interpreted=True,
    ),
    Guard(
        "the launch itself counts programs",
        LAUNCH,
        "if plan.slices * plan.teams > device.multiprocessors:",
        "if plan.slices * plan.teams > 1 << 30:",
        "test_residency.py::test_a_plan_of_another_device_is_refused_before_anything_starts",
    ),
    Guard(
        "a plan has only as many groups at once as the device runs",
        "kernels/recurrence/plan.py",
        "at_once = min(groups, resident // (slices * shape.directions * shape.blocks)) if slices > 1 else groups",
        "at_once = groups",
        "test_residency.py::test_no_launch_has_more_programs_than_its_device_holds[26]",
    ),
    Guard(
        "what is forced must fit in shared memory",
        "kernels/recurrence/plan.py",
        "if plan.shared_memory > device.shared_memory:",
        "if plan.shared_memory > 1 << 30:",
        "test_residency.py::test_a_forced_plan_that_is_too_large_raises_and_says_what_to_do[shared memory]",
    ),
    Guard(
        "what the compiler finds too large is an error of ours",
        LAUNCH,
        "except OutOfResources as error:",
        "except ZeroDivisionError as error:",
        "test_residency.py::test_what_a_compiled_program_takes_beyond_its_device_is_said_before_it_starts",
    ),
    Guard(
        "a plan that cannot be made in backward is an error of ours",
        "seqcore/ops/layer.py",
        "except plan.NoPlan as error:",
        "except ZeroDivisionError as error:",
        "test_residency.py::test_a_plan_forced_between_forward_and_backward_raises_too",
    ),
    Guard(
        "programs that wait are launched cooperatively",
        LAUNCH,
        '{"launch_cooperative_grid": described.arch != INTERPRETER}',
        '{"launch_cooperative_grid": False}',
        "test_recurrence_launches.py::test_programs_that_wait_for_each_other_are_launched_together",
    ),
    Guard(
        "each launch has counters of its own",
        LAUNCH,
        "counters = torch.zeros(teams * stride if plan.slices > 1 else 0, dtype=torch.int32, device=device)",
        'counters = globals().setdefault("_all", torch.zeros(1 << 14, dtype=torch.int32))[: teams * stride].zero_()',
        "test_residency.py::test_layers_passes_and_calls_in_flight_share_no_counters",
    ),
    Guard(
        "counters are cleared before each launch",
        LAUNCH,
        "counters = torch.zeros(",
        "counters = torch.empty(",
        "test_residency.py::test_layers_passes_and_calls_in_flight_share_no_counters",
    ),
    Guard(
        "the watchdog ends an interpreted wait",
        GRID,
        "            _give_up(polls)",
        "            pass",
        "test_watchdog.py::test_a_sequence_kernel_without_its_signal_raises[forward]",
        interpreted=True,
    ),
    Guard(
        "the watchdog ends a compiled wait",
        GRID,
        "tl.device_assert(polls <= MOST_POLLS,",
        "tl.static_assert(True,",
        "test_watchdog.py::test_what_is_compiled_stops_when_it_has_waited_too_long_only_if_asked_to[1-stops]",
    ),
    Guard(
        "without SEQCORE_DEBUG there is no watchdog",
        GRID,
        'os.environ.get("SEQCORE_DEBUG", "0")',
        '"1"',
        "test_watchdog.py::test_what_is_compiled_stops_when_it_has_waited_too_long_only_if_asked_to[0-waits]",
    ),
    Guard(
        "launches are compiled with their watchdog",
        LAUNCH,
        " | grid.LAUNCH_OPTIONS",
        "",
        "test_watchdog.py::test_what_is_compiled_stops_when_it_has_waited_too_long_only_if_asked_to[1-stops]",
    ),
    Guard(
        "interpreted launches take turns",
        "kernels/settled.py",
        "        with _interpreter:\n",
        "        if True:\n",
        "test_concurrency.py::test_interpreted_launches_take_turns",
        interpreted=True,
    ),
    Guard(
        "a thread may launch inside of its own launch",
        "kernels/settled.py",
        "_interpreter = threading.RLock()",
        "_interpreter = threading.Lock()",
        "test_concurrency.py::test_a_launch_inside_an_interpreted_launch_goes_on",
        interpreted=True,
    ),
    Guard(
        "backends and explanations are of a thread",
        "seqcore/backends.py",
        "class _Local(threading.local):",
        "class _Local:",
        "test_concurrency.py::test_explanations_are_of_the_thread_that_asks",
    ),
    Guard(
        "threads take turns at torch's switch for float32 products",
        "seqcore/ops/precision.py",
        "    with _switching:\n",
        "    if True:\n",
        "test_concurrency.py::test_the_switch_for_float32_products_is_right_in_every_thread_and_is_put_back",
    ),
    Guard(
        "the switch is put back",
        "seqcore/ops/precision.py",
        "            switch.fp32_precision = before\n",
        "            pass\n",
        "test_concurrency.py::test_the_switch_for_float32_products_is_right_in_every_thread_and_is_put_back",
    ),
    Guard(
        "what the sanitizer has not seen to its end is not clean",
        "benchmarks/stages/run_sanitizer.py",
        "ended = CLEAN if errors == 0 and status == 0 else CRASHED",
        "ended = CLEAN if not errors else CRASHED",
        "test_sanitizer_stage.py",
    ),
]
