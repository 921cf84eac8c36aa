"""The script that makes the tables of launch configurations, and that the tables answer every shape."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.tune import entry as tune
from bench.tune.__main__ import main
from bench.tune.measure import measure
from tests.ops.aot_cases import MAKERS, tables_of
from ztok_fast.ops import requirements, triton_tables
from ztok_fast.ops.nearest import triton_configs as nearest

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = list(tune.all_entries())
TABLES = [(family, table) for family in tune.FAMILIES for table in tables_of(family)]


@pytest.mark.parametrize(("family", "table"), TABLES)
def test_the_script_covers_the_table(family, table):
    """Its keys are those of the table, no more and no fewer, and what is checked in is one of its candidates."""
    entries = {entry.key: entry for entry in ENTRIES if (entry.family, entry.table) == (family, table)}
    by_arch = tables_of(family)[table]
    assert set(by_arch) == set(triton_tables.ARCHITECTURES)
    assert set(entries) == {key for of_arch in by_arch.values() for key in of_arch}
    for of_arch in by_arch.values():
        # WHOLE alone may leave out a key: another table has it
        assert (family, table) == ("nearest", "WHOLE") or set(of_arch) == set(entries)
        for key, chosen in of_arch.items():
            assert chosen in entries[key].candidates
            assert type(chosen) is type(entries[key].candidates[0])


def test_no_key_is_listed_twice_and_every_table_is_compiled():
    keys = [(entry.family, entry.table, entry.key) for entry in ENTRIES]
    assert len(keys) == len(set(keys))
    assert {family: set(makers) for family, makers in MAKERS.items()} == {
        family: {table for owner, table in TABLES if owner == family} for family in tune.FAMILIES
    }


@pytest.mark.parametrize(("family", "table"), [pair for pair in TABLES if pair != ("nearest", "WHOLE")])
def test_every_size_has_an_entry(family, table):
    """Of every kind, on every architecture; the entry is that of the least bound that holds the size."""
    by_arch = tables_of(family)[table]
    for capability in ((0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        entries = by_arch[triton_tables.architecture(capability)]
        for kind in {key[1:] for key in entries}:
            bounds = sorted(key[0] for key in entries if key[1:] == kind)
            assert bounds[-1] == triton_tables.ANY
            for size in (0, 1, 16, 17, 64, 65, 512, 513, 4096, 10**6, 2**40):
                expected = entries[(next(bound for bound in bounds if bound >= size), *kind)]
                assert triton_tables.look_up(by_arch, capability, size, *kind) == expected


def test_kinds_are_those_that_the_launchers_ask_for():
    terms, booleans = {(1, 1), (2, 1), (2, 2)}, (False, True)
    asked = {
        ("nearest", "WIDE"): terms, ("nearest", "STEPS"): terms, ("halting", "MEANS"): {(b,) for b in booleans},
        ("halting", "GRADIENTS"): {(b,) for b in booleans}, ("lora", "SHRINK"): {(b,) for b in booleans},
        ("lora", "OUTER"): {(b,) for b in booleans}, ("lora", "LINEAR"): set(itertools.product(booleans, booleans)),
        ("zhead", "SCAN"): {(2,), (4,)},
    }  # fmt: skip
    for family, table in TABLES:
        if (family, table) != ("nearest", "WHOLE"):
            for entries in tables_of(family)[table].values():
                assert {key[1:] for key in entries} == asked.get((family, table), {()}), (family, table)


def test_a_kind_without_an_entry_is_an_error():
    with pytest.raises(LookupError, match=r"no entry of sm_90 for \(64, 3, 3\)"):
        triton_tables.look_up(nearest.WIDE, (9, 0), 64, 3, 3)


def test_the_smallest_tile_that_holds_the_row_is_chosen():
    assert nearest.whole_tile(40, 1, 1, (9, 0)).width == 64
    assert nearest.whole_tile(65, 1, 1, (9, 0)).width == 256
    assert nearest.whole_tile(257, 1, 1, (9, 0)) is None
    assert nearest.whole_tile(256, 2, 2, (8, 6)) is None
    assert nearest.step_tile(65, 2, 2, (10, 0)) == nearest.STEPS["sm_100"][triton_tables.ANY, 2, 2]
    assert triton_tables.architecture((12, 0)) == "sm_100" and triton_tables.architecture((0, 0)) == "sm_90"


def fake_entries(calls):
    """Two entries with three candidates each, whose call notes what the table holds."""
    scans = tuple(nearest.Scan(rows, 128, 32, 4, 3) for rows in (16, 32, 64))
    table = nearest.STEPS["sm_90"]
    made = []
    for bound in (64, triton_tables.ANY):
        key = (bound, 1, 1)
        prepare = lambda key=key: lambda: calls.append((key, table[key]))  # noqa: E731
        made.append(tune.Entry("nearest", "STEPS", key, (*scans, table[key]), prepare))
    return made


class Clock:
    """A clock that the timed calls move on."""

    now = 0.0

    def __call__(self):
        return self.now


def test_the_fastest_is_a_line_for_the_table_and_the_table_is_as_before():
    calls, clock = [], Clock()
    before = dict(nearest.STEPS["sm_90"])

    def timer(call):
        call()
        return {16: 3.0, 32: 1.0, 64: 2.0, 128: 4.0}[calls[-1][1].rows]

    said = list(measure(fake_entries(calls), "sm_90", 1.0, timer, clock=clock))
    assert nearest.STEPS["sm_90"] == before
    assert calls[0][1] == before[64, 1, 1]  # what is checked in comes first
    assert "STEPS['sm_90'][(64, 1, 1)] = Scan(32, 128, 32, 4, 3)" in said
    assert "STEPS['sm_90'][(ANY, 1, 1)] = Scan(32, 128, 32, 4, 3)" in said
    # the lines are Python that sets the entry
    for text in said:
        if not text.startswith("#"):
            exec(text, {"STEPS": {"sm_90": {}}, "Scan": nearest.Scan, "ANY": triton_tables.ANY})


def test_nothing_is_begun_that_may_pass_the_deadline():
    calls, clock = [], Clock()

    def timer(call):
        clock.now += 2.0
        call()
        return 1.0

    said = list(measure(fake_entries(calls), "sm_90", 5.0, timer, clock=clock))
    assert len(calls) == 2 and clock.now == 4.0
    assert all(text.startswith("#") for text in said)  # no entry was timed to its end
    left = [text for text in said if "not timed" in text]
    assert len(left) == 2 and "nearest.STEPS[(64, 1, 1)]" in left[0] and "(64, 128, 32, 4, 3)" in left[0]
    assert left[1].count("(") == 1 + 4


def test_a_candidate_without_room_is_said_and_left_out():
    class OutOfRoom(Exception):
        pass

    def timer(call):
        raise OutOfRoom("shared memory")

    said = list(measure(fake_entries([])[:1], "sm_90", 1.0, timer, (OutOfRoom,), Clock()))
    assert said and all("shared memory" in text for text in said)


def test_keys_that_an_architecture_has_not_are_said():
    entry = next(entry for entry in ENTRIES if entry.table == "WHOLE" and entry.key == (256, 2, 2))
    assert list(measure([entry], "sm_80", 1.0, None, clock=Clock())) == [
        "# nearest.WHOLE[(256, 2, 2)]: not timed: sm_80 has no such entry"
    ]


ONE_PER_TABLE = {(entry.family, entry.table): entry for entry in ENTRIES}.values()


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.name, marks=() if e in ONE_PER_TABLE else pytest.mark.slow) for e in ENTRIES]
)
def test_what_is_timed_runs_and_looks_the_entry_s_table_up(entry, monkeypatch):
    """With small inputs, in Triton's interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = next(row for row in requirements.rows_of("codebook_assign") if row.backend == "triton")
    if missing := requirements.unmet(row, device, forced=True):
        pytest.skip("; ".join(missing))
    monkeypatch.setattr(tune.PLACE, "device", device.type)
    # rows for WIDE must not fit a tile of WHOLE
    monkeypatch.setattr(tune.PLACE, "most", 300 if entry.table == "WIDE" else 64)
    asked = []
    find = triton_tables.find

    def noted(table, *arguments):
        asked.append(table)
        return find(table, *arguments)

    monkeypatch.setattr(triton_tables, "find", noted)
    monkeypatch.setattr(nearest, "find", noted)
    entry.prepare()()
    # where the interpreter has a tile of its own, it is in no table
    if not ((entry.family, entry.table) == ("halting", "LATER") and requirements.triton_is_interpreted()):
        assert any(table is tables_of(entry.family)[entry.table] for table in asked)


def test_without_a_gpu_or_dry_there_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--dry" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--tables", "nothing"])
    assert "expected families or tables, got nothing" in capsys.readouterr().err


def test_dry_mode_compiles_a_candidate_of_each_family():
    """In a process of its own: here kernels may be interpreted. One small table per family."""
    pytest.importorskip("triton")
    tables = ["nearest.PREPARE", "quantize.ROWS", "halting.OFFSETS", "lora.OUTER", "zhead.SELECT"]
    result = subprocess.run(
        [sys.executable, "-m", "bench.tune", "--dry", "--capabilities", "90", "--most", "1", "--tables", *tables],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["arch", "table", "key", "candidate", "regs", "stack", "shared", "blocks"]
    expected = [entry for entry in ENTRIES if f"{entry.family}.{entry.table}" in tables]
    assert len(rows) == len(expected)
    for row in rows:
        assert re.match(r"sm_90  (nearest|quantize|halting|lora|zhead)\.[A-Z]+ +\(.*\) +\(.*\)( +\d+){4}", row), row
