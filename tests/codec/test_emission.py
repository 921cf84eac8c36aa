"""Halting mass, its budget, and the units that follow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.codec.tiny_codec import packed_documents, tiny_codec
from ztok_fast.codec.emission import (
    HaltingHead,
    fixed_mass,
    mass_floor,
    scale_to_budget,
    surprisal_mass,
    unit_counts,
    unit_lengths,
)
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.passes import encode_documents
from ztok_fast.ops import halting_units

LONGEST = 16


def sections_of(lengths, segment=64):
    segments, counts = split_segments(lengths, segment)
    return offsets(torch.tensor(segments)), offsets(torch.tensor(counts))


@given(st.integers(0, 2**31), st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 7.3, 12.0, 15.0]), st.floats(0, 1.5))
@settings(max_examples=12, deadline=None)
def test_achieved_ratio_is_the_budget_whatever_the_mass(seed, ratio, spread):
    torch.manual_seed(seed)
    cu_segments, cu_sections = sections_of([1024, 640])
    raw = (torch.exp(spread * torch.randn(1664)) / ratio).clamp(mass_floor(LONGEST), 1.0)
    mass = scale_to_budget(raw, torch.tensor([ratio, ratio]), cu_segments, cu_sections, LONGEST)
    units = halting_units(mass, cu_segments)
    per_section = units.cu_units[cu_sections.long()].diff()
    achieved = torch.tensor([1024.0, 640.0]) / per_section
    # At r = 15 the part units at the segments' ends leave little room: 64 tokens are 5 units of at most 16.
    assert torch.all((achieved / ratio - 1).abs() < (0.03 if ratio <= 12 else 0.2)), achieved
    lengths = unit_lengths(units, int(units.cu_units[-1]))
    assert int(lengths.min()) >= 1 and int(lengths.max()) <= LONGEST
    assert lengths.dtype == torch.int32 and int(lengths.sum()) == 1664


def on_the_edge(draw, total, segments):
    """Mass whose sums come close to whole numbers, or reach them, and any mass between."""
    kinds = torch.tensor([0.0, 1.0, 0.5, 0.25, 1 / 3, 0.5 + 2.0**-21, 1 - 2.0**-20, 2.0**-20, 2.0**-22])
    chosen = kinds[torch.randint(len(kinds), (total,), generator=draw)]
    mass = torch.where(torch.rand(total, generator=draw) < 0.5, chosen, torch.rand(total, generator=draw))
    cuts = torch.randint(total + 1, (segments - 1,), generator=draw).sort().values
    return mass, torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).int()


@given(st.integers(0, 2**31), st.integers(0, 60), st.integers(1, 9), st.sampled_from(["f32", "f16", "f64"]))
@settings(max_examples=60, deadline=None)
def test_counts_from_sums_are_those_of_the_op(seed, total, segments, dtype):
    mass, cu = on_the_edge(torch.Generator().manual_seed(seed), total, segments)
    mass = mass.to({"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}[dtype])
    assert torch.equal(unit_counts(mass, cu), halting_units(mass, cu).counts.long())


class OpsCalled(TorchDispatchMode):
    """Names of the ops called while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_one_pass_runs_halting_once(codec):
    with OpsCalled() as called:
        codec.compress(["A small text to compress; " * 8], ratio=3)
    assert called.names.count("ztok::quantize_ragged") == called.names.count("ztok::halting_units") == 1


@pytest.mark.parametrize("longest", [1, 2, 16, 64])
def test_both_ends_of_the_budget_are_reached(longest):
    torch.manual_seed(0)
    cu_segments, cu_sections = sections_of([256])
    raw = torch.rand(256).clamp(mass_floor(longest), 1.0)
    for ratio in (1.0, float(longest)):
        mass = scale_to_budget(raw, torch.tensor([ratio]), cu_segments, cu_sections, longest)
        assert int(halting_units(mass, cu_segments).cu_units[-1]) == pytest.approx(256 / ratio, rel=0.02)


def test_dense_documents_do_not_take_units_from_others():
    cu_segments, cu_sections = sections_of([320, 320])
    raw = torch.cat([torch.full((320,), 0.9), torch.full((320,), 0.1)])
    mass = scale_to_budget(raw, torch.tensor([4.0, 2.0]), cu_segments, cu_sections, LONGEST)
    counts = halting_units(mass, cu_segments).cu_units[cu_sections.long()].diff()
    assert counts.tolist() == pytest.approx([80, 160], abs=5)


