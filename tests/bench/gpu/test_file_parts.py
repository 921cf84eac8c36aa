import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.gpu.file_parts import FilePartsError, join_file, main, split_file


@pytest.fixture
def split(tmp_path):
    """A file of 1,000 bytes, split into parts of at most 300."""
    whole = tmp_path / "model.bin"
    whole.write_bytes(bytes(range(250)) * 4)
    return whole, split_file(whole, tmp_path / "parts", 300)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 250))
def test_split_and_join_give_back_every_byte(tmp_path_factory, data, part_bytes):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "whole").write_bytes(data)
    manifest = split_file(folder / "whole", folder / "parts", part_bytes)
    sizes = [part.stat().st_size for part in (folder / "parts").glob("whole.part*[0-9]")]
    assert sum(sizes) == len(data) and all(size <= part_bytes for size in sizes)
    assert join_file(manifest, folder / "joined").read_bytes() == data


def test_parts_are_named_in_order_and_nearly_equal(split):
    _, manifest = split
    parts = json.loads(manifest.read_text())["parts"]
    assert [(part["name"], part["bytes"]) for part in parts] == [(f"model.bin.part{i:03d}", 250) for i in range(4)]


def test_a_folder_as_target_receives_the_file_under_its_name(split, tmp_path):
    (tmp_path / "there").mkdir()
    assert join_file(split[1], tmp_path / "there") == tmp_path / "there" / "model.bin"


def test_parts_may_lie_apart_from_the_manifest(split, tmp_path):
    whole, manifest = split
    moved = tmp_path / "manifest.json"
    manifest.rename(moved)
    assert join_file(moved, tmp_path / "joined", tmp_path / "parts").read_bytes() == whole.read_bytes()


def test_missing_short_and_altered_parts_are_named_and_nothing_is_written(split, tmp_path):
    _, manifest = split
    part = manifest.parent / "model.bin.part001"
    data = part.read_bytes()
    for damaged in (data[:-1], data[:-1] + b"\x00", data + b"\x00"):
        part.write_bytes(damaged)
        with pytest.raises(FilePartsError, match="part001: expected 250 bytes with SHA-256"):
            join_file(manifest, tmp_path / "joined")
    part.unlink()
    with pytest.raises(FilePartsError, match="part001: expected an existing file of 250 bytes"):
        join_file(manifest, tmp_path / "joined")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "parts"]


def test_parts_in_another_order_are_refused(split, tmp_path):
    _, manifest = split
    description = json.loads(manifest.read_text())
    # The file repeats itself every 250 bytes: only a shift shows.
    description["parts"] = description["parts"][:3]
    manifest.write_text(json.dumps(description))
    with pytest.raises(FilePartsError, match="SHA-256 .* of the joined file"):
        join_file(manifest, tmp_path / "joined")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected format"),
        ({"parts": 3}, "expected name, bytes, sha256 and parts"),
        ({"name": None}, "plain file names"),
        ({"name": "../escape"}, "plain file names, got '../escape'"),
        ({"name": ".."}, "plain file names"),
        ({"bytes": "many"}, "integers as bytes"),
        ({"sha256": 5}, "strings as sha256"),
    ],
)
def test_a_tampered_manifest_is_refused(split, tmp_path, change, message):
    _, manifest = split
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(FilePartsError, match=message):
        join_file(manifest, tmp_path / "joined")


def test_unreadable_manifests_and_bad_arguments_are_named(tmp_path):
    (tmp_path / "broken.parts.json").write_text("{")
    with pytest.raises(FilePartsError, match="broken.parts.json: expected a readable"):
        join_file(tmp_path / "broken.parts.json", tmp_path / "joined")
    with pytest.raises(FilePartsError, match="expected a readable"):
        join_file(tmp_path / "nowhere.parts.json", tmp_path / "joined")
    with pytest.raises(FilePartsError, match="expected an existing file"):
        split_file(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FilePartsError, match="part_bytes: expected a positive"):
        split_file(tmp_path / "broken.parts.json", tmp_path, 0)


def test_the_command_splits_joins_and_fails_plainly(split, tmp_path, capsys):
    whole, _ = split
    assert main(["split", str(whole), str(tmp_path / "again"), "--part-mb", "0.0004"]) == 0
    manifest = capsys.readouterr().out.strip()
    assert main(["join", manifest, str(tmp_path / "joined")]) == 0
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes()
    assert main(["join", str(tmp_path / "nowhere"), str(tmp_path)]) == 1
    assert "error: manifest" in capsys.readouterr().err
