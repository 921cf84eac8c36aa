"""Emission "stop": Z-tokens that the compressor writes one by one until end-of-Z."""

import pytest
import torch

from tests.codec.tiny_codec import FAMILIES, packed_documents, tiny_base, tiny_codec
from ztok_fast.codec.autoregressive import STOP_THRESHOLD, autoregressive_loss
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.passes import compress_documents, emit_documents, encode_documents
from ztok_fast.train.batches import Section, make_batch
from ztok_fast.train.evaluate import evaluate
from ztok_fast.train.objective import LossWeights, Objective, Phase


@pytest.fixture(params=FAMILIES)
def codec(request):
    return tiny_codec(request.param, emission="stop")


def set_end(codec, probability: float) -> None:
    """Give end-of-Z this mass at every step: equal logits for the codes, and for end-of-Z what makes it so."""
    with torch.no_grad():
        codec.model.autoregressive.queries.zero_()
        codec.model.autoregressive.end_row.zero_()
        codec.model.autoregressive.end_mass = lambda hidden, codebooks: torch.full((len(hidden),), probability)


@pytest.mark.parametrize("lengths", [[1], [16, 17], [3, 50, 64]])
def test_units_cover_the_text_of_their_segment(codec, lengths):
    written = emit_documents(codec.model, packed_documents(codec, lengths), 3.0)
    segments, _ = split_segments(lengths, 16)
    assert written.codes.shape == (written.ztokens, 2) and written.codes.dtype == torch.int32
    assert 0 <= int(written.codes.min()) and int(written.codes.max()) < 16
    assert 1 <= int(written.unit_lengths.min()) and int(written.unit_lengths.max()) <= codec.config.max_unit_length
    ends = offsets(written.unit_lengths)[written.cu_segments.long()]
    assert ends.tolist() == offsets(torch.tensor(segments)).tolist()


def test_what_is_written_does_not_depend_on_the_batch(codec):
    documents = packed_documents(codec, [64, 21, 40])
    together = compress_documents(codec.model, documents, 3.0)
    for document, key in zip(documents, together.keys()):
        assert compress_documents(codec.model, [document], 3.0).keys() == [key]


def test_the_ratio_is_told_and_text_matters(codec):
    documents = packed_documents(codec, [48])
    one, other = (emit_documents(codec.model, documents, ratio) for ratio in (2.0, 6.0))
    changed = emit_documents(codec.model, packed_documents(codec, [48], seed=5), 2.0)
    assert not (torch.equal(one.codes, other.codes) and torch.equal(one.unit_lengths, other.unit_lengths))
    assert not (torch.equal(one.codes, changed.codes) and torch.equal(one.unit_lengths, changed.unit_lengths))


def test_end_of_z_stops_where_the_rest_fits_one_unit():
    codec = tiny_codec(emission="stop")
    document = packed_documents(codec, [16])
    with torch.no_grad():
        codec.model.autoregressive.length_query.weight.zero_()
        codec.model.autoregressive.length_of_codes.weight.zero_()
        codec.model.autoregressive.length_query.bias.copy_(torch.tensor([0, 0, 1.0, 0, 0, 0, 0, 0]))
    set_end(codec, STOP_THRESHOLD)
    # Units of 3; after three of them 7 tokens are left, which with the last 3 do not fit a unit of 8; after four, 4.
    assert emit_documents(codec.model, document, 3.0).unit_lengths.tolist() == [3, 3, 3, 7]
    set_end(codec, STOP_THRESHOLD - 0.01)
    assert emit_documents(codec.model, document, 3.0).unit_lengths.tolist() == [3, 3, 3, 3, 3, 1]


def test_levels_and_one_pass_units_on_the_same_codec(codec):
    documents = packed_documents(codec, [40])
    fewer = emit_documents(codec.model, documents, 3.0, levels=1)
    assert (fewer.codes[:, 1] == -1).all() and (fewer.codes[:, 0] >= 0).all()
    learned = emit_documents(codec.model, documents, 3.0, fixed_units=False)
    assert torch.equal(learned.codes, encode_documents(codec.model, documents, 3.0, False).quantized.codes)
    assert emit_documents(codec.model, documents, 4.0, fixed_units=True).unit_lengths.tolist() == [4] * 10


def test_no_document_and_empty_documents(codec):
    assert len(compress_documents(codec.model, [], 3.0)) == 0
    written = emit_documents(codec.model, [[]], 3.0)
    assert written.ztokens == 0 and written.cu_segments.tolist() == [0] and written.codes.shape == (0, 2)


def test_training_teaches_it_to_write_what_the_quantiser_gives():
    codec = tiny_codec(emission="stop")
    model, documents = codec.model, packed_documents(codec, [32, 32])
    batch = make_batch([Section(d) for d in documents], codec.config.segment_length)
    weights = LossWeights(**dict.fromkeys(vars(LossWeights()), 0.0) | {"autoregressive": 1.0})
    own = [p for n, p in model.codec_state().items() if n.startswith("autoregressive.") or ".compressor." in n]
    optimizer = torch.optim.Adam(own, lr=5e-3)
    ratio = torch.full((2,), 3.0)
    target = encode_documents(model, documents, 3.0, True)
    first = None
    for _ in range(240):
        optimizer.zero_grad()
        embeddings = model.z_embeddings(target.quantized.quantized, target.z.unit_lengths)
        loss = autoregressive_loss(model, batch.tokens, batch.cu_segments, ratio, target.z, embeddings)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < first
    written = emit_documents(model, documents, 3.0)
    assert torch.equal(written.unit_lengths, target.z.unit_lengths) and torch.equal(
        written.cu_segments, target.z.cu_segments
    )
    assert torch.equal(written.codes, target.quantized.codes)
    terms, _ = Objective(model, weights)(batch, ratio, Phase())
    assert "autoregressive" in terms


def test_round_trip_save_and_exact_mode(codec, tmp_path):
    texts = ["The river was high.", "", "one\r\ntwo \u00fc \U0001f600"]
    z = codec.compress(texts, ratio=3, exact=True)
    assert codec.decompress(z) == texts
    codec.save_pretrained(tmp_path)
    family = codec.config.base_model.removeprefix("tiny-")
    again = ZTokCodec.from_pretrained(tmp_path, base=tiny_base(family))
    assert again.config.emission == "stop"
    assert again.compress(texts, ratio=3).codes.equal(codec.compress(texts, ratio=3).codes)
    report = evaluate(codec, packed_documents(codec, [40]), [3])
    assert report["3"]["ratio"] >= 1 and 0 <= report["3"]["free_running"] <= 1


def test_other_emissions_have_no_autoregressive_head():
    names = tiny_codec(emission="fire").model.codec_state()
    assert not any(name.startswith("autoregressive.") for name in names)
