"""Tables of tile sizes that somebody else wrote: either kernels can be chosen by them, or it is said what is wrong."""

import json
import os
import threading
import warnings
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import strategies as st

from seqcore import cli, info
from seqcore.kernels import reading, tables, tuning
from seqcore.kernels.recurrence import plan
from seqcore.kernels.tuning import Device
from seqcore.tuning import table as tuning_table

from .effort import drawn
from .table_twins import PLAN, ROW, SHAPE, a_table

H200 = Device("sm_90")
RECURRENCE = {"shape": asdict(SHAPE), "plan": PLAN}


def with_row(**changes) -> str:
    return json.dumps(a_table(attention_forward=[ROW | changes]))


def with_plan(**changes) -> str:
    return json.dumps(a_table(recurrence=[{"shape": asdict(SHAPE), "plan": PLAN | changes}]))


# The text of a file, and what is said of it.
TEXTS = {
    "nothing": ("", "Expecting value"),
    "a bomb of lists": ("[" * 400_000, "nested too deep"),
    "a bomb of objects": ('{"format":' * 90_000, "nested too deep"),
    "nested where rows belong": (json.dumps(a_table())[:-1] + ', "weights": ' + "[" * 300 + "]" * 300 + "}", "weights"),
    "another encoding": (json.dumps(a_table()).encode("utf-16"), "utf-8"),
    "bytes of no text": (b"\xff\xfe\x00", "utf-8"),
    "NaN": (json.dumps(a_table(compared={"lstm": {"here": float("nan")}})), "NaN is no number"),
    "infinity": (json.dumps(a_table()).replace("1.0", "-Infinity"), "-Infinity is no number"),
    "a number beyond floats": (json.dumps(a_table()).replace("1.0", "1e999"), "1e999 is no number"),
    "a number of many digits": (json.dumps(a_table()).replace("768", "7" * 5000), ""),
    "a name twice": (json.dumps(a_table())[:-1] + ', "format": 1}', "'format' stands there twice"),
    "a format that is a bool": (json.dumps(a_table(format=True)), "format is true"),
    "an unknown section": (json.dumps(a_table(attention_sideways=[])), "attention_sideways"),
    "commands for a terminal": (json.dumps(a_table(provenance="\x1b[2J")), "provenance"),
    "verdicts that are no names": (json.dumps(a_table(no_slower=[["lstm"], 3])), "no_slower"),
    "more than a table has": (json.dumps(a_table(provenance=" " * tables.MOST_BYTES)), "more than"),
    "a tile beyond any memory": (with_row(BLOCK_M=1 << 40), "a row of attention_forward"),
    "a tile too small to multiply": (with_row(BLOCK_N=8), "a row of attention_forward"),
    "text in the place of a number": (with_row(num_warps="4"), "a row of attention_forward"),
    "a bool in the place of a number": (with_row(num_stages=True), "a row of attention_forward"),
    "a number in the place of a bool": (with_row(descriptors=1), "a row of attention_forward"),
    "fewer programs than none": (with_row(persistent=-1), "a row of attention_forward"),
    "more stages than shared memory": (with_row(num_stages=10**6), "a row of attention_forward"),
    "an option that none has": (with_row(BLOCK_K=64), "a row of attention_forward"),
    "masked tiles beyond any memory": (with_row(masked={"BLOCK_M": 1 << 20}), "a row of attention_forward"),
    "masked for another head dim": (with_row(masked={"head_dim": 128}), "a row of attention_forward"),
    "a measurement that is none": (with_row(measured=[1]), "a row of attention_forward"),
    "a plan with more fields": (with_plan(slices=0), "a row of recurrence"),
    "a plan beyond any memory": (with_plan(tile=1 << 40), "a row of recurrence"),
    "a shape of other fields": (
        json.dumps(a_table(recurrence=[{"shape": asdict(SHAPE) | {"__class__": 1}, "plan": PLAN}])),
        "a row of recurrence",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", TEXTS)
def test_a_hostile_text_is_refused(damage, tmp_path):
    text, reason = TEXTS[damage]
    path = tmp_path / "sm_90.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(tables.BadTable) as refused:
        tables.read(path, "sm_90")
    said = str(refused.value)
    assert str(path) in said and reason in said and "seqcore tune --force" in said
    assert len(said) < 1000 and said.isprintable()


def no_file(kind: str, path: Path) -> None:
    """What is no file with text in it, in a file's place."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "gigabytes":
        with path.open("wb") as file:
            file.truncate(1 << 33)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": path / "nowhere", "circle": path}[kind])


NO_FILES = ("pipe", "folder", "gigabytes", "device", "dangling", "circle")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files of these kinds are of POSIX")
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(kind, tmp_path):
    path = tmp_path / "sm_90.json"
    no_file(kind, path)
    said = []

    def read():
        with pytest.raises(tables.BadTable, match="is no table of tile sizes for sm_90") as refused:
            tables.read(path, "sm_90")
        said.append(str(refused.value))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert said, "it is waited for"


def test_a_link_to_a_table_is_a_table(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(a_table()))
    (tmp_path / "sm_90.json").symlink_to(tmp_path / "mine.json")
    assert tables.read(tmp_path / "sm_90.json", "sm_90") == a_table()


# --- what comes of it --------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A table in the user's cache that cannot be used."""
    monkeypatch.setenv("SEQCORE_CACHE", str(tmp_path))
    path = tables.user_file("sm_90")
    path.parent.mkdir()
    path.write_text(with_row(BLOCK_M=48))
    tuning._forget()
    monkeypatch.setattr(tuning, "_unusable", set())
    yield path
    tuning._forget()


def test_a_broken_cache_is_told_of_once_and_ours_is_taken(broken):
    with tuning.user_table(None):
        ours = tuning.attention_tiles("attention_forward", 64, 16, H200), plan.make(SHAPE, H200)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert (tuning.attention_tiles("attention_forward", 64, 16, H200), plan.make(SHAPE, H200)) == ours
        # Another key of the cache behind it, and so read again.
        tuning.table("sm_90", shared_memory=99 << 10)
        tuning._forget()
        assert not tuning.is_measured("sm_90")
    (warning,) = told
    assert issubclass(warning.category, RuntimeWarning)
    said = str(warning.message)
    assert str(broken) in said and "a row of attention_forward" in said and "Delete it" in said
    assert "the tables of this version are used" in said


def test_a_broken_table_that_was_named_raises(broken):
    # And would do so if warnings were no errors, as they are in tests.
    warnings.simplefilter("ignore")
    for path in (broken, broken.with_name("nowhere.json"), broken.parent):
        with tuning.user_table(path), pytest.raises(tables.BadTable, match="is no table"):
            plan.make(SHAPE, H200)


def test_the_command_line_stops_at_a_broken_cache(broken, monkeypatch, capsys):
    monkeypatch.setattr(info.devices, "describe", lambda _device: H200)
    # The command says for itself that warnings of this are errors, as all are in tests.
    warnings.simplefilter("ignore")
    for _ in range(2):
        assert cli.main(["info"]) == 2
        said = capsys.readouterr()
        assert str(broken) in said.err and "seqcore tune --force" in said.err and not said.out
    assert cli.main(["precompile", "lstm", "--arch", "sm_90", "--T", "2", "--H", "768"]) == 2
    assert str(broken) in capsys.readouterr().err


# --- drawn -------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from((0, 1, -1, 16, 48, 64, 1 << 31, 1 << 63, 1 << 70, "lstm", "sm_90", tables.FORMAT)),
    lambda values: st.lists(values, max_size=3)
    | st.dictionaries(st.text(max_size=8) | st.sampled_from((*ROW, *PLAN, *a_table(), "masked")), values, max_size=3),
    max_leaves=8,
)  # fmt: skip


def places(value, path=()):
    """Where something stands in a table: the keys on the way there."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


FULL = a_table(
    attention_forward=[ROW | {"masked": {"BLOCK_N": 16}, "persistent": 2, "descriptors": True, "measured": {"ms": 1}}],
    attention_decode=[ROW],
)  # fmt: skip


@st.composite
def mutated(draw) -> dict:
    """A table in which one to three things have become others, are gone, or are there besides."""
    table = json.loads(json.dumps(FULL))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(list(places(table))))
        holder = table
        for key in way:
            holder = holder[key]
        deed = draw(st.sampled_from(("replace", "resize", "remove", "add")))
        if deed == "remove":
            del holder[last]
        elif deed == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5) | st.sampled_from((*ROW, *PLAN)))] = draw(JSON)
        elif deed == "resize" and type(holder[last]) is int:
            holder[last] = draw(st.sampled_from((0, 1, 8, 32, 128, 1024, 1 << 20, 1 << 40)))
        else:
            holder[last] = draw(JSON)
    return table


def check_chosen(path: Path) -> None:
    """Tiles and plans can be made by the table for every kind of problem, and it can be told of and written again."""
    with tuning.user_table(path):
        for operation, head_dim, bits, masked in product(tables.ATTENTION, (16, 64, 65, 256), (16, 32), (False, True)):
            tiles = tuning.attention_tiles(f"attention_{operation}", head_dim, bits, H200, masked)
            assert {tiles.rows, tiles.columns} <= {16, 32, 64, 128, 256} and tiles.num_warps <= 32
        for gates, units, batch, backward in product((1, 3, 4), (1, 768), (1, 16), (False, True)):
            made = plan.make(plan.Shape(gates, units, 1, batch, 1, 2, backward), H200)
            assert made.shared_memory <= H200.shared_memory and made.slices * made.teams <= H200.multiprocessors
        tuning.is_no_slower("sm_90", "lstm")
        info._tables(H200)
    again = tuning_table.make(H200, [], tables.read(path, "sm_90"))
    tuning_table.write(tuning_table.judged(again, {"gru": {"here": 1.0}}), path)
    tables.read(path, "sm_90")


def refused_or_chosen_by(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        tables.read(path, "sm_90")
        said = ""
    except tables.BadTable as refused:
        said = str(refused)
    assert said.isprintable()
    if not said:
        check_chosen(path)


def test_kernels_are_chosen_by_a_whole_table(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(FULL))
    check_chosen(path)


@drawn(150, 6000, table=mutated())
def test_a_drawn_mutation_is_refused_or_served(tmp_path_factory, table):
    refused_or_chosen_by(tmp_path_factory.getbasetemp() / "mutated.json", json.dumps(table).encode())


@drawn(100, 4000, content=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
def test_a_drawn_file_is_refused(tmp_path_factory, content):
    refused_or_chosen_by(tmp_path_factory.getbasetemp() / "drawn.json", content)


@drawn(60, 3000, first=st.integers(0, 10**6), count=st.integers(0, 8), inserted=st.binary(max_size=8))
def test_a_table_with_other_bytes_is_refused_or_served(tmp_path_factory, first, count, inserted):
    content = json.dumps(FULL).encode()
    first %= len(content)
    refused_or_chosen_by(
        tmp_path_factory.getbasetemp() / "bytes.json", content[:first] + inserted + content[first + count :]
    )


def test_names_are_looked_at_once_each():
    # Many names, the last one twice: what looked for it from the beginning each time would take hours.
    content = "{" + ", ".join(f'"{number}": 0' for number in [*range(100_000), 99_999]) + "}"
    with pytest.raises(ValueError, match="'99999' stands there twice"):
        reading.strict(content.encode())


def test_no_warning_without_a_table_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQCORE_CACHE", str(tmp_path))
    tuning._forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.table("sm_90")
    tuning._forget()
