"""Tables of tile sizes: the user's before ours, and what is said of one that is damaged."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from seqcore import cli, info
from seqcore.kernels import tables, tuning
from seqcore.kernels.recurrence import plan
from seqcore.kernels.tuning import INTERPRETER, Device, Tiles

from .table_twins import PLAN, ROW, SHAPE, a_table

H200 = Device("sm_90")

def written(tmp_path, table: dict | list | str):
    path = tmp_path / "table.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def tiles(head_dim: int, device: Device = H200, masked: bool = False) -> Tiles:
    return tuning.attention_tiles("attention_forward", head_dim, 16, device, masked)


def test_the_users_rows_beat_ours_which_stay_for_the_rest(tmp_path):
    ours, our_plan = tiles(128), plan.make(SHAPE, H200)
    other = replace(SHAPE, batch=64)
    other_plan = plan.make(other, H200)
    assert (our_plan.units, our_plan.fold) != (8, 2) and not tuning.is_measured("sm_90")
    with tuning.user_table(written(tmp_path, a_table())):
        assert tiles(64) == Tiles(64, 32, 4, 4)
        assert tiles(128) == ours
        made = plan.make(SHAPE, H200)
        assert {name: getattr(made, name) for name in PLAN} == PLAN
        assert plan.make(other, H200) == other_plan
        assert tuning.is_measured("sm_90")
        assert tuning.is_no_slower("sm_90", "lstm") and not tuning.is_no_slower("sm_90", "gru")
    assert plan.make(SHAPE, H200) == our_plan and not tuning.is_measured("sm_90")


def test_a_measured_plan_that_does_not_fit_gives_way(tmp_path):
    little = Device("sm_90", shared_memory=48 << 10)
    with tuning.user_table(written(tmp_path, a_table())):
        assert plan.make(SHAPE, little).regime == "streaming"


def test_an_operation_that_the_user_compared_is_the_users_to_judge():
    ours = {"measured_on": {}, "no_slower": ["gru", "lstm"]}
    mine = {"measured_on": {}, "no_slower": [], "compared": {"lstm": {"here": 0.9}}}
    assert tables.merged(mine, ours)["no_slower"] == ["gru"]


def test_the_users_exact_shape_comes_before_a_wider_one_of_ours():
    mine, ours = ({"shape": shape, "plan": PLAN} for shape in (asdict(SHAPE), {"gates": 4}))
    assert tables.merged({"recurrence": [mine]}, {"recurrence": [ours]})["recurrence"] == [mine, ours]


def test_the_cache_is_found_where_it_is_said_to_be(monkeypatch):
    assert tables.cache_folder() is None, "a test would read this machine's own tables"
    monkeypatch.setenv("SEQCORE_CACHE", "/somewhere")
    assert str(tables.user_file("sm_90")) == "/somewhere/tuned/sm_90.json"
    monkeypatch.delenv("SEQCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(tables.cache_folder()) == "/caches/seqcore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tables.cache_folder()) == "/home/someone/.cache/seqcore"


def test_a_table_in_the_cache_is_read_but_none_of_interpreted_times(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQCORE_CACHE", str(tmp_path))
    for arch in ("sm_90", INTERPRETER):
        path = tables.user_file(arch)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(a_table(arch=arch)))
    assert tuning.files("sm_90")[0] == tables.user_file("sm_90")
    assert tables.user_file(INTERPRETER) not in tuning.files(INTERPRETER)
    monkeypatch.setenv("SEQCORE_CACHE", "")
    assert [path.parent for path in tuning.files("sm_90")] == [tables.SHIPPED] * 2


DAMAGED = {
    "cut short": (json.dumps(a_table())[:-40], "char"),
    "not a table": ([1], "a list"),
    "of another format": (a_table(format=0), "format is 0"),
    "of another GPU": (a_table(arch="sm_80"), '"sm_80"'),
    "tiles missing": (a_table(attention_forward=[{"dtype_bits": 16, "head_dim": 64}]), "a row of attention_forward"),
    "tiles no power of two": (a_table(attention_forward=[ROW | {"BLOCK_N": 48}]), "a row of attention_forward"),
    "masked tiles of no type": (a_table(attention_forward=[ROW | {"masked": {"BLOCK_N": "64"}}]), "BLOCK_N"),
    "plan missing": (a_table(recurrence=[{"shape": asdict(SHAPE)}]), "a row of recurrence"),
    "plan of nothing": (a_table(recurrence=[{"shape": asdict(SHAPE), "plan": PLAN | {"rows": 0}}]), "a row of recurr"),
    "rows no list": (a_table(recurrence=3), "a row of recurrence"),
    "verdicts no list": (a_table(no_slower="lstm"), "no_slower"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_table_is_named_with_what_to_do(damage, tmp_path):
    content, reason = DAMAGED[damage]
    path = written(tmp_path, content)
    with tuning.user_table(path), pytest.raises(tables.BadTable) as error:
        plan.make(SHAPE, H200)
    message = str(error.value)
    assert str(path) in message and reason in message
    assert "Delete it" in message and "seqcore tune --force" in message


def test_the_command_line_says_so_too(tmp_path, capsys):
    path = written(tmp_path, "{")
    with tuning.user_table(path):
        assert cli.main(["info"]) == 2
    assert str(path) in capsys.readouterr().err


def test_ours_may_be_named_from_where_one_stands(monkeypatch):
    monkeypatch.chdir(tables.SHIPPED)
    assert tables.read(Path("sm_90.json"), "sm_90")["attention_forward"]


def test_shipped_tables_hold_rows_that_a_users_might():
    for path in tables.SHIPPED.glob("*.json"):
        shipped = json.loads(path.read_text()) | {"format": tables.FORMAT, "arch": "sm_90"}
        assert tables._fault(shipped, "sm_90") is None, path
        assert shipped.keys() <= {
            "format",
            "arch",
            "provenance",
            "measured_on",
            "compared",
            "no_slower",
            *tables.SECTIONS,
        }


def test_info_tells_which_tables_are_in_use_and_which_rows_are_of_other_kernels(tmp_path, capsys):
    arch = info.gather()["arch"]
    now = {"measured": {"kernels": info.family_hash("attention")}}
    rows = [ROW | now, ROW | {"head_dim": 128, "measured": {"kernels": "of before"}}]
    before = info.gather()["tables"]
    path = written(tmp_path, a_table(arch=arch, attention_forward=rows, recurrence=[]))
    with tuning.user_table(path):
        mine, *ours = info.gather()["tables"]
        assert cli.main(["info"]) == 0
    assert (mine["file"], mine["rows"], mine["stale_rows"]) == (str(path), 2, 1)
    assert mine["measured_on"] == {"device": "a GPU"}
    assert sum(table["rows"] for table in ours) == sum(table["rows"] for table in before) - 2
    printed = capsys.readouterr().out
    assert str(path) in printed and "by hand" in printed and "1 of them measured with other kernels" in printed


def test_tiles_can_be_overridden_for_one_operation():
    before, mine = tiles(64), Tiles(16, 16, 2, 1)
    with tuning.overriding("attention_forward", mine):
        assert tiles(64) == tiles(256, masked=True) == mine
        assert tuning.attention_tiles("attention_decode", 64, 16, H200) != mine
    assert tiles(64) == before


def test_a_row_gives_back_the_tiles_it_was_made_of():
    for made in (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2, persistent=2, descriptors=True, specialize=True)):
        assert Tiles.of(made.row()) == made


def test_plans_can_be_overridden_for_one_pass():
    forward, backward = plan.make(SHAPE, H200), plan.make(replace(SHAPE, backward=True), H200)
    with plan.overriding(backward=True, num_warps=16):
        assert plan.make(SHAPE, H200) == forward
        assert plan.make(replace(SHAPE, backward=True), H200).num_warps == 16 != backward.num_warps
    assert plan.make(replace(SHAPE, backward=True), H200) == backward
