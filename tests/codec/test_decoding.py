"""Decoding over the cache equals the teacher-forced pass, for every family and every kind of context."""

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_codec
from ztok_fast.codec.decoding import decode_text, write_answer
from ztok_fast.codec.float_session import DecodeCache, DecodeSession
from ztok_fast.codec.layout import offsets, position_in_sequence
from ztok_fast.codec.passes import compress_documents, decode_segments, decompress_documents, teacher_forced


def check_free_running(codec, lengths, ratio=3.0):
    model = codec.model
    z = compress_documents(model, packed_documents(codec, lengths), ratio)
    written = decompress_documents(model, z)
    assert [len(w) for w in written] == lengths
    # Given what it wrote as the prefix, the model would write the same again; ties within rounding may differ.
    flat = torch.tensor([t for w in written for t in w])
    predicted, margin, _ = teacher_forced(model, z, flat)
    assert ((predicted == flat) | (margin < 1e-3)).all()
    assert (margin >= 1e-3).float().mean() > 0.9


def test_decoding_equals_the_teacher_forced_pass(family_codec):
    check_free_running(family_codec, [37, 1, 16, 20])


@pytest.mark.parametrize(
    "settings",
    [
        {"context_segments": 1},
        {"context_segments": 2, "copy_path": True},
        {"unit_conditioning": False, "z_position": "end"},
        {"compressor_layers": 1, "z_position": "center"},
    ],
    ids=["context-1", "context-2-copy", "unconditioned", "one-compressor-layer"],
)
def test_decoding_equals_the_teacher_forced_pass_for_every_setting(settings):
    check_free_running(tiny_codec(**settings), [61, 18])


def test_hidden_states_of_steps_equal_those_of_one_pass(family_codec):
    adapted, lengths, steps = family_codec.model.adapted, torch.tensor([3, 7, 1]), 4
    torch.manual_seed(0)
    sequences = [torch.randn(int(n) + steps, adapted.hidden_size) for n in lengths]
    cu = offsets(lengths + steps)
    positions = position_in_sequence(cu, int(cu[-1]))
    with torch.no_grad():
        full = adapted(torch.cat(sequences), positions, cu, int(lengths.max()) + steps, adapter="decompressor")
        prefixes = torch.cat([s[:n] for s, n in zip(sequences, lengths)])
        cu_prefix = offsets(lengths)
        session = DecodeSession(
            adapted, "decompressor", prefixes, position_in_sequence(cu_prefix, len(prefixes)), cu_prefix, steps
        )
        for step in range(steps):
            last = cu[:-1].long() + lengths + step - 1
            torch.testing.assert_close(session.last, full[last], atol=1e-4, rtol=1e-4)
            session.step(torch.stack([s[int(n) + step] for s, n in zip(sequences, lengths)]), lengths + step)
        torch.testing.assert_close(session.last, full[cu[1:].long() - 1], atol=1e-4, rtol=1e-4)


def test_forced_tokens_are_written_and_gone_on_from(codec):
    model, documents = codec.model, packed_documents(codec, [40])
    z = compress_documents(model, documents, 4.0)
    free = decompress_documents(model, z)[0]
    forced = {0: 7, 20: 9, 39: 11}
    written = decompress_documents(model, z, [forced])[0].tolist()
    assert {p: written[p] for p in forced} == forced
    assert written[1:16] != free[1:16].tolist(), "the first token of a segment should change what follows"
    # What was written around the forced tokens is what the model says given them.
    predicted, margin, _ = teacher_forced(model, z, torch.tensor(written))
    same = (predicted == torch.tensor(written)) | (margin < 1e-3)
    assert same[[p for p in range(40) if p not in forced]].all()
    everything = decompress_documents(model, z, [dict(enumerate(documents[0]))])[0]
    assert everything.tolist() == documents[0]


def test_batches_of_segments_do_not_change_the_text(codec):
    model = codec.model
    z = compress_documents(model, packed_documents(codec, [61, 5, 30]), 3.0)
    assert decode_segments(model, z, batch_segments=2) == decode_segments(model, z)


def test_answers_stop_at_an_end_token_or_the_limit(codec):
    runtime = codec.model.float_runtime
    torch.manual_seed(0)
    embeds, cu = torch.randn(9, runtime.adapted.hidden_size), torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = position_in_sequence(cu, 9)
    free = write_answer(runtime, embeds, positions, cu, 8, set())
    assert [len(a) for a in free] == [8, 8]
    end = free[0][3]
    stopped = write_answer(runtime, embeds, positions, cu, 8, {end})
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])
    assert write_answer(runtime, embeds, positions, cu, 1, set()) == [a[:1] for a in free]


def test_cache_refuses_more_rows_than_it_holds():
    cache = DecodeCache(3)
    rows = torch.ones(1, 1, 2, 4)
    cache.update(rows, rows, 0)
    cache.advance(2)
    assert cache.get_seq_length() == 2
    with pytest.raises(ValueError, match="expected at most 3 rows, got 4"):
        cache.update(rows, rows, 0)


def test_sequences_leave_the_batch_in_order_of_their_lengths(family_codec, monkeypatch):
    """Tokens are those of every segment decoded alone, and rows that are written to their end are computed no more."""
    codec = family_codec
    model = codec.model
    monkeypatch.setattr(model, "engine", None)
    z = compress_documents(model, packed_documents(codec, [37]), 3.0)
    lengths = z.cu_text.diff().tolist()
    assert len(set(lengths)) > 1
    rows = []
    hook = model.adapted.model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: rows.append(len(args[0]))
    )
    together = decode_segments(model, z)
    hook.remove()
    assert sum(rows) == sum(lengths)
    assert together == decode_segments(model, z, batch_segments=1)


def test_lengths_that_rise_are_refused(family_codec):
    runtime = family_codec.model.float_runtime
    prefix = torch.zeros(2, runtime.adapted.hidden_size)
    with pytest.raises(ValueError, match="decode_text: lengths must be in falling order"):
        decode_text(
            runtime,
            prefix,
            torch.zeros(2, dtype=torch.int64),
            torch.tensor([0, 1, 2], dtype=torch.int32),
            torch.tensor([1, 2]),
            0,
        )
