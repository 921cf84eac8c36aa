import pytest
import torch

from bench.gpu.run_files import KEEP, export_run, main, restore_run, slim, write_codec
from ztok_fast.codec.config import ZTokConfig
from bench.gpu.file_parts import FilePartsError
from ztok_fast.codec.weights import load_weights


def state():
    """A checkpoint with the entries of the trainer's."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 50, generator=draw)
    moments = {"step": torch.tensor(7.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight**2}
    return {
        "step": 7,
        "stream": {"rows_read": 3, "random": (3, (1, 2), None), "buffer": [([1, 2], [], [])]},
        "care": {"usage": torch.ones(2, 4), "latents": torch.ones(3, 4)},
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


def read(path):
    return torch.load(path, weights_only=True)


def test_everything_survives_parts_bit_for_bit(run, tmp_path):
    assert export_run(run, tmp_path / "out", part_bytes=5000) == "everything"
    assert all(path.stat().st_size <= 5000 for path in (tmp_path / "out").iterdir())
    restore_run(tmp_path / "out" / "checkpoint.pt.parts.json", tmp_path / "again")
    restored, original = read(tmp_path / "again" / "checkpoint.pt"), state()
    assert torch.equal(restored["codec"]["adapters.weight"], original["codec"]["adapters.weight"])
    assert torch.equal(restored["optimizer"]["state"][0]["exp_avg"], original["optimizer"]["state"][0]["exp_avg"])
    assert restored["stream"] == original["stream"] and restored["step"] == 7
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == '{"step": 7}\n'


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_kept(keep):
    original = state()
    slimmed = slim(original, keep)
    moments, weight = slimmed["optimizer"]["state"], slimmed["codec"]["adapters.weight"]
    assert slimmed["optimizer"]["param_groups"] == original["optimizer"]["param_groups"]
    assert weight.dtype == (torch.bfloat16 if keep == "half-weights" else torch.float32)
    if keep in ("weights", "half-weights"):
        assert moments == {}
    else:
        dtype = torch.bfloat16 if keep == "half-moments" else torch.float32
        assert moments[0]["exp_avg"].dtype == moments[0]["exp_avg_sq"].dtype == dtype
        assert moments[0]["step"].dtype == torch.float32
    assert original["codec"]["adapters.weight"].dtype == torch.float32


@pytest.mark.parametrize("keep", KEEP)
def test_an_optimiser_loads_what_is_kept(keep):
    parameter = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = torch.optim.AdamW([{"params": [parameter], "peak": 0.1}])
    groups = optimizer.state_dict()["param_groups"]
    saved = state()
    saved["optimizer"]["param_groups"] = groups
    optimizer.load_state_dict(slim(saved, keep)["optimizer"])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.isfinite(parameter).all()


def test_auto_keeps_the_most_that_fits(run, tmp_path):
    sizes = {}
    for keep in KEEP:
        export_run(run, tmp_path / keep, keep)
        sizes[keep] = sum(path.stat().st_size for path in (tmp_path / keep).glob("checkpoint.pt.part[0-9]*"))
    assert sizes["everything"] > sizes["half-moments"] > sizes["weights"] > sizes["half-weights"]
    for keep in KEEP:
        assert export_run(run, tmp_path / "auto", limit=sizes[keep]) == keep
    with pytest.raises(FilePartsError, match="expected at most .* as half-weights"):
        export_run(run, tmp_path / "auto", limit=sizes["half-weights"] - 1)


def test_a_codec_is_made_from_a_split_checkpoint(run, tmp_path):
    export_run(run, tmp_path / "out", part_bytes=5000)
    assert main(["codec", str(tmp_path / "out" / "checkpoint.pt.parts.json"), str(tmp_path / "codec")]) == 0
    weights = load_weights(tmp_path / "codec")["adapters.weight"]
    assert torch.equal(weights, state()["codec"]["adapters.weight"].to(torch.bfloat16))
    assert ZTokConfig.load(tmp_path / "codec") == ZTokConfig(base_model="tiny")
    write_codec(run / "checkpoint.pt", tmp_path / "codec")


def test_mistakes(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="keep: expected one of"):
        slim(state(), "nothing")
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "expected a checkpoint.pt in it" in capsys.readouterr().err
    assert main(["join", str(tmp_path / "nowhere.pt"), str(tmp_path / "run2")]) == 1
    assert "expected an existing file" in capsys.readouterr().err
