import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import train
from ztok_fast.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[3]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")


def run_script(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("OUT", None)
    command = ["bash", str(ROOT / "bench" / "gpu" / "train.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_dry_run_trains_resumes_evaluates_and_keeps_its_checkpoint(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(["--dry", "--out", str(first)]) == 0
    assert train.main(["--dry", "--drop-moments", "--resume", str(first), "--out", str(second)]) == 0
    assert {"checkpoint.pt", "metrics.jsonl", "evaluation.json"} == {path.name for path in second.iterdir()}
    facts = json.loads((second / "evaluation.json").read_text())
    assert (facts["first_step"], facts["step"]) == (2, 3)
    assert [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert set(facts["evaluation"]) == {"base", "2", "4"}
    printed = capsys.readouterr().out
    assert "from step 2 of 3" in printed and "| budget | teacher-forced | free-running |" in printed
    sizes = [(folder / "checkpoint.pt").stat().st_size for folder in (first, second)]
    assert sizes[1] < sizes[0]


@needs_bash
@pytest.mark.slow
def test_the_script_splits_its_checkpoint_and_resumes_from_the_parts(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ran = run_script("--dry", "--out", first, "--part-bytes", 10_000)
    assert ran.returncode == 0, ran.stderr
    parts = sorted(first.glob("checkpoint.pt.part*"))
    assert len(parts) > 1 and max(part.stat().st_size for part in parts) <= 10_000
    assert not (first / "checkpoint.pt").exists()
    ran = run_script("--dry", "--out", second, "--checkpoint", first / "checkpoint.pt.sha256")
    assert ran.returncode == 0 and "from step 2 of 3" in ran.stdout, ran.stderr


@needs_bash
@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_a_part_that_is_not_as_it_was_is_refused(tmp_path, harm):
    (tmp_path / "metrics.jsonl").write_text("")
    parts = [tmp_path / f"checkpoint.pt.part00{i}" for i in range(2)]
    lines = []
    for part in parts:
        part.write_bytes(b"as it was")
        lines.append(f"{hashlib.sha256(b'as it was').hexdigest()}  {part.name}\n")
    (tmp_path / "checkpoint.pt.sha256").write_text("".join(lines))
    parts[1].write_bytes(b"otherwise") if harm == "altered" else parts[1].unlink()
    refused = run_script("--dry", "--out", tmp_path / "out", "--checkpoint", tmp_path / "checkpoint.pt.sha256")
    assert refused.returncode != 0 and "checkpoint.pt.part001: FAILED" in refused.stderr


def test_no_time_left_is_an_error_before_training(tmp_path, capsys):
    assert train.main(["--dry", "--out", str(tmp_path), "--minutes", "2", "--started", "0"]) == 1
    assert "expected time left for training" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "NEEDED", ("torch", "no_such_package_here"))
    assert train.main(["--dry", "--out", str(tmp_path)]) == 2
    assert "packages not found: no_such_package_here; give their wheels as --wheels" in capsys.readouterr().err


def test_a_gguf_base_without_its_reader_is_an_error(monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(train.RunError, match="needs the package gguf; give its wheel's folder as --wheels"):
        train.load_named("base.gguf", "name")


@needs_bash
def test_the_script_uses_the_wheels_it_is_given(tmp_path):
    wanted = run_script("--help")
    assert wanted.returncode == 0 and "--base-parts" in wanted.stdout
    with zipfile.ZipFile(tmp_path / "hello-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("argparse.py", "raise SystemExit('a module from the wheel')")
    shadowed = run_script("--wheels", tmp_path, "--dry", "--out", tmp_path / "out")
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
    refused = run_script("--wheels", tmp_path, "--dry", "--out", tmp_path / "out")
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
        assert settings.batch_tokens >= settings.section_tokens
    # Twice the text's own bits per token is room enough for a rate; the bound is measured, so it stands in no test.
    config = cpu.codec_config()
    assert config.bits_per_ztoken / min(config.budgets) > 2 * 6.0
