"""Packed weights: the original's bytes come back, and damage is an error."""

import zlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ztok_fast.codec.byte_planes import pack, unpack
from ztok_fast.codec.weights import PACKED_WEIGHTS, WeightsError, load_weights

STATE = {"a": torch.randn(33, 7).bfloat16(), "b": torch.randn(1000).half(), "c": torch.empty(0).bfloat16()}


def test_round_trip(tmp_path):
    original = save(STATE)
    assert unpack(pack(original)) == original
    (tmp_path / PACKED_WEIGHTS).write_bytes(pack(original))
    loaded = load_weights(tmp_path)
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)


def test_trained_weights_take_less():
    original = save({"a": (torch.randn(1 << 16) * 0.02).bfloat16()})
    assert len(pack(original)) < 0.75 * len(original)


def test_rounded_mantissas_take_less_still():
    weights = torch.randn(1 << 14) * 0.02
    original = save({"a": weights.bfloat16(), "b": torch.zeros(2).bfloat16()})
    packed = pack(original, 5)
    found = load(unpack(packed))["a"].float()
    assert len(packed) < len(pack(original)) - 0.11 * len(original)
    # Half of the last place of five bits, and the rounding to bfloat16 before.
    assert float(((found - weights).abs() / weights.abs()).max()) <= 2**-6 + 2**-8
    assert pack(original, 7) == pack(original)
    with pytest.raises(ValueError, match="mantissa_bits: expected 1 to 7, got 8"):
        pack(original, 8)
    with pytest.raises(ValueError, match=r"expected weights in bfloat16, got \['BF16', 'F16'\]"):
        pack(save(STATE), 5)


def test_odd_data_is_refused():
    with pytest.raises(ValueError, match="expected numbers of 16 bits"):
        pack(save({"a": torch.zeros(3, dtype=torch.uint8)}))


@pytest.mark.parametrize("at", range(0, 2000, 97))
def test_damage_is_an_error_or_leaves_the_weights(tmp_path, at):
    original = save(STATE)
    packed = bytearray(pack(original))
    packed[at % len(packed)] ^= 0x55
    try:
        found = unpack(bytes(packed))
    except (ValueError, zlib.error, SafetensorError):
        pass
    else:
        data = 8 + int.from_bytes(original[:8], "little")
        assert found[data:] == original[data:]
    for length in (0, 7, len(packed) // 2):
        (tmp_path / PACKED_WEIGHTS).write_bytes(bytes(packed[:length]))
        with pytest.raises(WeightsError, match="expected a whole safetensors file"):
            load_weights(tmp_path)
