"""A codec on disk: bit-exact, nothing of the base, and refused where it does not belong."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.codec.tiny_codec import tiny_base, tiny_codec, tiny_config
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ConfigError, ZTokConfig
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.weights import DECODING_SETTINGS, PACKED_WEIGHTS, WEIGHTS, WeightsError, codec_fingerprint


@pytest.fixture
def saved(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def test_every_bit_comes_back(family, family_codec, tmp_path):
    family_codec.save_pretrained(tmp_path)
    loaded = ZTokCodec.from_pretrained(tmp_path, base=tiny_base(family))
    state = loaded.model.codec_state()
    for name, tensor in family_codec.model.codec_state().items():
        assert torch.equal(state[name], tensor), name
    assert loaded.config == family_codec.config and loaded.fingerprint == family_codec.fingerprint
    z = family_codec.compress(["the small text is a small text"], ratio=2)
    assert loaded.decompress(z) == family_codec.decompress(z)


def test_bfloat16_copy_of_a_bfloat16_copy_is_the_same(codec, tmp_path):
    codec.save_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    loaded = ZTokCodec.from_pretrained(tmp_path / "one", base=tiny_base())
    loaded.save_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    assert loaded.fingerprint != codec.fingerprint


def test_files_hold_the_codec_alone(saved, codec):
    assert sorted(p.name for p in saved.iterdir()) == sorted(["config.json", WEIGHTS])
    base_shapes = {tuple(p.shape) for n, p in codec.base.model.named_parameters() if "lora_" not in n and p.dim() > 1}
    with safe_open(saved / WEIGHTS, "pt") as weights:
        names = set(weights.keys())
        assert names == set(codec.model.codec_state())
        for name in names:
            assert "lora_" in name or "base" not in name
            assert tuple(weights.get_tensor(name).shape) not in base_shapes


def test_wrong_base_is_refused_by_its_fingerprint(saved):
    with pytest.raises(CodecError, match=r"expected the one with fingerprint .* on which codec .* was trained, got"):
        ZTokCodec.from_pretrained(saved, base=tiny_base(seed=5))


def test_base_that_carries_adapters_is_refused(codec):
    with pytest.raises(ConfigError, match="expected a bare one, got one with adapters"):
        ZTokCodec(codec.base, codec.config)


def test_base_with_too_few_positions_is_refused():
    base = tiny_base("gpt2")
    with pytest.raises(ConfigError, match="at most 128 tokens, the base model's positions, got 192"):
        ZTokCodec(base, tiny_config(base, segment_length=64, context_segments=2))


def test_unknown_codec_names_those_that_ship(tmp_path):
    with pytest.raises(CodecError, match="expected a codec folder or one of"):
        ZTokCodec.from_pretrained(tmp_path / "nowhere")


def test_missing_and_damaged_weights(saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="expected a whole safetensors file"):
        ZTokCodec.from_pretrained(saved, base=tiny_base())
    (saved / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=f"expected the weights file {WEIGHTS} or {PACKED_WEIGHTS}, got none"):
        ZTokCodec.from_pretrained(saved, base=tiny_base())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("codebooks"), "missing .'codebooks'"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown .'extra'"),
        (lambda s: s.update(codebooks=torch.zeros(2, 3, 8)), "codebooks: expected shape .2, 16, 8., got .2, 3, 8."),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_of_another_codec(saved, change, message):
    state = load_file(saved / WEIGHTS)
    change(state)
    save_file(state, saved / WEIGHTS)
    with pytest.raises(WeightsError, match=message):
        ZTokCodec.from_pretrained(saved, base=tiny_base())


def test_fingerprint_follows_every_setting_that_decoding_depends_on(codec):
    state = codec.model.codec_state()
    values = codec.config.to_dict()
    seen = {codec.fingerprint}
    for name in DECODING_SETTINGS:
        old = values[name]
        new = {"z_position": "end", "unit_conditioning": False, "copy_path": True}.get(name, old)
        changed = ZTokConfig.from_dict(values | {name: old + 1 if new is old else new, **_needed(name)})
        seen.add(codec_fingerprint(changed, state))
    assert len(seen) == 1 + len(DECODING_SETTINGS)
    other = ZTokConfig.from_dict(values | {"budgets": [3.0], "emission": "fixed"})
    assert codec_fingerprint(other, state) == codec.fingerprint


def _needed(name):
    return {"copy_path": False} if name == "unit_conditioning" else {}


def test_fingerprint_follows_the_weights():
    codec = tiny_codec()
    before = codec.fingerprint
    state = {n: t.detach().clone() for n, t in codec.model.codec_state().items()}
    state["start_embedding"][3] += 1e-3
    codec.load_state(state)
    assert codec.fingerprint != before


class TestConfig:
    def test_round_trip(self, tmp_path):
        config = ZTokConfig(base_model="m", budgets=[2.0, 6.5], compressor_layers=3, copy_path=True)
        config.save(tmp_path)
        assert ZTokConfig.load(tmp_path) == config

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"segment_length": 0}, "segment_length: expected an integer of at least 1, got 0"),
            ({"num_codebooks": True}, "num_codebooks: expected an integer"),
            ({"codebook_size": 1 << 17}, "codebook_size: expected at most 65536"),
            ({"emission": "halt"}, "emission: expected one of"),
            ({"z_position": "middle"}, "z_position: expected one of"),
            ({"budgets": []}, "budgets: expected a list of at least one ratio"),
            ({"budgets": [17.0]}, "ratio: expected between 1 and 16"),
            ({"budgets": [float("nan")]}, "ratio: expected a number"),
            ({"compressor_layers": 0}, "compressor_layers: expected an integer of at least 1"),
            ({"copy_path": True, "unit_conditioning": False}, "copy_path: expected unit_conditioning"),
            ({"format_version": 2}, "format version: expected 1, got 2"),
            ({"colour": "red"}, "got unknown .'colour'"),
        ],
    )
    def test_bad_settings_are_named(self, values, message):
        with pytest.raises(ConfigError, match=message):
            ZTokConfig.from_dict(values)

    def test_bad_files(self, tmp_path):
        with pytest.raises(ConfigError, match="expected a config.json in it, got none"):
            ZTokConfig.load(tmp_path)
        for text, message in (("{", "expected a JSON object"), ("[1]", "expected a JSON object, got list")):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ConfigError, match=message):
                ZTokConfig.load(tmp_path)

    def test_more_compressor_layers_than_the_base_has(self):
        base = tiny_base()
        with pytest.raises(ConfigError, match="compressor_layers: expected at most 2, got 3"):
            ZTokCodec(base, tiny_config(base, compressor_layers=3))


def test_codec_folder_with_its_own_base(codec, saved, tmp_path):
    from tests.codec.tiny_base import tiny_tokenizer
    from tests.codec.tiny_codec import tiny_causal_lm

    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", len(tokenizer)).save_pretrained(saved / "base")
    tokenizer.save_pretrained(saved / "base")
    moved = tmp_path / "moved"
    shutil.copytree(saved, moved)
    assert ZTokCodec.from_pretrained(moved).fingerprint == codec.fingerprint
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"base_fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="expected weights with fingerprint 0000"):
        ZTokCodec.from_pretrained(moved)
