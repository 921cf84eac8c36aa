"""bench/gpu/train.sh: a dry run, one that resumes it, and what is refused before anything runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ztok_fast.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[3]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")


def run_script(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("OUT", None)
    command = ["bash", str(ROOT / "bench" / "gpu" / "train.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@needs_bash
@pytest.mark.slow
def test_the_dry_run_trains_evaluates_splits_its_checkpoint_and_resumes_from_the_parts(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    ran = run_script("--dry", "--drop-moments", "--out", first, "--part-bytes", 100_000)
    assert ran.returncode == 0, ran.stderr
    parts = sorted(first.glob("checkpoint.pt.part*"))
    assert len(parts) > 1 and max(part.stat().st_size for part in parts) <= 100_000
    assert not (first / "checkpoint.pt").exists()
    ran = run_script("--dry", "--out", second, "--checkpoint", first / "checkpoint.pt.sha256")
    assert ran.returncode == 0, ran.stderr
    rows = (second / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert json.loads((second / "evaluation.json").read_text())


@needs_bash
@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_a_part_that_is_not_as_it_was_is_refused(tmp_path, harm):
    parts = [tmp_path / f"base-none-any.whl.part00{i}" for i in range(2)]
    lines = []
    for part in parts:
        part.write_bytes(b"as it was")
        lines.append(f"{hashlib.sha256(b'as it was').hexdigest()}  {part.name}\n")
    sums = tmp_path / "base-none-any.whl.sha256"
    sums.write_text("".join(lines))
    parts[1].write_bytes(b"otherwise") if harm == "altered" else parts[1].unlink()
    refused = run_script("--dry", "--out", tmp_path / "out", "--base-parts", sums)
    assert refused.returncode != 0 and "base-none-any.whl.part001: FAILED" in refused.stderr


@needs_bash
def test_what_the_script_refuses(tmp_path):
    (tmp_path / "x-1-cp312-cp312-linux_x86_64.whl").write_bytes(b"")
    for arguments, message in (
        (["--dry"], "--out: expected a folder"),
        (["--wet"], "unknown option --wet"),
        (["--dry", "--out", tmp_path / "out", "--wheels", tmp_path], "expected pure-Python wheels"),
    ):
        refused = run_script(*arguments)
        assert refused.returncode == 2 and message in refused.stderr


def test_checkpoints_go_from_the_cpu_settings_to_the_gpu_settings_and_back():
    cpu, gpu = (TrainSettings.load(ROOT / "configs" / name) for name in ("smollm2.yaml", "smollm2_gpu.yaml"))
    assert (cpu.codec_config(), cpu.base) == (gpu.codec_config(), gpu.base)
    for settings in (cpu, gpu):
        assert settings.exclude_sources == ["cnn_dailymail", "bbc-news"]
        assert settings.batch_tokens >= settings.section_tokens
