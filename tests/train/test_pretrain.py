"""Pretraining of a small base model: resumable bit by bit, and an ordinary model folder in the end."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_run import write_corpus
from ztok_fast.train import pretrain as module
from ztok_fast.train.pretrain import (
    PretrainConfig,
    blocks_of_step,
    build_model,
    build_optimizers,
    next_token_loss,
    pretrain,
    schedule,
    token_stream,
)


def tiny_pretraining(folder, **changed) -> PretrainConfig:
    data = folder / "train.jsonl"
    if not data.is_file():
        write_corpus(data, rows=20)
        write_corpus(folder / "dev.jsonl", rows=6, seed=1)
    values = {
        "out": str(folder / "run"),
        "train_files": [str(data)],
        "dev_files": [str(folder / "dev.jsonl")],
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "context": 16,
        "batch_size": 4,
        "steps": 6,
        "warmup_steps": 2,
        "checkpoint_every": 2,
        "eval_every": 3,
    }
    return PretrainConfig(**(values | changed))


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(tiny_pretraining(folder))
    return folder


def test_metrics_and_model(whole_run):
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert ["dev_bits_per_token" in row for row in rows] == [False, False, True, False, False, True]
    assert rows[-1]["dev_bits_per_token"] < rows[2]["dev_bits_per_token"] < np.log2(300)
    model = AutoModelForCausalLM.from_pretrained(whole_run / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "run" / "model")
    text = "the small text: 東京\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    state = torch.load(whole_run / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].to(torch.bfloat16))


@pytest.mark.parametrize("stop", [3, 5])
def test_interrupted_run_ends_with_the_same_bits(whole_run, tmp_path, monkeypatch, stop):
    step_loss, calls = module.next_token_loss, []

    def interrupted(model, blocks, dtype=None):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == stop + 1:
            raise KeyboardInterrupt
        return step_loss(model, blocks, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(module, "next_token_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny_pretraining(tmp_path))
    assert len(rows_of(tmp_path)) == stop
    pretrain(tiny_pretraining(tmp_path))
    assert rows_of(tmp_path) == rows_of(whole_run)
    weights = "run/model/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole_run / weights).read_bytes()


def test_checkpoint_of_another_model_is_refused(whole_run):
    with pytest.raises(ValueError, match="expected a checkpoint of the same model, got another .'intermediate_size'"):
        pretrain(tiny_pretraining(whole_run, intermediate_size=32))


def test_every_block_is_seen_once_an_epoch(tmp_path):
    config = tiny_pretraining(tmp_path, context=4, batch_size=3)
    stream = np.arange(25, dtype=np.uint16)  # six blocks and the token after the last
    blocks = torch.cat([blocks_of_step(stream, step, config) for step in range(4)])
    assert blocks.shape == (12, 5) and (blocks.diff() == 1).all()
    first, second = blocks[:6, 0].tolist(), blocks[6:, 0].tolist()
    assert sorted(first) == sorted(second) == [0, 4, 8, 12, 16, 20] and first != second


def test_schedule_rises_stays_and_falls(tmp_path):
    config = tiny_pretraining(tmp_path, steps=100, warmup_steps=10, decay_steps=20)
    shares = [schedule(step, config) for step in range(101)]
    assert shares[0] == 0.1 and set(shares[9:81]) == {1.0} and shares[90] == pytest.approx(0.5) and shares[100] == 0
    prolonged = tiny_pretraining(tmp_path, steps=200, warmup_steps=10, decay_steps=20)
    assert [schedule(step, prolonged) for step in range(81)] == shares[:81]


def test_every_matrix_is_trained_by_one_optimizer(tmp_path, whole_run):
    config = tiny_pretraining(tmp_path, learning_rate=0.5, adamw_learning_rate=0.25)
    model = build_model(config, AutoTokenizer.from_pretrained(whole_run / "run" / "model"))
    muon, adamw = build_optimizers(model, config)
    held = [p for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert {g["peak"] for g in muon.param_groups} == {0.5} and {g["peak"] for g in adamw.param_groups} == {0.25}


def test_bfloat16_gives_the_loss_of_float32_within_rounding(tmp_path, whole_run):
    model = AutoModelForCausalLM.from_pretrained(whole_run / "run" / "model", dtype=torch.float32)
    blocks = torch.randint(0, 50, (2, 9))
    full, half = next_token_loss(model, blocks), next_token_loss(model, blocks, torch.bfloat16)
    assert full.dtype == half.dtype == torch.float32 and full != half
    torch.testing.assert_close(half, full, rtol=2e-2, atol=0)


def test_token_stream_ends_each_text_and_is_kept(whole_run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "run" / "model")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "source": "a"}\n{"text": "two", "source": "b"}\n')
    stream = token_stream([path], [], tokenizer, tmp_path / "tokens.npy")
    assert tokenizer.decode(stream) == "one<|endoftext|>two<|endoftext|>" and stream.dtype == np.uint16
    path.write_text("")
    assert token_stream([path], [], tokenizer, tmp_path / "tokens.npy").tolist() == stream.tolist()
    with pytest.raises(ValueError, match="expected at least one text outside the excluded sources"):
        token_stream([path], [], tokenizer, tmp_path / "other.npy")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected a positive number"),
        ({"hidden_size": 15}, "hidden_size divisible by num_heads"),
        ({"train_files": []}, "train_files: expected at least one file"),
        ({"precision": "half"}, "precision: expected one of auto, bfloat16, float32, got 'half'"),
        ({"learning_rate": "1e-3"}, "learning_rate: expected float"),
    ],
)
def test_bad_settings_are_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        pretrain(tiny_pretraining(tmp_path, **changed))


def test_text_shorter_than_a_block(tmp_path):
    with pytest.raises(ValueError, match="training text: expected more than 4096 tokens"):
        pretrain(tiny_pretraining(tmp_path, context=4096))
    (tmp_path / "dev.jsonl").write_text('{"text": "short"}\n')
    (tmp_path / "run" / "tokens-dev.npy").unlink()
    with pytest.raises(ValueError, match="dev text: expected more than 16 tokens"):
        pretrain(tiny_pretraining(tmp_path, eval_every=1))
