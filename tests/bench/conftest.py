import pytest

from bench.tiny import write_texts, write_tiny_codec
from ztok_fast.codec.codec import ZTokCodec


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory, texts):
    """An untrained codec: what it reconstructs is wrong nearly everywhere, which is what exact mode must survive."""
    return write_tiny_codec(tmp_path_factory.mktemp("codec") / "tiny", texts)


@pytest.fixture(scope="session")
def codec(codec_folder):
    return ZTokCodec.from_pretrained(codec_folder)
