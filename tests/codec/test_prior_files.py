"""Files whose slots are coded under the compressor's model: written where that is smaller, read by their codec."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save as serialize

from tests.codec.tiny_codec import tiny_codec
from tests.codec.tiny_slots import SLOTS, TEXTS
from ztok_fast.codec import prior_files, zfile
from ztok_fast.codec.draft import symbol_losses
from ztok_fast.codec.draft_head import SHARES
from ztok_fast.codec.errors import CodecError, PriorNeededError, ZBatchError, ZFileError
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.zbatch import ZBatch


def taught(codec):
    """The codec with a compressor that knows what is to come."""
    codec._engines.use()
    model, z = codec.model, codec.compress(TEXTS, 1)
    named, cu = written_tokens(z), z.cu_text
    share = torch.full((len(cu) - 1,), SHARES - 1)
    own = [p for n, p in model.trainable_parameters().items() if ".compressor." in n or n.startswith("draft.")]
    optimizer = torch.optim.Adam(own, 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        symbols, _ = symbol_losses(model, named.clamp(min=0), named, named.clamp(min=0), cu, share)
        symbols.mean().backward()
        optimizer.step()
    codec._fingerprint = None
    return codec


@pytest.fixture(scope="module")
def codec():
    return taught(tiny_codec(**SLOTS))


@pytest.fixture
def saved(codec, tmp_path):
    z = codec.compress(TEXTS, 1)
    codec.save(z, tmp_path / "x.ztok")
    return z, tmp_path / "x.ztok"


def stated(path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


@pytest.mark.parametrize("engine", ["int8", "float32"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_batch_survives_a_file(codec, tmp_path, monkeypatch, engine, exact):
    monkeypatch.setattr(codec._engines, "choice", engine)
    z, path = codec.compress(TEXTS, 1, exact), tmp_path / "x.ztok"
    codec.save(z, path)
    z.save(tmp_path / "adaptive.ztok")
    assert stated(path)["slots"] == "prior" and stated(tmp_path / "adaptive.ztok")["slots"] == "adaptive"
    assert path.stat().st_size < (tmp_path / "adaptive.ztok").stat().st_size
    assert codec.load(path) == codec.load(tmp_path / "adaptive.ztok") == z
    if exact:
        assert codec.decompress(codec.load(path)) == TEXTS


def test_generated_ztokens_survive_a_file(codec, saved, tmp_path):
    new = codec.generate(saved[0], 6, temperature=1.0, seed=1, end_threshold=1.0)
    codec.save(new, tmp_path / "new.ztok")
    assert codec.load(tmp_path / "new.ztok") == new


def test_adaptive_tables_where_they_are_smaller(codec, tmp_path):
    z = codec.compress(["aaaaaaaaaaaaaaaa" * 200], 2)
    codec.save(z, tmp_path / "x.ztok")
    assert stated(tmp_path / "x.ztok")["slots"] == "adaptive"
    assert ZBatch.load(tmp_path / "x.ztok") == z


def test_what_transformers_modules_made_is_coded_adaptively(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", "float")
    z = codec.compress(TEXTS, 4)
    codec.save(z, tmp_path / "x.ztok")
    assert ZBatch.load(tmp_path / "x.ztok") == codec.load(tmp_path / "x.ztok") == z


def test_codecs_of_pooled_units_save_and_load(tmp_path):
    codec = tiny_codec()
    z = codec.compress(TEXTS, 4)
    codec.save(z, tmp_path / "x.ztok")
    assert codec.load(tmp_path / "x.ztok") == z == ZBatch.load(tmp_path / "x.ztok")
    assert "slots" not in stated(tmp_path / "x.ztok")


def test_such_a_file_needs_its_codec(codec, saved, monkeypatch):
    z, path = saved
    with pytest.raises(PriorNeededError, match=r"x.ztok: .* read it with codec.load\(path\)"):
        ZBatch.load(path)
    for other in (taught(tiny_codec(seed=1, **SLOTS)), tiny_codec()):
        with pytest.raises(ZFileError, match="codec: expected the one with fingerprint"):
            other.load(path)
        with pytest.raises(ZBatchError, match="codec: expected the one with fingerprint"):
            other.save(z, path)
    monkeypatch.setattr(codec._engines, "choice", "float")
    with pytest.raises(CodecError, match="engine: expected 'int8', with which the slots of the file were coded"):
        codec.load(path)


def altered(path, code=None, **changed):
    """Write the file again with other metadata or codes, under a right checksum."""
    with safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata() | changed, {name: file.get_tensor(name) for name in zfile.TENSORS}
    if code is not None:
        tensors["codes"] = code(tensors["codes"].copy())
    metadata["content_sha256"] = zfile.content_sha256(tensors, metadata)
    path.write_bytes(serialize(tensors, metadata))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": "other"}, "metadata slots: expected adaptive or prior, got 'other'"),
        ({"precision": "float"}, "precision: expected int8 or float32 beside slots with a prior, got 'float'"),
        ({"precision": "x" * 99}, "precision: expected int8 or float32"),
        ({"codebook_size": "999"}, "codebook_size: expected .* as the codec has, got 999"),
        ({"max_unit_length": "99"}, "max_unit_length: expected 16, as the codec has, got 99"),
        ({"code": lambda codes: codes[:0]}, "codes: expected a stream of"),
        ({"code": lambda codes: np.full_like(codes, 255)}, "expected .*: the file is damaged"),
    ],
)
def test_wrong_statements_are_refused(codec, saved, changed, message):
    altered(saved[1], **changed)
    with pytest.raises(ZFileError, match=message):
        codec.load(saved[1])


def test_more_ztokens_than_a_stream_can_hold(codec, saved, monkeypatch):
    monkeypatch.setattr(prior_files, "MOST_TOKENS_OF_A_BYTE", 0.01)
    with pytest.raises(ZFileError, match="codes: expected a stream of"):
        codec.load(saved[1])
    codec.save(*saved)
    assert stated(saved[1])["slots"] == "adaptive"


def test_damaged_codes_give_an_error_or_valid_ztokens(codec, saved):
    z, path = saved
    whole, refused, changed = path.read_bytes(), 0, 0
    with safe_open(path, framework="numpy") as file:
        size = len(file.get_tensor("codes"))
    for at in range(size):
        path.write_bytes(whole)

        def damage(codes, at=at):
            codes[at] ^= 0x29
            return codes

        altered(path, damage)
        try:
            # The last byte may have bits to spare.
            changed += codec.load(path).validate() != z
        except ZFileError:
            refused += 1
    assert refused and refused + changed >= size - 4


def test_parts_that_are_joined():
    for parts in ([], [b""], [b"ab", b"", b"x" * 300, b"y"]):
        assert prior_files.split(prior_files.join(parts), len(parts)) == parts
    for data, count in ((b"a", 0), (b"\x05abc", 2), (b"\x80", 2), (b"", 3)):
        with pytest.raises(ZFileError):
            prior_files.split(data, count)
