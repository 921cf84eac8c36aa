import shutil
import subprocess

import pytest
import torch

from bench.gpu.files import KEEP, FilesError, export_run, join_file, main, restore_run, slim, split_file, write_codec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.weights import load_weights


@pytest.fixture
def split(tmp_path):
    """A file of 1,000 bytes that repeats itself every 250, split into four parts."""
    whole = tmp_path / "model.bin"
    whole.write_bytes(bytes(range(250)) * 4)
    return whole, split_file(whole, tmp_path / "parts", 250)


@pytest.mark.parametrize(("size", "part_bytes"), [(0, 5), (1, 1), (200, 7), (200, 200), (200, 500)])
def test_split_and_join_give_back_every_byte(tmp_path, size, part_bytes):
    (tmp_path / "whole").write_bytes(bytes(range(size)))
    sums = split_file(tmp_path / "whole", tmp_path / "parts", part_bytes)
    parts = sorted((tmp_path / "parts").glob("whole.part*"))
    assert [part.name for part in parts] == [f"whole.part{i:03d}" for i in range(-(-size // part_bytes))]
    assert all(part.stat().st_size <= part_bytes for part in parts)
    assert join_file(sums, tmp_path / "joined").read_bytes() == bytes(range(size))
    (tmp_path / "there").mkdir()
    assert join_file(sums, tmp_path / "there") == tmp_path / "there" / "whole"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_checksums(split):
    whole, sums = split
    shutil.copy(whole, sums.parent)
    subprocess.run(["sha256sum", "--check", "--quiet", sums.name], cwd=sums.parent, check=True)


def test_missing_short_altered_and_mixed_up_parts_are_errors_and_nothing_is_written(split, tmp_path):
    _, sums = split
    part, lines = sums.parent / "model.bin.part001", sums.read_text().splitlines(keepends=True)
    data = part.read_bytes()
    for damaged in (data[:-1], data[:-1] + b"\x00", data + b"\x00"):
        part.write_bytes(damaged)
        with pytest.raises(FilesError, match="part001: expected SHA-256"):
            join_file(sums, tmp_path / "joined")
    part.unlink()
    with pytest.raises(FilesError, match="part001: expected an existing file"):
        join_file(sums, tmp_path / "joined")
    part.write_bytes(data)
    sums.write_text("".join(lines[1:]))
    with pytest.raises(FilesError, match="SHA-256 .* of the joined file"):
        join_file(sums, tmp_path / "joined")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "parts"]


@pytest.mark.parametrize("text", ["", "x", "0  ../escape\n", "0  ..\n", "0  a/b\n0  c\n", "0  \n"])
def test_checksums_that_are_none_or_lead_out_of_the_folder_are_refused(tmp_path, text):
    (tmp_path / "bad.sha256").write_text(text)
    with pytest.raises(FilesError, match="bad.sha256: expected lines"):
        join_file(tmp_path / "bad.sha256", tmp_path / "joined")


def state():
    """A checkpoint with the entries of the trainer's."""
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    moments = {"step": torch.tensor(7.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
    return {
        "step": 7,
        "stream": {"rows_read": 3, "random": (3, (1, 2), None), "buffer": [([1, 2], [], [])]},
        "codec": {"adapters.weight": weight},
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.1, "peak": 0.1, "params": [0]}]},
        "config": ZTokConfig(base_model="tiny").to_dict(),
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(state(), folder / "checkpoint.pt")
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    return folder


def test_everything_survives_parts_bit_for_bit(run, tmp_path):
    assert export_run(run, tmp_path / "out", part_bytes=5000) == "everything"
    assert all(path.stat().st_size <= 5000 for path in (tmp_path / "out").iterdir())
    restore_run(tmp_path / "out" / "checkpoint.pt.sha256", tmp_path / "again")
    restored, original = torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True), state()
    assert torch.equal(restored["codec"]["adapters.weight"], original["codec"]["adapters.weight"])
    assert torch.equal(restored["optimizer"]["state"][0]["exp_avg"], original["optimizer"]["state"][0]["exp_avg"])
    assert restored["stream"] == original["stream"] and restored["step"] == 7
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == '{"step": 7}\n'


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_kept_and_that_an_optimiser_loads_it(keep):
    original = state()
    parameter = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = torch.optim.AdamW([{"params": [parameter], "peak": 0.1}])
    original["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]
    slimmed = slim(original, keep)
    moments, weight = slimmed["optimizer"]["state"], slimmed["codec"]["adapters.weight"]
    assert weight.dtype == (torch.bfloat16 if keep == "half-weights" else torch.float32)
    if keep in ("weights", "half-weights"):
        assert moments == {}
    else:
        dtype = torch.bfloat16 if keep == "half-moments" else torch.float32
        assert moments[0]["exp_avg"].dtype == moments[0]["exp_avg_sq"].dtype == dtype
        assert moments[0]["step"].dtype == torch.float32
    assert original["codec"]["adapters.weight"].dtype == torch.float32
    optimizer.load_state_dict(slimmed["optimizer"])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32 and torch.isfinite(parameter).all()


def test_auto_keeps_the_most_that_fits(run, tmp_path):
    sizes = []
    for keep in KEEP:
        export_run(run, tmp_path / keep, keep)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / keep).glob("checkpoint.pt.part*")))
        assert export_run(run, tmp_path / "auto", limit=sizes[-1]) == keep
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(KEEP)
    with pytest.raises(FilesError, match="expected at most .* as half-weights"):
        export_run(run, tmp_path / "auto", limit=sizes[-1] - 1)


def test_the_command(run, split, tmp_path, capsys):
    whole, _ = split
    assert main(["split", str(whole), str(tmp_path / "again"), "--part-mb", "0.0004"]) == 0
    assert main(["join", capsys.readouterr().out.strip(), str(tmp_path / "joined")]) == 0
    assert (tmp_path / "joined").read_bytes() == whole.read_bytes()
    assert main(["export", str(run), str(tmp_path / "out"), "--part-mb", "0.005"]) == 0
    assert main(["codec", str(tmp_path / "out" / "checkpoint.pt.sha256"), str(tmp_path / "codec")]) == 0
    weights = load_weights(tmp_path / "codec")["adapters.weight"]
    assert torch.equal(weights, state()["codec"]["adapters.weight"].to(torch.bfloat16))
    assert ZTokConfig.load(tmp_path / "codec") == ZTokConfig(base_model="tiny")
    write_codec(run / "checkpoint.pt", tmp_path / "codec")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("split", "split: expected an existing file"), ("join", "expected checksums"),
        ("export", "expected a checkpoint.pt in it"), ("restore", "expected an existing file, or checksums"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_an_error(tmp_path, capsys, command, message):
    assert main([command, str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
