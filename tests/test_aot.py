"""The ahead-of-time compiler: it knows every kernel, and it reports what is wrong with one."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from seqcore.cells import BUILT_IN, ZONEOUT
from seqcore.kernels import tuning
from seqcore.kernels.recurrence.plan import split
from seqcore.testing import aot, aot_usage
from seqcore.testing.aot_catalogue import catalogue, covering
from seqcore.testing.aot_entry import TARGETS, Entry, spill_budgets

KERNELS = Path(tuning.__file__).parent
ROW_KEYS = {"kernel", "configuration", "target", "shared", "registers", "spills", "budget", "mma", "compile_s", "ok"}


def entry(kernel: str, target: str, **wanted: str) -> Entry:
    """The first entry of ``kernel`` for ``target`` with these tags."""
    return next(e for e in catalogue() if e.name == kernel and e.target == target and wanted.items() <= e.tags.items())


def kernels_on_disk() -> set[str]:
    """ "module:function" of every kernel, by reading the sources."""
    found = set()
    for path in KERNELS.rglob("*.py"):
        module = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(f"{module}:{node.name}")
    return found


def test_catalogue_holds_every_kernel_and_no_other():
    assert {e.kernel.path for e in catalogue()} == kernels_on_disk()


def test_catalogue_holds_every_cell_and_every_tuned_configuration():
    entries = catalogue()
    cells = {cell.name for cell in (*BUILT_IN, *ZONEOUT.values())}
    assert {e.tags["cell"] for e in entries if "cell" in e.tags} == cells
    for target in TARGETS:
        for operation in (name for name in tuning.table(target) if name.startswith("attention")):
            # Of few queries, only as many rows as they take.
            sizes = ("BLOCK_N",) if operation == "attention_decode" else ("BLOCK_M", "BLOCK_N")
            for row in tuning.table(target)[operation]:
                assert any(
                    e.target == target
                    and e.name == f"{operation}_kernel"
                    and all(e.constants[size] == row[size] for size in sizes)
                    and (e.num_warps, e.num_stages) == (row["num_warps"], row["num_stages"])
                    for e in entries
                ), (target, operation, row)


def test_covering_subset_is_small_and_loses_no_pair():
    entries = catalogue()
    chosen = covering(entries)
    assert set().union(*(e.pairs() for e in chosen)) == set().union(*(e.pairs() for e in entries))
    assert len(chosen) <= 140, "too many for every run of the tests"
    assert {e.target for e in chosen} == set(TARGETS)
    assert {e.kernel for e in chosen} == {e.kernel for e in entries}


def test_sources_give_every_parameter_of_their_kernel():
    for e in covering(catalogue()):
        source = aot.specialised_source(e)
        assert list(source.signature) == [p.name for p in aot.resolve(e.kernel).params]


def test_source_is_specialised_as_a_launch_would_be():
    found = entry("attention_forward_kernel", "sm_90", head_dim="D=72", dtype="bfloat16", mask="bool")
    source = aot.specialised_source(found)
    aligned = [["tt.divisibility", 16]]

    def path(name, *fields):
        """Where an argument, or a field of it, stands in the tree of arguments."""
        positions, value = [list(source.signature).index(name)], found.arguments.get(name)
        for field in fields:
            positions.append(value._fields.index(field))
            value = getattr(value, field)
        return tuple(positions)

    assert source.attrs[path("q", "ptr")] == aligned
    assert source.attrs[path("q", "stride_h")] == aligned
    assert path("q", "stride_row") not in source.attrs, "9 units of 8 elements do not divide by 16"
    assert source.constants[path("q", "unit")] == 8
    assert path("M") not in source.attrs, "lengths never specialise"
    assert source.signature["features"].stride_mask_n == "constexpr"
    assert source.constants[path("features", "stride_mask_n")] == 1
    assert source.constants[path("sequences", "q_ptr")] is None


@pytest.mark.parametrize("target", TARGETS)
def test_reports_what_a_kernel_takes(target):
    row = aot.compile_entry(
        entry("attention_forward_kernel", target, dtype="float16", head_dim="D=64", mask="unmasked")
    )
    assert row["ok"], row["error"]
    assert row.keys() >= ROW_KEYS
    assert row["registers"] > 0 and row["shared"] > 0
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]
    assert row["mma"].keys() == {instruction}


@pytest.mark.parametrize("kernel", ["recurrence_forward_kernel", "recurrence_backward_kernel"])
def test_held_weights_stand_above_the_time_loop(kernel, monkeypatch):
    good = entry(kernel, "sm_90", cell="lstm", dtype="bfloat16", hidden="H=768", batch="B=16", input="padded")
    assert good.stationary == good.constants["UNITS"] * (4 if "STEP_BACKWARD" in good.constants else 1) // (
        good.constants["BLOCK_K"] * good.constants["FOLD"]
    )
    assert aot.compile_entry(good)["ok"]
    monkeypatch.setattr(aot, "violation", lambda row: None)
    streamed = aot.compile_entry(replace(good, constants={**good.constants, "HOLD": False, "STAGE": 2}))
    assert not streamed["ok"] and "before the time loop" in streamed["error"]


def test_wide_rows_use_the_widest_matrix_instruction():
    good = entry("recurrence_forward_kernel", "sm_90", cell="lstm", dtype="bfloat16", hidden="H=768", batch="B=256")
    assert good.instruction == "wgmma" and aot.compile_entry(replace(good, tags={}))["mma"].keys() == {"wgmma"}
    narrow = replace(good, constants={**good.constants, "BLOCK_B": 16}, num_warps=4)
    assert "not wgmma" in aot.compile_entry(narrow)["error"]


def test_gates_divide_into_products_of_powers_of_two():
    assert [split(gates, padded=False) for gates in range(1, 8)] == [
        (1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 4),
    ]  # fmt: skip
    assert [split(gates, padded=True) for gates in (1, 3, 4, 5)] == [(1, 0), (4, 0), (4, 0), (8, 0)]


def test_reports_too_much_shared_memory():
    fits = entry("attention_forward_kernel", "gfx942", dtype="bfloat16", head_dim="D=128", mask="unmasked")
    row = aot.compile_entry(replace(fits, constants={**fits.constants, "BLOCK_N": 128}, num_stages=3))
    assert not row["ok"]
    assert row["shared"] > aot.SHARED_LIMIT["gfx942"]
    assert "shared memory" in row["error"]


def test_reports_what_does_not_compile():
    good = entry("pointwise_kernel", "sm_90")
    row = aot.compile_entry(replace(good, constants={**good.constants, "BLOCK_H": 100}))
    assert not row["ok"]
    assert "power of 2" in row["error"]


@pytest.mark.parametrize(("target", "limit"), aot.SHARED_LIMIT.items())
def test_limits_are_the_last_that_pass(target, limit):
    row = {"target": target, "shared": limit, "tensor_memory": 512, "spills": 8, "budget": 8}
    assert aot.violation(row) is None
    assert "shared memory" in aot.violation(row | {"shared": limit + 1})
    assert "tensor memory" in aot.violation(row | {"tensor_memory": 513})
    assert "its recorded budget is 8" in aot.violation(row | {"spills": 9})


def test_reads_cuda_resources():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function attention_forward_kernel:
  REG:168 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert aot_usage.parse_cuda_usage(text) == {"registers": 168, "spills": 24}
    with pytest.raises(ValueError, match="no resource usage"):
        aot_usage.parse_cuda_usage("Fatal: not an object file")


def test_reads_amd_resources():
    text = """
    .private_segment_fixed_size: 92
    .sgpr_count:     40
    .sgpr_spill_count: 13
    .vgpr_count:     512
    .vgpr_spill_count: 22
