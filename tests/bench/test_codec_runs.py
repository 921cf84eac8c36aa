"""Whole runs of the codec against Hugging Face and PEFT: right and timed on tiny shapes; wrong answers are refused."""

import contextlib
import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import results, runner
from bench.codec import files, oracle, runs
from bench.registry import OPS, RUNS, select
from ztok_fast.codec import huggingface
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.ops.spec import Mismatch

CPU = torch.device("cpu")
MARKS = {"mm_gflops": {"float32": 100.0}, "copy_gbs": 20.0}
(_, COMPRESS), (_, COMPRESS_SLOTS) = select(["compress"], "tiny", "cpu")
(_, DECOMPRESS), (_, DECOMPRESS_SLOTS) = select(["decompress"], "tiny", "cpu")


def made(run, case):
    """Inputs and what the run gives for them."""
    inputs = run.make(case, torch.Generator().manual_seed(3))
    return inputs, run.run(case, inputs)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in RUNS for kind in (0, 1)])
def test_every_implementation_is_right_and_timed(name, kind):
    run, (_, case) = RUNS[name], select([name], "tiny", "cpu")[kind]
    entry = runner.measure(run, case, CPU, 0.01, MARKS)
    assert [own["name"] for own in entry["implementations"]] == ["ours", *(b.name for b in run.baselines)]
    for own in entry["implementations"]:
        assert (own["status"], own["checked"]) == ("ok", True), own["reason"]
        assert own["seconds"]["rounds"] >= runner.MIN_ROUNDS_WHOLE
    assert set(results.default_backend(entry)["with"]) == set(run.companions)


@pytest.mark.parametrize("wanted", [1, 2])
def test_an_implementation_gets_the_threads_that_it_is_faster_with(wanted):
    with runner.torch_threads(2):
        slow = lambda: time.sleep(0.02 * (torch.get_num_threads() != wanted))  # noqa: E731
        own = runner.Implementation("any", "baseline", calls=[slow])
        runner.choose_threads(own)
        assert own.as_dict()["threads"] == wanted and torch.get_num_threads() == 2
        with own.context():
            assert torch.get_num_threads() == wanted


@pytest.mark.parametrize("part", ["codes", "unit_lengths"])
def test_the_check_sees_one_wrong_code_or_unit(part):
    inputs, z = made(runs.COMPRESS, COMPRESS)
    runs.COMPRESS.check(COMPRESS, inputs, z)
    wrong = getattr(z, part).clone()
    wrong.view(-1)[-1] = (wrong.view(-1)[-1] + 1) % 8
    with pytest.raises(Mismatch, match="not the nearest" if part == "codes" else "units of other lengths"):
        runs.COMPRESS.check(COMPRESS, inputs, dataclasses.replace(z, **{part: wrong}))


WRONG_SLOTS = {
    "a code": lambda z: dataclasses.replace(z, codes=(z.codes - (z.codes > 0).int())),
    "a place": lambda z: dataclasses.replace(z, slot_offsets=z.slot_offsets + (z.slot_offsets >= 0).int()),
    "a slot": lambda z: dataclasses.replace(
        z, codes=torch.full_like(z.codes, -1), slot_offsets=torch.full_like(z.slot_offsets, -1)
    ),
    "a unit": lambda z: dataclasses.replace(z, unit_lengths=z.unit_lengths + 1),
}


@pytest.mark.parametrize("part", WRONG_SLOTS)
def test_the_check_sees_wrong_slots(part):
    inputs, z = made(runs.COMPRESS, COMPRESS_SLOTS)
    runs.COMPRESS.check(COMPRESS_SLOTS, inputs, z)
    with pytest.raises(Mismatch, match="slots|units do not fit"):
        runs.COMPRESS.check(COMPRESS_SLOTS, inputs, WRONG_SLOTS[part](z))


def test_slots_with_units_to_spare_must_close_the_loop():
    """At the ratio 1 every token can be named, so one that is neither named nor guessed is a mistake."""
    inputs, _ = made(runs.COMPRESS, COMPRESS_SLOTS)
    name, device, tokens = files.TINY_SLOTS, "cpu", inputs["tokens"]
    z = inputs["codec"].compress(inputs["texts"], 1.0)
    expected = oracle.expected_names(name, device, tokens, 1.0)
    oracle.check_slots(name, device, tokens, expected, runs.units_of(z, z.cu_ztokens), 1.0, z.precision)
    # One of the two names of every unit is gone.
    gone = {key: getattr(z, key).clone() for key in ("codes", "slot_offsets")}
    for value in gone.values():
        value[:, -1] = -1
        value[::2] = -1
    wrong = runs.units_of(dataclasses.replace(z, **gone), z.cu_ztokens)
    with pytest.raises(Mismatch, match="neither named nor the arg-max"):
        oracle.check_slots(name, device, tokens, expected, wrong, 1.0)


