import pytest
import torch

from ztok_fast.train.precision import autocast_dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_precision_is_taken_everywhere(device):
    assert autocast_dtype("bfloat16", device) is torch.bfloat16
    assert autocast_dtype("float32", device) is None


@pytest.mark.parametrize(
    ("device", "amx", "avx512", "expected"),
    [
        ("cpu", False, False, None),
        ("cpu", True, False, torch.bfloat16),
        ("cpu", False, True, torch.bfloat16),
        ("cuda", False, False, torch.bfloat16),
    ],
)
def test_auto_asks_the_processor(monkeypatch, device, amx, avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert autocast_dtype("auto", device) is expected


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision: expected one of auto, bfloat16, float32, got 'half'"):
        autocast_dtype("half")
