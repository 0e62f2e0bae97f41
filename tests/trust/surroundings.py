"""Where kernels cannot run: an old GPU, none, no Triton, other versions."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "Where no kernel can run, for the GPU is too old, of another make or absent, everything else works: \"auto\" "
        "takes torch's operators or plain PyTorch.",
        "GPUs older than sm_80 and AMD GPUs that kernels do not compile for, of which there is only the name, and a "
        "CPU.",
        (
            "test_surroundings.py::test_a_gpu_without_kernels_is_served_by_others_and_it_is_said_why",
            "test_backends.py::test_explain_tells_of_every_call_in_a_model",
        ),
    ),
    Promise(
        "Without Triton, with one that cannot be imported or is older than 3.6, or with a torch older than 2.11, "
        "seqcore is imported, and everything but the kernels works.",
        "Processes in which Triton is missing, broken or old, or torch says that it is: a session in each.",
        ("test_surroundings.py::test_without_what_kernels_need_all_else_works",
        "test_surroundings.py::test_which_versions_will_do"),
    ),
    Promise(
        "backend=\"triton\" then raises UnsupportedInput with the reason and what to do; `explain` and `seqcore "
        "info` say the same, and commands that are about kernels end with status 2. Nobody sees a traceback from "
        "inside Triton.",
        "The words of each of them in each of these surroundings.",
        (
            "test_surroundings.py",
            "test_backends.py::test_refusals_say_what_was_asked_and_what_to_pass",
            "test_backends.py::test_explain_asks_for_a_gpu_that_is_not_here",
        ),
    ),
    Promise(
        "A torch or a Triton that is newer than any that was tested is used, and `seqcore info` names it.",
        "Versions to come, by their numbers.",
        (
            "test_surroundings.py::test_versions_newer_than_any_tested_are_used_and_named",
            "test_backends.py::test_explain_says_where_nothing_was_measured",
        ),
    ),
    Promise(
        "A GPU goes by the name that compilers give it, too, \"sm_90a\"; a name that is none is refused.",
        "Names with letters behind their number, and what only looks like one.",
        (
            "test_surroundings.py::test_a_gpu_by_its_compilers_name_is_the_gpu",
            "test_surroundings.py::test_what_names_no_gpu_is_refused",
        ),
    ),
    Promise(
        "\"auto\" serves an LSTM that autocast takes to float16 on a CPU, for which torch's own may raise.",
        "Inputs in float32 and bfloat16, against the reference; and what torch's own does serve stays with it.",
        ("test_mixed_precision.py::test_auto_serves_the_lstm_that_onednn_has_not",),
    ),
    Promise(
        "`import seqcore` imports no Triton and touches no GPU.",
        "What an import brings in, in a process of its own.",
        ("test_packaging.py::test_import_brings_in_no_triton_and_touches_no_gpu",),
    ),
]

OF_A_GPU = "test_surroundings.py::test_a_gpu_without_kernels_is_served_by_others_and_it_is_said_why"
WITHOUT = "test_surroundings.py::test_without_what_kernels_need_all_else_works"
VERSIONS = "test_surroundings.py::test_which_versions_will_do"

GUARDS = [
    Guard(
        "GPUs older than sm_80 are refused", "seqcore/capabilities.py", "_arch_number(arch) < 80",
        "_arch_number(arch) < 75",
        f"{OF_A_GPU}[sm_75]",
    ),
    Guard(
        "AMD GPUs that kernels do not compile for are refused", "seqcore/capabilities.py",
        'elif arch.startswith("gfx") and arch not in AMD:', "elif False:", f"{OF_A_GPU}[gfx1100]",
    ),
    Guard(
        "kernels need a Triton", "seqcore/versions.py", "if triton is None:", "if False:", f"{WITHOUT}[no Triton]"
    ),
    Guard(
        "a Triton that cannot be imported is none", "seqcore/versions.py", "return [fault] if fault else []",
        "return []",
        f"{WITHOUT}[a broken Triton]",
    ),
    Guard(
        "Triton's version is compared by numbers", "seqcore/versions.py",
        "elif (_release(triton) or OLDEST_TRITON) < OLDEST_TRITON:",
        'elif triton < "3.6":', f"{VERSIONS}[2.13.0-3.10.0]",
    ),
    Guard(
        "torch must be new enough", "seqcore/versions.py",
        "if (_release(torch_version) or OLDEST_TORCH) < OLDEST_TORCH:", "if False:", f"{VERSIONS}[2.10.1-3.6.0]",
    ),
    Guard(
        "a command about kernels is told so before it begins", "seqcore/cli.py",
        "if options.command in OF_KERNELS and (reasons := why_no_triton()):", "if False:", f"{WITHOUT}[no Triton]",
    ),
    Guard(
        "what is newer is named", "seqcore/info.py", '    lines += info["untested"]\n', "",
        "test_surroundings.py::test_versions_newer_than_any_tested_are_used_and_named",
    ),
    Guard(
        "letters behind a GPU's number do not count", "kernels/tuning.py", "return numbered", "return self.arch",
        "test_surroundings.py::test_a_gpu_by_its_compilers_name_is_the_gpu[sm_90a-sm_90]",
    ),
    Guard(
        "a GPU's name has a number", "kernels/tuning.py",
        "if len(digits) not in (2, 3) or not (digits.isascii() and digits.isdecimal()):", "if False:",
        "test_surroundings.py::test_what_names_no_gpu_is_refused[sm_]",
    ),
    Guard(
        "oneDNN is not asked for an LSTM in float16", "seqcore/capabilities.py",
        'if request.operation == "lstm" and _by_onednn_in_half(request):', "if False:",
        "test_mixed_precision.py::test_auto_serves_the_lstm_that_onednn_has_not[fp32]",
    ),
    Guard(
        "an import brings in no Triton", "seqcore/versions.py", "TRITON = triton_version()",
        "import triton\nTRITON = triton_version()",
        "test_packaging.py::test_import_brings_in_no_triton_and_touches_no_gpu",
    ),
]  # fmt: skip
