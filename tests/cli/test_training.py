"""``ztok train`` and ``ztok pretrain``: short runs, interrupted and resumed, and settings that are wrong."""

import json
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.conftest import TEXT, assert_mistake
from ztok_fast.cli.main import main
from ztok_fast.train.loop import Trainer


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"Number {i}. {TEXT}" * 3}) + "\n" for i in range(6)))
    return path


@pytest.fixture
def train_config(tmp_path, rows, base_folder):
    def write(out: str, **changes):
        settings = {
            "base": str(base_folder),
            "out": str(tmp_path / out),
            "train_files": [str(rows)],
            "dev_files": [str(rows)],
            "codec": {
                "segment_length": 16,
                "num_codebooks": 2,
                "codebook_size": 16,
                "latent_dim": 8,
                "max_unit_length": 8,
                "lora_rank": 2,
            },
            "steps": 3,
            "batch_tokens": 64,
            "section_tokens": 32,
            "continuous_steps": 1,
            "blend_steps": 1,
            "kmeans_latents": 64,
            "warmup_steps": 1,
            "surprisal_steps": 1,
            "eval_every": 3,
            "eval_documents": 1,
            "eval_tokens": 16,
            "checkpoint_every": 2,
        }
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(settings | changes))
        return path

    return write


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_stops_resumes_and_ends_where_one_run_ends(ztok, train_config, tmp_path, base_folder):
    whole = ztok("train", train_config("whole"))
    assert whole.status == 0 and f"{tmp_path / 'whole' / 'codec'}: codec after step 3 of 3" in whole.out
    assert "FutureWarning" not in whole.err

    config = train_config("parts")
    first = ztok("train", config, "--max-minutes", "1e-9")
    assert first.status == 0 and "codec after step 1 of 3" in first.out
    second = ztok("train", config)
    assert second.status == 0 and "codec after step 3 of 3" in second.out

    names = ("step", "total", "reconstruction", "ratio")
    assert [[row[n] for n in names] for row in metrics(tmp_path / "parts")] == [
        [row[n] for n in names] for row in metrics(tmp_path / "whole")
    ]
    one, other = (load_file(tmp_path / name / "codec" / "codec.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    arguments = ("--codec", tmp_path / "parts" / "codec", "--base", base_folder)
    assert ztok("compress", tmp_path / "a.txt", "--exact", *arguments).status == 0
    assert ztok("decompress", tmp_path / "a.txt.ztok", *arguments).bytes == TEXT.encode()


def test_ctrl_c_ends_the_step_then_stops_with_a_checkpoint(ztok, train_config, tmp_path, monkeypatch):
    step = Trainer.train_step

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    result = ztok("train", train_config("run"))
    assert result.status == 130
    assert result.err.splitlines()[-1] == "ztok: stopped after step 2; the same command goes on from there"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": "1e-3"}, ["learning_rate", "expected float", "decimal point"]),
        ({"train_files": "rows.jsonl"}, ["train_files", "list[str]"]),
        ({"dev_files": [1]}, ["dev_files"]),
        ({"codec": ["L", 4]}, ["codec", "dict"]),
        ({"codec": {"num_codebook": 4}}, ["num_codebook"]),
        ({"codec": {"budgets": 4}}, ["budgets", "list"]),
        ({"codec": {"compressor_layers": "two"}}, ["compressor_layers"]),
        ({"codec": {"lora_alpha": "big"}}, ["lora_alpha"]),
        ({"codec": {"copy_path": "yes"}}, ["copy_path", "bool"]),
        ({"steps": 0}, ["steps"]),
        ({"speed": 1}, ["speed"]),
        ({"train_files": ["none.jsonl"]}, ["none.jsonl"]),
        ({"base": "./no-such-base"}, ["no-such-base", "was not found"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(ztok, train_config, changes, words):
    assert_mistake(ztok("train", train_config("run", **changes)), *words)


def test_wrong_files(ztok, tmp_path, train_config):
    for command in ("train", "pretrain"):
        (tmp_path / "a.yaml").write_text("out: [unclosed\n")
        assert main([command, str(tmp_path / "a.yaml")]) == 2
        (tmp_path / "a.yaml").write_text("- a\n- list\n")
        assert_mistake(ztok(command, tmp_path / "a.yaml"), "expected a mapping")
        (tmp_path / "a.yaml").write_text("out: here\n")
        assert_mistake(ztok(command, tmp_path / "a.yaml"), "train_files")
        assert_mistake(ztok(command, tmp_path / "none.yaml"), "no such file")
    assert_mistake(ztok("train", train_config("run"), "--max-minutes", "0"), "--max-minutes")


def test_pretrain_makes_a_base_model_and_resumes(ztok, rows, tmp_path):
    settings = {
        "out": str(tmp_path / "base"),
        "train_files": [str(rows)],
        "dev_files": [str(rows)],
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "context": 16,
        "batch_size": 2,
        "checkpoint_every": 1,
        "warmup_steps": 1,
        "eval_every": 2,
    }
    for steps in (2, 3):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"steps": steps}))
        result = ztok("pretrain", tmp_path / "config.yaml")
        assert result.status == 0 and result.out == f"{tmp_path / 'base' / 'model'}: base model after step {steps}\n"
    assert [row["step"] for row in metrics(tmp_path / "base")] == [1, 2, 3]
    assert metrics(tmp_path / "base")[1]["dev_bits_per_token"] > 0
    assert (tmp_path / "base" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "int"]),
        ({"num_heads": 3}, ["num_heads"]),
        ({"train_files": []}, ["train_files"]),
    ],
    ids=["type", "heads", "files"],
)
def test_wrong_pretrain_settings(ztok, tmp_path, rows, changes, words):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "train_files": [str(rows)]} | changes))
    assert_mistake(ztok("pretrain", path), *words)
