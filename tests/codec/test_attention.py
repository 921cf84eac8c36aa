"""Attention on packed batches: equal to transformers' own, every sequence to itself, whatever the position ids."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.codec.tiny_codec import packed_documents, tiny_causal_lm, tiny_codec
from ztok_fast.codec import attention
from ztok_fast.codec.attention import masked_attention, no_mask, packed_attention, ztok_attention
from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.passes import encode_documents


def ragged_heads(lengths, heads, kv_heads, width=8):
    torch.manual_seed(0)
    total = sum(lengths)
    return torch.randn(total, heads, width), torch.randn(total, kv_heads, width), torch.randn(total, kv_heads, width)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5, 5, 0, 1, 16, 3, 3, 3], [4, 4], [0, 0], []])
def test_packed_attention_is_that_of_each_sequence_alone(lengths, kv_heads, padded, monkeypatch):
    if padded:  # what a GPU in float32 runs
        monkeypatch.setattr(
            attention, "_runs", lambda q, k, v, cu, scale: attention._padded(q, k, v, cu, max([*lengths, 0]), scale)
        )
    query, key, value = (x.requires_grad_() for x in ragged_heads(lengths, 4, kv_heads))
    cu = offsets(torch.tensor(lengths, dtype=torch.int64))
    packed = packed_attention(query, key, value, cu, max([*lengths, 0]), None)
    assert packed.shape == query.shape
    if not sum(lengths):
        return
    weights = torch.randn_like(packed)
    gradients = torch.autograd.grad((packed * weights).sum(), (query, key, value))
    for start, stop in zip(cu.tolist(), cu[1:].tolist()):
        if start == stop:
            continue
        own = [x.detach()[start:stop].requires_grad_() for x in (query, key, value)]
        alone = scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in own), is_causal=True, enable_gqa=True)
        alone = alone[0].transpose(0, 1)
        torch.testing.assert_close(packed[start:stop], alone)
        expected = torch.autograd.grad((alone * weights[start:stop]).sum(), own)
        for got, one in zip(gradients, expected):
            torch.testing.assert_close(got[start:stop], one)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masked_attention_folds_shared_heads(kv_heads):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 8), torch.randn(3, kv_heads, 7, 8), torch.randn(3, kv_heads, 7, 8)
    mask = torch.rand(3, 1, 2, 7) < 0.6
    mask[..., 0] = True
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(masked_attention(query, key, value, mask, None), expected)


def eager_hidden(family, vocab_size, embeds, position_ids):
    """Last hidden states of one sequence under transformers' eager attention with an explicit causal mask."""
    model = tiny_causal_lm(family, vocab_size)
    model.set_attn_implementation("eager")
    rows = len(embeds)
    mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
    decoder = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        return decoder(
            inputs_embeds=embeds[None], position_ids=position_ids[None], attention_mask=mask
        ).last_hidden_state[0]


def test_packed_pass_equals_eager_attention_of_each_sequence(family, family_codec):
    adapted, lengths = family_codec.model.adapted, [7, 1, 16]
    cu, total = offsets(torch.tensor(lengths)), sum(lengths)
    torch.manual_seed(0)
    embeds = torch.randn(total, adapted.hidden_size)
    # Two runs of positions in each sequence, as Z-tokens and the text that they stand for have.
    positions = position_in_sequence(cu, total) % 5
    with torch.no_grad():
        packed = adapted(embeds, positions, cu, max(lengths), adapter=None)
    for start, stop in zip(cu.tolist(), cu[1:].tolist()):
        expected = eager_hidden(family, len(adapted.embedding.weight), embeds[start:stop], positions[start:stop])
        torch.testing.assert_close(packed[start:stop], expected, atol=2e-5, rtol=2e-5)


def test_base_logits_without_adapters_are_those_of_transformers(family, family_codec):
    tokens = torch.arange(20)[None] + 5
    with torch.no_grad():
        adapted = family_codec.model.adapted
        expected = tiny_causal_lm(family, len(adapted.embedding.weight))(input_ids=tokens).logits[0]
        hidden = adapted(adapted.embedding(tokens[0]), torch.arange(20), offsets(torch.tensor([20])), 20, adapter=None)
        torch.testing.assert_close(adapted.logits(hidden), expected, atol=2e-5, rtol=2e-5)


