import os

import pytest

from ztok_fast.files import replace_atomically


def test_a_file_takes_the_targets_place_at_the_end(tmp_path):
    target = tmp_path / "new" / "file"
    with replace_atomically(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    with replace_atomically(target) as temporary:
        temporary.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert os.listdir(target.parent) == ["file"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("older")
    with pytest.raises(RuntimeError), replace_atomically(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "older" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_none_and_of_no_full_one(tmp_path):
    target = tmp_path / "folder"
    for expected in (None, OSError):
        try:
            with replace_atomically(target) as temporary:
                temporary.mkdir()
                (temporary / "file").write_text("x")
        except OSError as error:
            assert expected is not None, error
        else:
            assert expected is None
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(target) == ["file"]


def test_files_are_as_readable_as_any_other(tmp_path):
    with replace_atomically(tmp_path / "atomic") as temporary:
        temporary.write_text("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
