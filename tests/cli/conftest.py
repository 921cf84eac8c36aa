"""A tiny codec on a random base with the shipped tokenizer, saved as a folder, and a way to run ``ztok`` on it."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ztok_fast
from ztok_fast.cli.main import main
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig

TOKENIZER = Path(ztok_fast.__file__).parent / "models" / "mini-base" / "base"
TEXT = "The cat sat on the mat, and the dog saw it.\r\nSmall cafés — 東京 🙂 — sell tea for 3.50 a cup.\n"


def save_codec(folder: Path, base: Path, seed: int, **settings) -> Path:
    """A codec with random weights; its units vary in length."""
    torch.manual_seed(seed)
    loaded = load_base(str(base))
    values = {
        "base_model": "tiny",
        "base_fingerprint": loaded.fingerprint,
        "segment_length": 16,
        "section_segments": 32,
        "num_codebooks": 2,
        "codebook_size": 32,
        "latent_dim": 8,
        "max_unit_length": 8,
        "lora_rank": 2,
    }
    codec = ZTokCodec(loaded, ZTokConfig(**(values | settings)))
    if codec.config.emission == "fire":
        torch.nn.init.normal_(codec.model.halting.out.weight, std=2.0)
    codec.save_pretrained(folder)
    shutil.copytree(base, folder / "base")
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory, base_folder) -> Path:
    return save_codec(tmp_path_factory.mktemp("codecs") / "tiny", base_folder, seed=1)


@pytest.fixture(scope="session")
def other_codec_folder(tmp_path_factory, base_folder) -> Path:
    return save_codec(tmp_path_factory.mktemp("codecs") / "other", base_folder, seed=2)


@pytest.fixture(scope="session")
def slots_folder(tmp_path_factory, base_folder) -> Path:
    """A codec of slots."""
    size = len(AutoTokenizer.from_pretrained(base_folder))
    settings = {"emission": "slots", "codebook_size": size, "max_unit_length": 16}
    return save_codec(tmp_path_factory.mktemp("codecs") / "slots", base_folder, seed=1, **settings)


def load(codec: Path, path: Path):
    """The Z-tokens of a file of the codec in a folder."""
    return ZTokCodec.from_pretrained(codec).load(path)


class Result:
    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.bytes, self.out, self.err = status, out, out.decode("utf-8", "replace"), err.decode()


@pytest.fixture
def ztok(capsysbinary):
    """Run ``ztok`` in this process: ``ztok("compress", path, ...)`` gives status, out and err."""

    def run(*arguments) -> Result:
        capsysbinary.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capsysbinary.readouterr())

    return run


@pytest.fixture
def tiny(ztok, codec_folder):
    """As ``ztok``, with the tiny codec."""
    return lambda command, *arguments: ztok(command, *arguments, "--codec", codec_folder)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, codec_folder) -> Path:
    """`TEXT` as an exact ``.ztok`` file at the budget 4."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "text.txt").write_bytes(TEXT.encode())
    assert main(["compress", str(folder / "text.txt"), "--exact", "--codec", str(codec_folder)]) == 0
    return folder / "text.txt.ztok"


def assert_mistake(result: Result, *words: str) -> None:
    """The command ended with a plain message, and nothing else, that holds ``words``."""
    assert result.status == 2
    assert result.err.startswith("ztok: error: ") and result.err.count("\nztok: ") == 0
    for word in words:
        assert word in result.err
    assert result.bytes == b"" and "Traceback" not in result.err
