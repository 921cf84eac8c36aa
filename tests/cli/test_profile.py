"""``ztok bench``: its figures fit one another, its baselines do the same work, its mistakes are plain."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.cli.conftest import TEXT, assert_mistake, load
from ztok_fast.cli import common, profile_machine, profile_ways
from ztok_fast.cli.common import UsageError
from ztok_fast.cli.profile_machine import Marks, Weights
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.profiling import HEAD, MODEL, Profile, Span

SECONDS = ("--seconds", 0.01)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("Another one.")
    return [folder / "a.txt", folder / "b.txt"]


@pytest.mark.parametrize("command", ["compress", "decompress", "generate"])
@pytest.mark.parametrize("kind", ["codec_folder", "slots_folder"])
def test_figures_fit_one_another(ztok, texts, tmp_path, request, kind, command):
    arguments = ("--engine", "float", "--max-new-ztokens", 3, *SECONDS)
    files = ("--json", tmp_path / "out.json", "--trace", tmp_path / "trace.json")
    codec = ("--codec", request.getfixturevalue(kind))
    printed = ztok("bench", command, *texts, *arguments, *files, *codec)
    assert printed.status == 0 and printed.err == ""
    found = json.loads((tmp_path / "out.json").read_text())
    ways = found["ways"]
    assert [way["name"] for way in ways] == [
        "ztok_fast",
        *(profile_ways.__dict__[n] for n in ("ONE_BY_ONE", "BATCHED", "MERGED")),
    ]
    assert found["documents"] == 2 and found["engine"] == "float"
    for way in ways:
        assert way["name"] in printed.out
        assert way["tokens_per_second"] == pytest.approx(found["amount"] / way["seconds"])
    # The same arithmetic in another order: float32 without this package's ops.
    assert all(way["same"] > 0.9 for way in ways[1:])
    assert sum(stage["seconds"] for stage in found["stages"]) == pytest.approx(found["seconds"])
    calls = {stage["name"]: stage["calls"] for stage in found["stages"]}
    compress = ("halting", "quantise") if kind == "codec_folder" else (HEAD,)
    used = {"compress": ("tokenise", MODEL, *compress), "decompress": ("tokenise", MODEL, HEAD)}
    for name in used.get(command, (MODEL, HEAD)):
        assert calls[name] > 0, name
    assert 0 < found["host_share"] < 1 and 0 < found["roofline"]
    assert found["peak_memory_bytes"] > 1 << 20
    assert (found["batch_occupancy"] is None) == (command == "compress")
    if command == "decompress":  # by the float path, step by step
        assert found["passes_per_segment"] * found["segments"] == found["amount"] and "for a segment" in printed.out
    else:
        assert found["passes_per_segment"] is None and "for a segment" not in printed.out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_engine_is_profiled_too(tiny, tmp_path, codec_folder):
    # Without corrections: tokens that are told would be read many in a pass.
    (tmp_path / "a.txt").write_text(TEXT)
    assert tiny("compress", tmp_path / "a.txt", "-o", tmp_path / "a.ztok").status == 0
    codec_batch = load(codec_folder, tmp_path / "a.ztok")
    options = ("--no-baselines", "--json", tmp_path / "o.json", *SECONDS)
    result = tiny("bench", "decompress", tmp_path / "a.ztok", *options)
    found = json.loads((tmp_path / "o.json").read_text())
    assert result.status == 0 and [way["name"] for way in found["ways"]] == ["ztok_fast"]
    assert found["amount"] == codec_batch.tokens and found["engine"] == codec_batch.precision
    rows = {stage["name"]: stage["rows"] for stage in found["stages"]}
    # Each token but a segment's first is read once, each Z-token once, and each segment has a start row.
    assert found["segments"] == len(codec_batch.cu_segments) - 1 > 2  # so many are written step by step
    assert found["passes_per_segment"] == codec_batch.tokens / found["segments"]
    assert rows[MODEL] == codec_batch.tokens + codec_batch.ztokens and rows[HEAD] == codec_batch.tokens


def test_the_first_tokens_of_the_files_are_used(texts, codec_folder):
    codec = ZTokCodec.from_pretrained(codec_folder)
    whole = codec.tokenize([TEXT])[0]
    cut = profile_ways.read_texts(codec, [str(path) for path in texts], 5)
    assert len(cut) == 1 and TEXT.startswith(cut[0]) and len(codec.tokenize(cut)[0]) == 5
    more = profile_ways.read_texts(codec, [str(path) for path in texts], len(whole) + 2)
    assert len(more) == 2 and len(codec.tokenize(more)[1]) == 2


def test_least_time_is_that_of_products_or_of_reading_the_weights():
    weights = Weights(layers=[100, 50], head=200, bytes_each=1)
    marks = Marks(products=1000.0, products_by="", read=100.0, read_by="", read_bytes=0)
    spans = [
        Span(MODEL, 0, 1, 1, rows=1),
        Span(MODEL, 0, 1, 1, rows=20, layers=1),
        Span(HEAD, 0, 1, 1),
        Span(HEAD, 0, 1, 1, 30),
    ]
    found = profile_machine.least_seconds(Profile(spans), weights, marks)
    assert found == {MODEL: 150 / 100 + 20 * 100 / 1000, HEAD: 30 * 200 / 1000}


def test_weights_are_those_of_the_linear_layers(codec_folder):
    codec = ZTokCodec.from_pretrained(codec_folder)
    # query and out 32 x 32, key and value 32 x 16, three of 32 x 64
    own = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    weights = Weights.of(codec, "int8")
    assert weights.layers == [own, own] and weights.head == 32 * len(codec.tokenizer) and weights.bytes_each == 1
    assert weights.of_pass(1) == own and Weights.of(codec, "float32").bytes_each == 4


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_calibration_measures_both(precision):
    marks = profile_machine.calibrate(precision, 1 << 16, seconds=0.01)
    assert marks.products > 1e6 and marks.read > 1e6 and marks.products_by and marks.read_by
    faster = Marks(2 * marks.products, "x", marks.read / 2, "y", marks.read_bytes)
    best = marks.best(faster)
    assert (best.products_by, best.read_by) == ("x", marks.read_by)


def test_agreement_counts_equal_places():
    ours = [torch.tensor([[1, 2], [3, 4]]), [5, 6]]
    assert profile_ways.agreement(ours, [torch.tensor([[1, 2], [3, 9]]), [5, 6]]) == 5 / 6
    assert profile_ways.agreement(ours, [torch.tensor([[1, 2]]), [5, 6]]) == 2 / 6
    assert profile_ways.agreement(ours, []) is None


def test_what_baselines_cannot_do_is_said(tiny, compressed, codec_folder, monkeypatch):
    from ztok_fast.codec import huggingface
    from ztok_fast.codec.errors import CodecError

    def refuse(*args):
        raise CodecError("codec tiny: emission must be 'fire', got 'stop'")

    monkeypatch.setattr(huggingface, "load", refuse)
    result = tiny("bench", "decompress", compressed, *SECONDS)
    assert result.status == 0
    assert "Hugging Face + PEFT: left out, codec tiny: emission must be 'fire'" in result.out
    assert "llama.cpp: left out, the base model is not SmolLM2" in result.out


def test_llama_cpp_reads_and_writes_as_many_tokens(codec_folder, compressed, monkeypatch):
    codec = ZTokCodec.from_pretrained(codec_folder)
    z = load(codec_folder, compressed)
    work = profile_ways.Work("decompress", codec, z.tokens, "tokens", 4.0, 1, z=z)
    assert profile_ways.llama_cpp(work, None)[1] == ["llama.cpp: left out, the base model is not SmolLM2"]
    codec.base.name = "SmolLM2-135M"
    assert "is not installed" in profile_ways.llama_cpp(work, None)[1][0]
    seen = []

    class Llama:
        def __init__(self, **settings):
            if settings["model_path"] != "base.gguf":
                raise ValueError("Failed to load model")

        def reset(self):
            seen.append([])

        def eval(self, tokens):
            seen[-1] += tokens

        def token_bos(self):
            return 1

        def sample(self, temp):
            return 7

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=SimpleNamespace()))
    assert "--gguf" in profile_ways.llama_cpp(work, None)[1][0]
    with pytest.raises(UsageError, match="other.gguf: llama.cpp cannot load it: Failed"):
        profile_ways.llama_cpp(work, "other.gguf")
    (way,), notes = profile_ways.llama_cpp(work, "base.gguf")
    way.run(work)
    assert not notes and [len(own) for own in seen] == z.cu_text.diff().tolist()
    seen.clear()
    way.run(profile_ways.Work("compress", codec, 0, "tokens", 4.0, 1, [TEXT]))
    assert [token for own in seen for token in own] == list(codec.tokenize([TEXT])[0])


def test_plot_is_drawn(tiny, texts, tmp_path):
    pytest.importorskip("matplotlib")
    tiny("bench", "compress", texts[0], "--no-baselines", "--plot", tmp_path / "out.png", *SECONDS)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tiny, texts, compressed, tmp_path, monkeypatch):
    text, empty = texts[0], tmp_path / "empty.txt"
    empty.write_text("")
    assert_mistake(tiny("bench", "compress", tmp_path / "none.txt"), "no such file")
    assert_mistake(tiny("bench", "compress", empty), "at least one token")
    assert_mistake(tiny("bench", "compress", compressed), "expected a text to compress")
    assert_mistake(tiny("bench", "decompress", compressed, text), "got both")
    assert_mistake(tiny("bench", "compress", text, "--ratio", 0.5), "ratio")
    assert_mistake(tiny("bench", "compress", text, "--seconds", 0), "--seconds", "above 0")
    assert_mistake(tiny("bench", "compress", text, "--tokens", 0), "--tokens")
    assert_mistake(tiny("bench", "compress", "-", "-"), "at most once")
    assert_mistake(tiny("bench", "compress", text, "--device", "cuda"), "expected cpu")
    assert_mistake(tiny("bench", "compress", text, "--json", text), "overwritten")
    assert_mistake(tiny("bench", "compress", text, "--trace", tmp_path / "x.txt"), "ends in .json")
    same = tmp_path / "same.json"
    assert_mistake(tiny("bench", "compress", text, "--trace", same, "--json", same), "another file")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert_mistake(tiny("bench", "compress", text, "--plot", tmp_path / "x.png"), "ztok-fast[bench]")
