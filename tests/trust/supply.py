"""What is read, executed, written and installed: nothing but what it should be."""

from .kinds import Guard, Promise

PROMISES = [
    Promise(
        "A table of tile sizes in the user's cache that is damaged, hostile or no file at all stops nobody's "
        "training: a warning says what is wrong with it, once, and the tables of the library are used.",
        "Files with every kind of damage that we could think of, mutations of a whole table, arbitrary JSON and "
        "arbitrary bytes: each is refused in words, or tiles and plans for every kind of problem can be made by it. "
        "Pipes, devices, folders and files of gigabytes are refused without waiting.",
        ("test_hostile_tables.py", "test_tuned_tables.py"),
    ),
    Promise(
        "Where a table was named, and on the command line, one that cannot be used is an error that says what to do.",
        "A broken table by its name, and in the cache of a command, whose status is 2.",
        (
            "test_hostile_tables.py::test_a_broken_table_that_was_named_raises",
            "test_hostile_tables.py::test_the_command_line_stops_at_a_broken_cache",
            "test_tuned_tables.py::test_a_damaged_table_is_named_with_what_to_do",
        ),
    ),
    Promise(
        "A journal of a long run loses lines that are damaged, and nothing else; what is no journal is named.",
        "Strange lines among good ones, and pipes, folders and devices in a journal's place.",
        ("test_journal.py",),
    ),
    Promise(
        "What a command writes replaces regular files and nothing else, a link stays and leads to what was written, "
        "and --force deletes what is a journal and no other file.",
        "Pipes, folders, links to them and links in a circle in the place of each result, and a file of somebody's in "
        "that of a journal.",
        (
            "test_files.py",
            "test_tune.py::test_force_deletes_no_file_that_is_no_log",
            "test_tune.py::test_what_is_no_file_is_refused_before_anything_is_measured",
            "test_hostile_results.py::test_what_is_no_result_of_theirs_is_neither_replaced_nor_deleted",
        ),
    ),
    Promise(
        "A mistake of whoever types a command is told in one line, with status 2: sizes beyond all numbers or all "
        "memory, a backend in the environment that is none, a file that cannot be written. A bug keeps its traceback.",
        "Each of them, output that nobody reads or that has no room, and errors of which none is the caller's.",
        ("test_cli.py", "test_precompile.py::test_bad_input_is_refused"),
    ),
    Promise(
        "Nothing here unpickles or executes data, runs a shell, or opens a connection.",
        "A walk over the syntax of every source for modules and functions that do, with a list of exceptions, each "
        "with its reason; every process is started by a list of arguments.",
        ("test_safety.py",),
    ),
    Promise(
        "A session writes only below its caches, its temporary folder and the paths that it was given, connects to "
        "nothing, and changes nothing of what is installed.",
        "Training, explaining, and the subcommands under Python's audit hooks, which their child processes have too, "
        "with a hash of every installed file before and after.",
        (
            "test_installation.py::test_a_session_writes_where_it_may_and_connects_to_nothing",
            "test_installation.py::test_so_does_one_that_interprets_kernels",
        ),
    ),
    Promise(
        "A wheel and a source archive hold what they should and nothing that lies about in a checkout, make the same "
        "installation, and work in a fresh environment.",
        "Both built from a checkout with litter in it, compared file by file, and installed without a network; nightly "
        "once more with all requirements from the package index.",
        (
            "test_installation.py::test_a_source_archive_holds_what_a_build_needs_and_nothing_else",
            "test_installation.py::test_both_archives_make_the_same_wheel",
            "test_installation.py::test_an_archive_can_be_installed_and_works",
            "test_installation.py::test_a_wheel_brings_all_that_it_needs",
            "test_packaging.py::test_wheel_holds_every_source_file_under_seqcore",
            "test_packaging.py::test_wheel_has_one_top_level_name",
            "test_packaging.py::test_installed_wheel_imports_and_leaves_the_name_kernels_alone",
        ),
    ),
]

HOSTILE = "test_hostile_tables.py::test_a_hostile_text_is_refused"
NO_FILE = "test_hostile_tables.py::test_what_is_no_file_is_refused_and_not_waited_for"

