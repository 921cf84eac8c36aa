import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import train
from bench.gpu.files import PART_BYTES, split_file
from ztok_fast.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[3]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")


def run_script(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("OUT", None)
    command = ["bash", str(ROOT / "bench" / "gpu" / "train.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_dry_run_joins_trains_resumes_evaluates_and_exports(tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(["--dry", "--out", str(out)]) == 0
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert {"checkpoint.pt.sha256", "metrics.jsonl", "evaluation.json"} <= set(files)
    assert max(files.values()) <= PART_BYTES
    facts = json.loads((out / "evaluation.json").read_text())
    # The first run's two steps came through its exported parts; only the third was trained by the second run.
    assert (facts["first_step"], facts["step"]) == (2, 3)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert set(facts["evaluation"]) == {"base", "2", "4"}
    printed = capsys.readouterr().out
    assert "from step 2 of 3" in printed and "steps 2 to 3; checkpoint kept: everything" in printed
    assert "| budget | teacher-forced | free-running |" in printed


def test_no_time_left_is_an_error_before_training(tmp_path, capsys):
    assert train.main(["--dry", "--out", str(tmp_path), "--minutes", "2", "--started", "0"]) == 1
    assert "expected time left for training" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "NEEDED", ("torch", "no_such_package_here"))
    assert train.main(["--dry", "--out", str(tmp_path)]) == 2
    assert "packages not found: no_such_package_here; give their wheels as --wheels" in capsys.readouterr().err


def test_a_gguf_base_without_its_reader_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    sums = split_file(tmp_path / "base.gguf", tmp_path / "parts", 2)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(train.RunError, match="needs the package gguf; give its wheel's folder as --wheels"):
        train.load_parts(str(sums), "name", scratch)


@needs_bash
def test_the_script_uses_the_wheels_it_is_given(tmp_path):
    wanted = run_script("--help")
    assert wanted.returncode == 0 and "--base-parts" in wanted.stdout
    with zipfile.ZipFile(tmp_path / "hello-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("argparse.py", "raise SystemExit('a module from the wheel')")
    shadowed = run_script("--wheels", tmp_path, "--help")
    assert shadowed.returncode == 1 and "a module from the wheel" in shadowed.stderr


@needs_bash
@pytest.mark.parametrize(
    ("wheels", "message"),
    [([], "expected wheels in"), (["x-1-cp312-cp312-linux_x86_64.whl"], "expected pure-Python wheels")],
    ids=["none", "compiled"],
)
def test_the_script_refuses_wheels_that_it_cannot_use(tmp_path, wheels, message):
    for name in wheels:
        (tmp_path / name).write_bytes(b"")
    refused = run_script("--wheels", tmp_path, "--dry")
    assert refused.returncode == 2 and message in refused.stderr


@needs_bash
def test_the_script_wants_a_folder_for_its_results():
    refused = run_script("--dry")
    assert refused.returncode == 2 and "--out: expected a folder" in refused.stderr


def test_checkpoints_go_from_the_cpu_settings_to_the_gpu_settings_and_back():
    cpu, gpu = (TrainSettings.load(ROOT / "configs" / name) for name in ("smollm2.yaml", "smollm2_gpu.yaml"))
    assert cpu.codec_config() == gpu.codec_config()
    assert cpu.base == gpu.base
    for settings in (cpu, gpu):
        assert settings.exclude_sources == ["cnn_dailymail", "bbc-news"]
        assert settings.batch_tokens >= settings.chunk_tokens
    # Twice the text's own bits per token is room enough for a rate; the bound is measured, so it stands in no test.
    config = cpu.codec_config()
    assert config.bits_per_ztoken / min(config.budgets) > 2 * 6.0