def test_adapters_change_what_the_base_says(family_codec):
    adapted = family_codec.model.adapted
    embeds, positions, cu = torch.randn(6, adapted.hidden_size), torch.arange(6), offsets(torch.tensor([6]))
    with torch.no_grad():
        outputs = [
            adapted(embeds, positions, cu, 6, adapter=a) for a in (None, "compressor", "decompressor", "inferencer")
        ]
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("context", [0, 1, 2])
@pytest.mark.parametrize("conditioned", [True, False], ids=["conditioned", "unconditioned"])
def test_text_sees_the_ztokens_of_its_segment_and_context_and_no_others(context, conditioned):
    codec = tiny_codec("llama", context_segments=context, unit_conditioning=conditioned)
    model, documents = codec.model, packed_documents(codec, [60, 20])
    with torch.no_grad():
        z = encode_documents(model, documents, 3.0).z
        embeddings = model.z_embeddings(model.dequantize(z.codes), z.unit_lengths)
        tokens = torch.tensor([t for d in documents for t in d])
        cu_segments = offsets(torch.tensor([16, 16, 16, 12, 16, 4]))
        assert z.first_segment.tolist() == [0, 0, 0, 0, 4, 4]

        def logits_of(embeddings):
            inputs = model.decoder_inputs(embeddings, z, tokens, cu_segments)
            return model.adapted.logits(model.decompressor_hidden(inputs))

        before = logits_of(embeddings)
        segment_of_token = sequence_of_row(cu_segments, len(tokens))
        document_of_segment = [0, 0, 0, 0, 1, 1]
        for segment in range(6):
            changed = embeddings.clone()
            changed[int(z.cu_segments[segment])] += 1.0
            moved = (logits_of(changed) - before).abs().amax(1) > 1e-6
            seen_from = [
                s
                for s in range(segment, min(6, segment + context + 1))
                if document_of_segment[s] == document_of_segment[segment]
            ]
            assert moved.tolist() == [s in seen_from for s in segment_of_token.tolist()]


def test_text_of_one_segment_does_not_leak_into_another(family_codec):
    model, tokens = family_codec.model, torch.arange(3, 35)
    cu = offsets(torch.tensor([16, 16]))
    ratio, sections = torch.tensor([4.0, 4.0]), torch.arange(3, dtype=torch.int32)
    changed = tokens.clone()
    changed[20] += 1
    with torch.no_grad():
        one = model.encode(tokens, cu, sections, ratio)
        other = model.encode(changed, cu, sections, ratio)
    assert torch.equal(one.raw_mass[:16], other.raw_mass[:16])
    assert torch.equal(one.raw_mass[16:20], other.raw_mass[16:20])
    assert not torch.equal(one.raw_mass[20:], other.raw_mass[20:])


class TestRefusals:
    def call(self, rows=4, keys=4, **kwargs):
        shape = (1, 2, keys, 8)
        return ztok_attention(None, torch.randn(1, 2, rows, 8), torch.randn(shape), torch.randn(shape), None, **kwargs)

    def test_plain_causal_attention_is_allowed(self):
        assert self.call()[0].shape == (1, 4, 2, 8)
        assert self.call(rows=1, keys=4, sliding_window=4)[0].shape == (1, 1, 2, 8)

    def test_window_shorter_than_the_sequence(self):
        with pytest.raises(ValueError, match="expected at most 3 rows .*sliding window.*, got 4"):
            self.call(sliding_window=3)

    @pytest.mark.parametrize("name", ["softcap", "s_aux"])
    def test_what_is_not_implemented(self, name):
        with pytest.raises(ValueError, match=f"without {name}"):
            self.call(**{name: 30.0})

    def test_chunk_over_a_cache_without_a_mask(self):
        with pytest.raises(ValueError, match="explicit mask for 2 new rows over 4 cached"):
            self.call(rows=2)

    def test_several_packed_rows(self):
        heads = torch.randn(2, 2, 4, 8)
        with pytest.raises(ValueError, match="one packed row, got 2"):
            ztok_attention(None, heads, heads, heads, None, cu_seq_lens_q=torch.tensor([0, 4]), max_length_q=4)

    def test_padding_mask(self):
        assert no_mask(attention_mask=torch.ones(1, 4, dtype=torch.bool)) is None
        with pytest.raises(ValueError, match="got padding"):
            no_mask(attention_mask=torch.tensor([[False, True]]))

    def test_padding_mask_given_to_the_adapted_base(self, codec):
        with pytest.raises(ValueError, match="got padding"):
            codec.base.model(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.tensor([[0, 1]]))