def test_dense_tokens_get_shorter_units():
    cu_segments, cu_sections = sections_of([64])
    raw = torch.cat([torch.full((32,), 0.6), torch.full((32,), 0.15)])
    units = halting_units(scale_to_budget(raw, torch.tensor([4.0]), cu_segments, cu_sections, LONGEST), cu_segments)
    dense = int(units.ends[:32].sum())
    assert dense >= 2 * int(units.ends[32:].sum())


@pytest.mark.parametrize(("ratio", "expected"), [(1, {1}), (3, {3}), (2.5, {2, 3}), (16, {16})])
def test_fixed_units_have_the_length_of_the_ratio(ratio, expected):
    tokens = 48
    units = halting_units(fixed_mass(torch.full((tokens,), float(ratio))), torch.tensor([0, tokens]))
    lengths = unit_lengths(units, int(units.cu_units[-1]))
    assert set(lengths[:-1].tolist()) == expected and int(lengths.sum()) == tokens


def test_surprisal_mass_asks_for_the_budget_and_more_where_surprisal_is_high():
    config = tiny_codec(max_unit_length=8).config
    bits = torch.tensor([0.0, 8.0, 4.0, 4.0, 1.0, 3.0])
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    mass = surprisal_mass(bits, torch.full((6,), 2.0), cu, config)
    assert mass[:4].mean().item() == pytest.approx(0.5) and mass[4:].mean().item() == pytest.approx(0.5)
    assert mass[1] > mass[2] == mass[3] > mass[0] and mass[5] > mass[4]


def test_surprisal_mass_of_a_document_without_surprisal_is_even():
    mass = surprisal_mass(torch.zeros(3), torch.full((3,), 4.0), torch.tensor([0, 3]), tiny_codec().config)
    assert len(set(mass.tolist())) == 1


def test_halting_head_starts_at_the_even_mass():
    head = HaltingHead(12)
    mass = head(torch.randn(5, 12), torch.tensor([1.0, 2.0, 4.0, 8.0, 64.0]), 16)
    torch.testing.assert_close(mass, torch.tensor([1.0, 0.5, 0.25, 0.125, mass_floor(16)]))


class TestEncode:
    """Units as the model makes them."""

    def encoded(self, codec, lengths, ratio, **options):
        with torch.no_grad():
            return encode_documents(codec.model, packed_documents(codec, lengths), ratio, **options)

    @pytest.mark.parametrize("ratio", [1.0, 2.0, 3.5, 6.0])
    def test_learned_units_keep_budget_and_bounds(self, codec, ratio):
        encoded = self.encoded(codec, [64, 64, 64, 60], ratio)
        assert 252 / encoded.z.ztokens == pytest.approx(ratio, rel=0.1)
        assert int(encoded.z.unit_lengths.min()) >= 1 and int(encoded.z.unit_lengths.max()) <= 8
        assert int(encoded.z.unit_lengths.sum()) == 252
        if 1 < ratio:
            assert len(set(encoded.z.unit_lengths.tolist())) > 2, (
                "the random halting head should make units of many lengths"
            )

    @pytest.mark.parametrize("lengths", [[1], [16, 17], [3, 50, 64]])
    def test_quantised_units_are_those_of_the_mass(self, codec, lengths):
        # Quantisation integrates an even mass over the units; its halting must end the very same units.
        encoded = self.encoded(codec, lengths, 3.0)
        of_mass = halting_units(encoded.mass, offsets(torch.tensor(split_segments(lengths, 16)[0])))
        assert torch.equal(encoded.quantized.units.ends, of_mass.ends)
        assert (
            torch.equal(encoded.z.cu_segments, of_mass.cu_units) and len(encoded.quantized.codes) == encoded.z.ztokens
        )

    def test_fixed_units_by_argument_and_by_setting(self, codec):
        by_argument = self.encoded(codec, [64], 4.0, fixed_units=True)
        assert by_argument.z.unit_lengths.tolist() == [4] * 16
        fixed = tiny_codec(emission="fixed")
        assert self.encoded(fixed, [64], 4.0).z.unit_lengths.tolist() == [4] * 16
        assert len(set(self.encoded(fixed, [64], 4.0, fixed_units=False).z.unit_lengths.tolist())) > 2


def test_reconstruction_reaches_the_halting_head_through_the_integration_weights():
    codec = tiny_codec(emission="fire")
    encoded = encode_documents(codec.model, packed_documents(codec, [48]), 3.0)
    target = torch.randn_like(encoded.quantized.latents)
    (encoded.quantized.latents * target).sum().backward()
    for parameter in codec.model.halting.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


def test_fixed_units_leave_the_halting_head_alone():
    codec = tiny_codec(emission="fixed")
    encoded = encode_documents(codec.model, packed_documents(codec, [48]), 3.0)
    encoded.quantized.latents.square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in codec.model.halting.parameters())
