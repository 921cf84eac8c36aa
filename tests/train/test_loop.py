"""The training loop: all phases, resumed bit by bit, stopped by bad numbers, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.codec.tiny_codec import tiny_base
from tests.train.tiny_run import tiny_settings, write_corpus
from ztok_fast import ops, peft_lora
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.train.loop import CHECKPOINT, METRICS, Trainer
from ztok_fast.train.settings import SettingsError

CLOCK = "tokens_per_second"


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != CLOCK} for row in rows]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def assert_same(one, other, where="checkpoint"):
    """Equal to the last bit, tensors included."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of eight steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    Trainer(tiny_settings(folder), tiny_base()).run()
    return folder / "run"


def test_run_goes_through_all_phases(whole_run):
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["blend"] for row in rows] == [0, 0, 0.5, 1, 1, 1, 1, 1]
    assert [row["sampling"] > 0 for row in rows] == [False] * 4 + [True, False, True, False]
    terms = {"commitment", "codebook", "usage", "zspace"}
    assert all(terms & set(row) == (terms if row["blend"] else set()) for row in rows)
    assert all("density" in row for row in rows[::2]) and not any("density" in row for row in rows[1::2])
    assert all(row["length"] >= 0 and 1 < row["ratio"] < 8 and row["gradient_norm"] > 0 for row in rows)
    assert any("answer" in row for row in rows[2:])
    assert any(row.get("codes_replaced", 0) > 0 for row in rows)
    assert ["codes_replaced" in row for row in rows] == [False, False, False, True, False, True, False, True]
    assert all(len(row["codes_alive"]) == len(row["perplexity"]) == 2 for row in rows)
    assert set(rows[-1]["eval"]) == {"base", "2", "4"} and "eval" not in rows[0]


def test_codec_of_a_run_loads_on_its_base(whole_run):
    codec = ZTokCodec.from_pretrained(whole_run / "codec", base=tiny_base())
    text = ["the small text goes on"]
    assert codec.decompress(codec.compress(text, ratio=2, exact=True)) == text


@pytest.mark.parametrize("after", [1, 2, 5])
def test_interrupted_run_ends_with_the_same_bits(whole_run, tmp_path, monkeypatch, after):
    settings = tiny_settings(tmp_path)
    step = Trainer.train_step

    def interrupt(trainer):
        if trainer.step == after - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Trainer(settings, tiny_base()).run()
    assert checkpoint_of(tmp_path / "run")["step"] == after
    with (tmp_path / "run" / METRICS).open("a") as lines:  # rows that a killed run wrote after its checkpoint
        lines.write(json.dumps({"step": after + 1, "loss": 0.0}) + "\n" + '{"step": ')
    Trainer(settings, tiny_base()).run()
    assert rows_of(tmp_path / "run") == rows_of(whole_run)
    assert_same(checkpoint_of(tmp_path / "run"), checkpoint_of(whole_run))
    weights = Path("codec", "codec.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (whole_run / weights).read_bytes()


def test_checkpoint_holds_nothing_of_the_base(whole_run):
    state = checkpoint_of(whole_run)
    base = tiny_base()
    assert set(state) == {"step", "stream", "care", "codec", "optimizer", "config"}
    codec = ZTokCodec.from_pretrained(whole_run / "codec", base=base)
    assert set(state["codec"]) == set(codec.model.codec_state())
    trained = sum(t.numel() for t in state["codec"].values())
    moments = sum(t.numel() for s in state["optimizer"]["state"].values() for t in s.values() if t.dim())
    assert moments <= 2 * trained
    base_words = codec.model.adapted.embedding.weight
    assert not any(t.shape == base_words.shape for t in state["codec"].values())


def test_time_limit_stops_after_a_checkpoint(tmp_path):
    Trainer(tiny_settings(tmp_path, max_minutes=1e-9), tiny_base()).run()
    assert checkpoint_of(tmp_path / "run")["step"] == 1
    assert (tmp_path / "run" / "codec" / "config.json").is_file()


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_bad_numbers_stop_the_run_and_keep_the_checkpoint(tmp_path, place):
    settings = tiny_settings(tmp_path, checkpoint_every=1, steps=4)
    trainer = Trainer(settings, tiny_base())
    step = trainer.train_step
    kept = []

    def poisoned():
        if trainer.step == 1:
            kept.append((tmp_path / "run" / CHECKPOINT).read_bytes())
            if place == "loss":
                with torch.no_grad():
                    trainer.model.start_embedding.fill_(float("nan"))
            else:
                trainer.model.start_embedding.register_hook(lambda gradient: gradient * float("inf"))
        return step()

    trainer.train_step = poisoned
    message = "the loss is nan" if place == "loss" else "the norm of its gradient is (inf|nan)"
    with pytest.raises(FloatingPointError, match=f"step 2: {message}; lower learning_rate .*is from before"):
        trainer.run()
    assert [(tmp_path / "run" / CHECKPOINT).read_bytes()] == kept
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1]


