import pytest

from bench import tune_triton
from ztok_fast.ops.nearest import triton_configs as configs


def test_the_tables_hold_candidates():
    """Every checked-in tile is one that the script compares, under a key that it has."""
    candidates = {(table, key): tiles for table, key, tiles in tune_triton.entries()}
    for table in ("WHOLE", "STEPS"):
        for entries in getattr(configs, table).values():
            for key, tile in entries.items():
                assert tile in candidates[table, key]


def test_the_smallest_tile_that_holds_the_row_is_chosen():
    assert configs.whole_tile(40, 1, 1, (9, 0)).width == 64
    assert configs.whole_tile(65, 1, 1, (9, 0)).width == 256
    assert configs.whole_tile(257, 1, 1, (9, 0)) is None
    assert configs.whole_tile(256, 2, 2, (8, 6)) is None
    assert configs.step_tile(2, 2, (10, 0)) == configs.STEPS["sm_100"][2, 2]
    assert configs.architecture((12, 0)) == "sm_100" and configs.architecture((0, 0)) == "sm_90"


def test_without_a_gpu_or_dry_there_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        tune_triton.main(["--help"])
    assert stop.value.code == 0 and "--dry" in capsys.readouterr().out