"""
    assert aot_usage.amd_usage(text) == {"registers": 512, "spills": 92, "scalar_spills": 13}
    with pytest.raises(ValueError, match=r"lacks \.vgpr_count"):
        aot_usage.amd_usage(text.replace(".vgpr_count", ".other"))


def test_counts_matrix_instructions():
    ptx = "wgmma.mma_async.sync.aligned.m64n64k16 a;\n wgmma.fence.sync;\n mma.sync.aligned.m16n8k16 b;\n"
    assert aot_usage.matrix_instructions(ptx) == {"wgmma": 1, "mma.sync": 1}
    assert aot_usage.matrix_instructions("v_mfma_f32_32x32x8_f16 x\n v_mfma_f32_32x32x8_f16 y") == {"mfma": 2}
    assert aot_usage.matrix_instructions("tcgen05.mma.cta_group::1.kind::f16 x\n tcgen05.commit y") == {"tcgen05": 1}


def test_command_writes_rows_and_tells_by_its_status(tmp_path, capsys):
    out = tmp_path / "rows" / "aot.json"
    assert aot.main(["--kernel", "pointwise", "--target", "sm_90", "--out", str(out), "--jobs", "1"]) == 0
    rows = json.loads(out.read_text())
    assert rows and all(row.keys() >= ROW_KEYS and row["ok"] for row in rows)
    assert "pointwise_kernel" in capsys.readouterr().out


def test_times_a_compile_only_where_there_was_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = entry("empty_kernel", "sm_90")
    first, again = aot.compile_entry(found), aot.compile_entry(found)
    assert first["compile_s"] > 0 and again["compile_s"] is None
    assert first["hash"] == again["hash"] != aot.compile_entry(entry("empty_kernel", "sm_80"))["hash"]


def test_takes_the_time_of_a_compile_over_from_the_rows_of_before(tmp_path, capsys):
    out = tmp_path / "aot.json"
    command = ["--kernel", "empty_kernel", "--target", "sm_90", "--out", str(out), "--jobs", "1"]
    assert aot.main(command) == 0
    rows = json.loads(out.read_text())
    out.write_text(json.dumps([rows[0] | {"compile_s": 123.4}]))
    assert aot.main(command) == 0
    assert json.loads(out.read_text())[0]["compile_s"] == 123.4
    assert "123.4" in capsys.readouterr().out
    out.write_text("of another kind")
    assert aot.main(command) == 0 and json.loads(out.read_text())[0]["compile_s"] is None


def test_command_refuses_a_kernel_that_is_not():
    with pytest.raises(SystemExit):
        aot.main(["--kernel", "no_such_kernel"])


def test_recording_raises_budgets_and_lowers_none(tmp_path, monkeypatch):
    path = tmp_path / "spill_budgets.json"
    monkeypatch.setattr(aot, "SPILL_BUDGETS", path)
    monkeypatch.setattr(aot, "spill_budgets", lambda: {"sm_90": {"a_kernel": {"old": 64, "more": 8}}})
    row = {"kernel": "a_kernel", "target": "sm_90", "shared": 0, "tensor_memory": 0, "ok": False, "error": "spills"}
    rows = [row | {"variant": variant, "spills": 16} for variant in ("old", "more", "new")]
    rows.append(row | {"variant": "none", "spills": 0, "ok": True, "error": None})
    aot.record(rows)
    assert json.loads(path.read_text()) == {"sm_90": {"a_kernel": {"old": 64, "more": 16, "new": 16}}}
    assert all(row["ok"] for row in rows)


# Bytes that dK and dV spill under some version of Triton, by head dim: at 64 outside the loops; at 256 only tiles too
# small for warp groups would spill none.
SPILLS_OF_DKDV = {"64": 8, "256": 160}


def test_attention_in_16_bits_spills_nothing_on_hopper():
    """What most calls run: no mask, a head dim that is a power of two. What is not budgeted may spill nothing."""
    budgets = spill_budgets()["sm_90"]
    for kernel in ("attention_forward_kernel", "attention_backward_dkdv_kernel", "attention_backward_dq_kernel"):
        for variant, spills in budgets.get(kernel, {}).items():
            if plain := re.fullmatch(r"\w+16 D=(16|64|128|256) unmasked", variant):
                assert spills <= ("dkdv" in kernel and SPILLS_OF_DKDV.get(plain[1], 0)), (kernel, variant)
        assert any(e.name == kernel and e.variant == "bfloat16 D=128 unmasked" for e in catalogue())