GUARDS = [
    Guard(
        "a pipe is not waited for", "kernels/reading.py", 'flags | getattr(os, "O_NONBLOCK", 0)', "flags",
        f"{NO_FILE}[pipe]",
    ),
    Guard(
        "what is no regular file is refused", "kernels/reading.py",
        "if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):",
        "if False:", "test_hostile_results.py::test_a_pipe_is_no_result",
    ),
    Guard(
        "no more is read than a table may have", "kernels/reading.py", "file.read(most + 1)", "file.read(most)",
        f"{HOSTILE}[more than a table has]",
    ),
    Guard(
        "nesting is bounded", "kernels/reading.py",
        "    except RecursionError:\n        raise ValueError(TOO_DEEP) from None\n\n\ndef lenient",
        "    except ZeroDivisionError:\n        raise\n\n\ndef lenient", f"{HOSTILE}[a bomb of lists]",
    ),
    Guard(
        "a name stands once", "kernels/reading.py", "if name in found:", "if False:", f"{HOSTILE}[a name twice]"
    ),
    Guard(
        "there is no NaN", "kernels/reading.py", ", parse_constant=_refused", "", f"{HOSTILE}[NaN]",
    ),
    Guard(
        "every size has its bounds", "kernels/tables.py", "return least <= value <= most and", "return value > 0 and",
        f"{HOSTILE}[a tile beyond any memory]",
    ),
    Guard(
        "a bool is no number", "kernels/tables.py", "type(value) is known[name]", "isinstance(value, known[name])",
        f"{HOSTILE}[a bool in the place of a number]",
    ),
    Guard(
        "a row has no other fields", "kernels/tables.py", "not fields.keys() <= found.keys() <= known.keys()",
        "not fields.keys() <= found.keys()", f"{HOSTILE}[a plan with more fields]",
    ),
    Guard(
        "a section must be known", "kernels/tables.py", "if unknown := found.keys() - ", "if unknown := set() and ",
        f"{HOSTILE}[an unknown section]",
    ),
    Guard(
        "nothing is printed that a terminal obeys", "kernels/tables.py", " and value.isprintable()", "",
        f"{HOSTILE}[commands for a terminal]",
    ),
    Guard(
        "a broken cache stops nothing", "kernels/tuning.py", "if _instead or path.parent == tables.SHIPPED:",
        "if True:",
        "test_hostile_tables.py::test_a_broken_cache_is_told_of_once_and_ours_is_taken",
    ),
    Guard(
        "it is told of once", "kernels/tuning.py", "                _unusable.add(path)\n", "",
        "test_hostile_tables.py::test_a_broken_cache_is_told_of_once_and_ours_is_taken",
    ),
    Guard(
        "a table that was named raises", "kernels/tuning.py", "if _instead or path.parent == tables.SHIPPED:",
        "if path.parent == tables.SHIPPED:", "test_hostile_tables.py::test_a_broken_table_that_was_named_raises",
    ),
    Guard(
        "a command stops at a broken cache", "seqcore/cli.py", 'warnings.simplefilter("error", BadTable)', "pass",
        "test_hostile_tables.py::test_the_command_line_stops_at_a_broken_cache",
    ),
    Guard(
        "a strange line is no entry of a journal", "seqcore/journal.py", "if isinstance(entry, dict) and all(",
        "if all(",
        "test_journal.py::test_a_line_that_is_no_entry_loses_only_itself",
    ),
    Guard(
        "what is no file is not replaced", "seqcore/files.py",
        "if os.path.lexists(end) and not stat.S_ISREG(os.lstat(end).st_mode):", "if False:",
        "test_files.py::test_what_is_no_file_is_not_replaced[pipe]",
    ),
    Guard(
        "a link stays", "seqcore/files.py", "end = Path(os.path.realpath(path))", "end = path",
        "test_files.py::test_a_link_stays_and_what_it_leads_to_is_written[True]",
    ),
    Guard(
        "only a journal is deleted", "seqcore/journal.py", "if end.stat().st_size and not lines(path):", "if False:",
        "test_files.py::test_a_journal_is_deleted_and_no_other_file",
    ),
    Guard(
        "--force deletes no other file", "seqcore/tuning/run.py", "discard(log)", "log.unlink(missing_ok=True)",
        "test_tune.py::test_force_deletes_no_file_that_is_no_log",
    ),
    Guard(
        "a place that is no file is refused before a search", "seqcore/tuning/run.py",
        "if not replaceable(out).exists():", "if not out.is_file():",
        "test_tune.py::test_what_is_no_file_is_refused_before_anything_is_measured[False]",
    ),
    Guard(
        "a benchmark deletes no other file", "benchmarks/__main__.py", "            discard(journal_path)",
        "            journal_path.unlink(missing_ok=True)",
        "test_hostile_results.py::test_what_is_no_result_of_theirs_is_neither_replaced_nor_deleted",
    ),
    Guard(
        "a backend in the environment is checked first", "seqcore/cli.py", "    backends.resolve(None)\n", "",
        "test_cli.py::test_a_backend_of_the_environments_that_is_none",
    ),
    Guard(
        "memory that does not suffice is no bug", "seqcore/cli.py",
        "or any(words in said for words in OUT_OF_MEMORY)", "", "test_cli.py::test_a_mistake_is_told_in_a_line",
    ),
    Guard(
        "a bug is no mistake of the caller's", "seqcore/cli.py",
        "return said if isinstance(error, (InvalidInput, UnsupportedInput, BadTable, OSError)) else None",
        "return said", "test_cli.py::test_a_bug_keeps_its_traceback",
    ),
    Guard(
        "a size is one that a tensor can have", "seqcore/profiling/problems.py",
        "is_size(getattr(self, field.name))", "getattr(self, field.name) > 0",
        "test_cli.py::test_a_mistake_is_told_in_a_line[a size beyond all numbers]",
    ),
    Guard(
        "output is written before the status is known", "seqcore/cli.py",
        "            # What cannot be written is to be known here, and not when Python ends.\n            _flush()",
        "            pass", "test_cli.py::test_output_that_cannot_be_written[a full disk-info]",
    ),
    Guard(
        "what cannot be written is dropped", "seqcore/cli.py", "os.dup2(nowhere.fileno(), sys.stdout.fileno())", "pass",
        "test_cli.py::test_output_that_cannot_be_written[nobody reads-info]",
    ),
    Guard(
        "a share needs a journal", "seqcore/commands/verify.py",
        "if options.share is not None and options.journal is None:", "if False:",
        "test_cli.py::test_a_mistake_is_told_in_a_line[a share of nothing]",
    ),
    Guard(
        "no shell", "seqcore/info.py", "subprocess.run(command, capture_output=True",
        'subprocess.run(" ".join(command), shell=True, capture_output=True',
        "test_safety.py::test_no_source_does_what_is_unsafe_without_a_reason",
    ),
    Guard(
        "nothing is evaluated", "kernels/reading.py", "return json.loads(found)", "return eval(found)",
        "test_safety.py::test_no_source_does_what_is_unsafe_without_a_reason",
    ),
    Guard(
        "nothing is written beside the library", "seqcore/info.py", "    described = devices.describe(device)\n",
        '    described = devices.describe(device)\n    (Path(__file__).parent / "described").touch()\n',
        "test_installation.py::test_a_session_writes_where_it_may_and_connects_to_nothing",
    ),
    Guard(
        "only what is named is packed", "setup.py", '"testing/*.json"]', '"testing/*.json", "*.json"]',
        "test_installation.py::test_a_source_archive_holds_what_a_build_needs_and_nothing_else",
    ),
    Guard(
        "tests are not packed", "MANIFEST.in", "prune tests", "",
        "test_installation.py::test_a_source_archive_holds_what_a_build_needs_and_nothing_else",
    ),
    Guard(
        "tables are packed", "setup.py", '"seqcore.kernels": ["tuned/*.json"]', '"seqcore.kernels": []',
        "test_installation.py::test_a_source_archive_holds_what_a_build_needs_and_nothing_else",
    ),
]  # fmt: skip