def test_bad_numbers_without_a_checkpoint(tmp_path):
    trainer = Trainer(tiny_settings(tmp_path), tiny_base())
    with torch.no_grad():
        trainer.model.start_embedding.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet"):
        trainer.run()


def test_checkpoint_of_other_settings_is_refused(whole_run, tmp_path):
    settings = tiny_settings(tmp_path)
    settings.out = str(whole_run)
    settings.codec = settings.codec | {"latent_dim": 4}
    with pytest.raises(
        SettingsError, match="expected a checkpoint of the same codec settings.*got other .'latent_dim'"
    ):
        Trainer(settings, tiny_base())
    settings.codec = tiny_settings(tmp_path).codec
    with pytest.raises(SettingsError, match="got other .'base_fingerprint'"):
        Trainer(settings, tiny_base(seed=3))


def test_accumulated_batches_equal_one_larger_batch(tmp_path):
    """For a loss that is a mean over tokens, from batches of as many tokens each, with nothing drawn at random."""
    write_corpus(tmp_path / "train.jsonl", rows=12, words=40)
    write_corpus(tmp_path / "dev.jsonl", rows=1)
    results = []
    off = dict.fromkeys(("commitment", "codebook", "length", "usage", "density", "zspace", "answer"), 0)
    for accumulation, batch_tokens in ((1, 160), (2, 80)):
        settings = tiny_settings(
            tmp_path,
            out=str(tmp_path / f"run-{accumulation}"),
            accumulation=accumulation,
            batch_tokens=batch_tokens,
            loss=off,
            noise=0,
            noise_end=0,
            sampling=0,
            level_dropout=0,
            surprisal_steps=0,
            gradient_clip=1e9,
            precision="float32",
            codec=tiny_settings(tmp_path).codec | {"budgets": [4.0]},
        )
        trainer = Trainer(settings, tiny_base())
        # Rows of at least 80 tokens give sections of exactly 40 and rests, which are left out.
        trainer.stream.min_tokens = 40
        row = trainer.train_step()
        first_moments = [
            trainer.optimizer.state[p]["exp_avg"]
            for p in trainer.model.trainable_parameters().values()
            if p in trainer.optimizer.state
        ]
        results.append((row, first_moments))
    (one, moments), (two, accumulated) = results
    assert two["reconstruction"] == pytest.approx(one["reconstruction"], rel=1e-5)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    assert len(moments) == len(accumulated) > 10
    for a, b in zip(moments, accumulated):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_precision_changes_the_products_and_not_the_weights(tmp_path, monkeypatch):
    """One process trains in both: the losses agree within bfloat16's rounding, weights and moments stay float32."""
    losses, dtypes = {}, {}
    for precision in ("float32", "bfloat16"):
        settings = tiny_settings(tmp_path, out=str(tmp_path / precision), precision=precision)
        trainer = Trainer(settings, tiny_base())
        seen = dtypes[precision] = set()
        linear = ops.lora_linear

        def spy(x, weight, *args, seen=seen, linear=linear):
            y = linear(x, weight, *args)
            seen.add(y.dtype)
            return y

        with monkeypatch.context() as patch:
            patch.setattr(peft_lora, "lora_linear", spy)
            losses[precision] = [trainer.train_step()["reconstruction"] for _ in range(4)]
        state = [*trainer.model.codec_state().values()]
        state += [t for s in trainer.optimizer.state.values() for t in s.values()]
        assert {t.dtype for t in state if t.is_floating_point()} == {torch.float32}
    assert dtypes == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from tests.codec.tiny_codec import tiny_base
from tests.train.tiny_run import tiny_settings
from ztok_fast.train.loop import Trainer

settings = tiny_settings(Path(sys.argv[1]), accumulation=2, dead_code_every=1, max_minutes=float(sys.argv[2]))
trainer = Trainer(settings, tiny_base())
assert trainer.accelerator.num_processes == 2
trainer.run()
state = {n: p.detach().clone() for n, p in trainer.model.codec_state().items()}
torch.save({"state": state, "usage": trainer.method.care.usage, "first": trainer.stream.buffer[0].tokens},
           Path(sys.argv[1]) / f"rank-{trainer.accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    tiny_settings(tmp_path)
    (tmp_path / "train_two.py").write_text(TWO_PROCESSES)
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "train_two.py"),
        str(tmp_path),
    ]  # and the minutes after which all stop
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for minutes, steps in (("1e-9", 1), ("0", 8)):  # stops after a step; goes on from there
        result = subprocess.run([*command, minutes], cwd=root, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        one, two = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
        for name in one["state"]:
            assert torch.equal(one["state"][name], two["state"][name]), name
        assert torch.equal(one["usage"], two["usage"])
        assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, steps + 1))
    assert (tmp_path / "run" / "stream-1.pt").is_file()
    assert any(row.get("codes_replaced", 0) for row in rows_of(tmp_path / "run"))
