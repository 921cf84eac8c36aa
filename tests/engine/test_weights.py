"""Packed weights: the oracle's quantisation in the places that the layout names; the cache and its damages."""

import logging
import os

import numpy as np
import pytest
import torch

from tests.engine.models import FAMILIES, oracle_of, random_model
from tests.engine.oracle import quantise
from ztok_fast.engine import store
from ztok_fast.engine.architecture import read
from ztok_fast.engine.weights import fingerprint, pack

D, H, KV, WIDTH, INNER, V = 32, 4, 2, 16, 48, 50


def floats(packed, offset, count):
    assert offset % 64 == 0
    return packed.blob[offset : offset + 4 * count].view(torch.float32).numpy()


def linear(packed, places, channels, depth):
    """(integers, scales) or (weights,), and the bias, of a layer in the block, without the padding."""
    panels, scales, bias = places
    padded, count = -(-channels // 16) * 16, -(-channels // 16)
    bias = None if bias == -1 else floats(packed, bias, padded)
    if packed.precision == "float32":
        assert scales == -1
        weights = floats(packed, panels, padded * depth).reshape(count, depth, 16).transpose(0, 2, 1)
        weights = weights.reshape(padded, depth)
        assert not weights[channels:].any()
        return (weights[:channels],), bias
    deep = -(-depth // 64) * 64
    q = packed.blob[panels : panels + padded * deep].numpy().reshape(count, deep // 4, 16, 4)
    q = q.transpose(0, 2, 1, 3).reshape(padded, deep).astype(np.int64) - 128
    scales = floats(packed, scales, padded)
    assert not q[channels:].any() and not q[:, depth:].any() and not scales[channels:].any()
    return (q[:channels, :depth], scales[:channels]), bias


def same(found, weight, precision):
    for got, expected in zip(found, quantise(weight) if precision == "int8" else (weight,), strict=True):
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_where_the_layout_says(family, precision):
    model = random_model(family, seed=1, tie_word_embeddings=family == "llama")
    ours = oracle_of(model, precision)
    packed = pack(read(model), precision, cache=False)
    layout = packed.layout.tolist()
    assert packed.layout.dtype == torch.int64 and len(layout) == 32 + 2 * 16 and packed.blob.data_ptr() % 64 == 0
    assert layout[:11] == [1, 2, D, H, KV, WIDTH, INNER, V, 1, int(precision == "float32"), int(family == "qwen3")]
    eps, scale = (np.array(layout[i], np.int32).view(np.float32) for i in (11, 16))
    assert eps == np.float32(1e-6) and scale == np.float32(0.25)
    assert np.array_equal(floats(packed, layout[12], 8), ours.inv_freq)
    assert np.array_equal(floats(packed, layout[13], D), ours.weights["model.norm.weight"])
    same(linear(packed, (*layout[14:16], -1), V, D)[0], ours.weights["lm_head.weight"], precision)
    assert np.array_equal(packed.embeddings.numpy(), ours.weights["model.embed_tokens.weight"])
    for index in range(2):
        record, name = layout[32 + 16 * index :][:16], f"model.layers.{index}."
        for place, norm, size in (
            (0, "input_layernorm", D),
            (1, "post_attention_layernorm", D),
            (2, "self_attn.q_norm", WIDTH),
            (3, "self_attn.k_norm", WIDTH),
        ):
            expected = ours.weights.get(f"{name}{norm}.weight")
            assert (record[place] == -1) == (expected is None)
            if expected is not None:
                assert np.array_equal(floats(packed, record[place], size), expected)
        parts = [f"{name}self_attn.{part}_proj" for part in "qkv"]
        found, bias = linear(packed, record[4:7], (H + 2 * KV) * WIDTH, D)
        same(found, np.concatenate([ours.weights[part + ".weight"] for part in parts]), precision)
        assert (bias is not None) == (family == "qwen2")
        if bias is not None:
            assert np.array_equal(bias, np.concatenate([ours.weights[part + ".bias"] for part in parts]))
        same(linear(packed, record[7:10], D, H * WIDTH)[0], ours.weights[f"{name}self_attn.o_proj.weight"], precision)
        found, bias = linear(packed, record[10:13], 2 * INNER, D)
        gate, up = (ours.weights[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up"))
        mixed = np.concatenate([part[i : i + 16] for i in range(0, INNER, 16) for part in (gate, up)])
        same(found, mixed, precision)
        assert bias is None
        same(linear(packed, record[13:16], D, INNER)[0], ours.weights[f"{name}mlp.down_proj.weight"], precision)


def test_biases_of_all_layers_are_interleaved_too():
    model = random_model("llama", seed=2, attention_bias=True, mlp_bias=True)
    packed = pack(read(model), "int8", cache=False)
    record, mlp = packed.layout.tolist()[32:48], model.model.layers[0].mlp
    gate, up = mlp.gate_proj.bias.numpy(), mlp.up_proj.bias.numpy()
    _, bias = linear(packed, record[10:13], 2 * INNER, D)
    assert np.array_equal(bias.reshape(3, 2, 16)[:, 0].ravel(), gate)
    assert np.array_equal(bias.reshape(3, 2, 16)[:, 1].ravel(), up)
    assert record[9] != -1 and record[15] != -1


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_adapters_are_folded_and_share_what_they_do_not_change(precision):
    model = random_model(seed=3, adapters=("first", "second", "third"))
    packed = pack(read(model, ("first", None, "second", "third")), precision, cache=False)
    assert packed.adapters == ("first", "base", "second", "third")
    records = packed.layout[32:].view(4, 2, 16)
    distinct = {place: len(set(records[:, 0, place].tolist())) for place in (0, 1, 4, 7, 10, 13)}
    # first: q and down; second: v, o, gate and up; third: k.
    assert distinct == {0: 1, 1: 1, 4: 4, 7: 2, 10: 2, 13: 2}
    for index, adapter in enumerate(packed.adapters):
        ours = oracle_of(model, precision, None if adapter == "base" else adapter)
        record = records[index, 1].tolist()
        name = "model.layers.1."
        qkv = np.concatenate([ours.folded(f"{name}self_attn.{part}_proj.weight") for part in "qkv"])
        same(linear(packed, record[4:7], (H + 2 * KV) * WIDTH, D)[0], qkv, precision)
        same(linear(packed, record[13:16], D, INNER)[0], ours.folded(f"{name}mlp.down_proj.weight"), precision)
    alone = pack(read(model, "third"), precision, cache=False)
    assert alone.blob.numel() < packed.blob.numel() / 1.5


def test_bfloat16_weights_are_taken_as_they_are():
    model = random_model(seed=4, dtype=torch.bfloat16)
    wide = random_model(seed=4).bfloat16().float()
    for precision in ("int8", "float32"):
        narrow, plain = (pack(read(m), precision, cache=False) for m in (model, wide))
        assert torch.equal(narrow.blob, plain.blob) and torch.equal(narrow.embeddings, plain.embeddings)
        assert narrow.embeddings.dtype == torch.float32


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision: expected one of int8, float32, got 'int4'"):
        pack(read(random_model()), "int4")


def test_the_cache_gives_the_same_bytes_without_packing(monkeypatch, cache_folder):
    found = read(random_model(seed=5, adapters=("first",)), ("first", None))
    packed = pack(found)
    (path,) = cache_folder.rglob("*.safetensors")
    assert path == store.path_of(fingerprint(found, "int8")) and [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr("ztok_fast.ops.int8_pack", lambda weight: pytest.fail("packed again"))
    again = pack(found)
    assert torch.equal(again.blob, packed.blob) and torch.equal(again.layout, packed.layout)
    assert again.blob.data_ptr() % 64 == 0 and again.blob.data_ptr() != packed.blob.data_ptr()
    ranges = [line.split(" ")[0].split("-") for line in open("/proc/self/maps") if str(path) in line]
    assert any(int(low, 16) <= again.blob.data_ptr() < int(high, 16) for low, high in ranges), "mapped, not copied"


@pytest.mark.parametrize(
    ("files", "size", "kept"),
    [
        (16, 1 << 20, "abcdef"),
        (3, 1 << 20, "aef"),  # a was used last, f is new
        (16, 3000, "af"),  # each file has 1 kB and a header
        (16, 10, "f"),
    ],
)
def test_files_used_longest_ago_are_removed(monkeypatch, cache_folder, files, size, kept):
    monkeypatch.setattr(store, "KEPT_FILES", files)
    blob = torch.zeros(1000, dtype=torch.uint8)
    for age, key in enumerate("edcba"):
        store.save(key, blob)
        os.utime(store.path_of(key), (1000 - age, 1000 - age))
    assert store.load("a", 1000) is not None
    monkeypatch.setattr(store, "KEPT_BYTES", size)
    (cache_folder / "ztok_fast" / "engine" / "notes.txt").write_text("another's")
    store.save("f", blob)
    assert "".join(sorted(path.stem for path in cache_folder.rglob("*.safetensors"))) == kept
    assert (cache_folder / "ztok_fast" / "engine" / "notes.txt").exists()
    for key in kept:
        assert torch.equal(store.load(key, 1000), blob)


def test_fingerprints_tell_models_apart():
    def of(precision="int8", adapters=None, change=None, **settings):
        model = random_model(**settings)
        if change is not None:
            change(model)
        return fingerprint(read(model, adapters), precision)

    def one_bit(model):
        model.model.layers[1].mlp.up_proj.weight.view(torch.int32)[3, 4] ^= 1

    def scale(model):
        model.base_model.model.model.layers[0].self_attn.q_proj.scaling["first"] *= 2

    two = {"adapters": ("first", "second"), "seed": 0}
    with_adapters = random_model(**two)
    scaled = random_model(**two)
    scale(scaled)
    prints = [
        of(),
        of("float32"),
        of(change=one_bit),
        of(rms_norm_eps=1e-5),
        of(family="mistral"),
        of(dtype=torch.bfloat16),
        *(fingerprint(read(with_adapters, a), "int8") for a in ("first", "second", (None, "first"), ("first", None))),
        fingerprint(read(scaled, "first"), "int8"),
    ]
    assert len(set(prints)) == len(prints) and of() == prints[0]


def damage(path, how):
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "truncated":
        del data[len(data) // 2 :]
    elif how == "empty":
        data.clear()
    elif how == "one bit of a weight":
        data[header + 12345] ^= 1
    elif how == "another key":
        at = data.index(b'"key"') + 9
        data[at] = data[at] ^ 1
    elif how == "no metadata":
        data[8:header] = data[8:header].replace(b"__metadata__", b"__metadata_x")
    elif how == "more bytes":
        data += b"x"
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "one bit of a weight", "another key", "no metadata", "more bytes"]
)
def test_a_damaged_file_is_written_again(how, cache_folder, caplog):
    found = read(random_model(seed=6))
    packed = pack(found)
    (path,) = cache_folder.rglob("*.safetensors")
    whole = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != whole
    with caplog.at_level(logging.WARNING):
        again = pack(found)
    assert torch.equal(again.blob, packed.blob) and path.read_bytes() == whole
    assert "will be written again" in caplog.text and str(path) in caplog.text


def test_weights_that_cannot_be_kept_are_used_all_the_same(cache_folder, caplog):
    (cache_folder / "ztok_fast").write_text("a file where the folder should be")
    found = read(random_model(seed=7))
    with caplog.at_level(logging.WARNING):
        packed = pack(found)
    assert "cannot be kept" in caplog.text
    assert torch.equal(packed.blob, pack(found, cache=False).blob)


def test_the_file_is_one_that_safetensors_reads(cache_folder):
    from safetensors.torch import load_file

    packed = pack(read(random_model(seed=8)))
    (path,) = cache_folder.rglob("*.safetensors")
    assert torch.equal(load_file(path)["weights"], packed.blob)


def test_the_engine_does_not_share_the_models_embeddings():
    model = random_model(seed=9)
    packed = pack(read(model), cache=False)
    before = packed.embeddings.clone()
    model.model.embed_tokens.weight.zero_()
    assert torch.equal(packed.embeddings, before)