def test_the_check_sees_a_named_token_that_is_not_written():
    inputs, texts = made(runs.DECOMPRESS, DECOMPRESS_SLOTS)
    tokens = inputs["codec"].decompress_tokens(inputs["z"])
    runs.DECOMPRESS.check_baseline(DECOMPRESS_SLOTS, inputs, (tokens, texts))
    tokens[0][int(inputs["z"].slot_offsets[0, 0])] += 1
    with pytest.raises(Mismatch, match="those that slots name"):
        runs.DECOMPRESS.check_baseline(DECOMPRESS_SLOTS, inputs, (tokens, texts))


@pytest.mark.parametrize("part", ["a token", "a text", "the length"])
def test_the_check_sees_a_wrong_token_or_text(part):
    inputs, texts = made(runs.DECOMPRESS, DECOMPRESS)
    tokens = inputs["codec"].decompress_tokens(inputs["z"])
    runs.DECOMPRESS.check_baseline(DECOMPRESS, inputs, (tokens, texts))
    tokens, texts = [list(own) for own in tokens], list(texts)
    if part == "a token":
        tokens[1][-1] = (tokens[1][-1] + 1) % 256
        texts[1] = inputs["codec"].tokenizer.decode(tokens[1])
        message = "not the arg-max"
    elif part == "a text":
        texts[0] += "?"
        message = "texts: 1 of 3"
    else:
        tokens[2].pop()
        message = "tokens: expected"
    with pytest.raises(Mismatch, match=message):
        runs.DECOMPRESS.check_baseline(DECOMPRESS, inputs, (tokens, texts))


@pytest.mark.parametrize(
    ("first", "code", "right"), [(1e-7, 0, True), (1e-7, 1, True), (1e-7, 2, False), (0.1, 0, True), (0.1, 1, False)]
)
def test_of_two_codes_within_rounding_either_is_right(monkeypatch, first, code, right):
    books = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]]], dtype=torch.float64)
    monkeypatch.setattr(oracle, "_codec", lambda name, device: SimpleNamespace(model=SimpleNamespace(codebooks=books)))
    latents, length = torch.tensor([[first, 0.5]], dtype=torch.float64), torch.tensor([1])
    with contextlib.nullcontext() if right else pytest.raises(Mismatch, match="1 codes of level 0 are not the nearest"):
        oracle.check_codes("any", [(length, latents)], [(length, torch.tensor([[code]]))])


def bench(tmp_path, *arguments):
    argv = ["--set", "tiny", "--seconds", "0.01", "--json", str(tmp_path / "out.json"), *arguments]
    return command.run(command.parse(argv), argv)


def test_a_wrong_result_of_ours_gets_no_speed_and_fails_the_command(tmp_path, monkeypatch, capsys):
    right = ZTokCodec.decompress
    monkeypatch.setattr(ZTokCodec, "decompress", lambda self, z: [text[::-1] for text in right(self, z)])
    assert bench(tmp_path, "--ops", "decompress") == 1
    case, _ = results.load(tmp_path / "out.json")["cases"]
    found = {entry["name"]: entry for entry in case["implementations"]}
    assert found["ours"]["status"] == "wrong" and "seconds" not in found["ours"]
    assert found[runs.BATCHED]["status"] == "ok"
    assert "ours: wrong: Mismatch: texts" in capsys.readouterr().err


def test_a_codec_whose_base_is_absent_is_skipped_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "missing", lambda name: "no base here")
    assert bench(tmp_path, "--ops", "compress") == 0
    printed = capsys.readouterr().out
    assert f"{runs.COMPRESS.key(COMPRESS)}\nskipped: no base here" in printed and "0 cases in" in printed
    assert not (tmp_path / "out.json").exists()


def test_runs_are_measured_when_they_are_named_and_not_else():
    assert not set(OPS) & set(RUNS)
    assert {subject.name for subject, _ in select(None, "full", "cpu")} == set(OPS)
    assert {run.name for run, _ in select(list(RUNS), "default", "cuda")} == set(RUNS)


def test_documents_are_of_mixed_lengths_and_the_same_everywhere():
    cut = [files.documents(8, 200, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert cut[0] == cut[1] and len(set(cut[0])) == 8
    assert max(map(len, cut[0])) == len(cut[0][0]) == 200 and min(map(len, cut[0])) < 100
    with pytest.raises(ValueError, match="longest must be below"):
        files.documents(1, 10**6, torch.Generator())


def test_settings_that_the_baseline_does_not_have_are_refused(monkeypatch):
    other = dataclasses.replace(huggingface.ZTokConfig.load(files.folder(files.TINY)), emission="stop")
    monkeypatch.setattr(huggingface.ZTokConfig, "load", classmethod(lambda cls, folder: other))
    with pytest.raises(ValueError, match="emission must be 'fire' or 'slots', got 'stop'"):
        files.parts.__wrapped__(files.TINY, "compressor", False, "cpu")
