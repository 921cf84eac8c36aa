"""A codec's weights on disk: safetensors with adapters, codebooks, projections and heads, nothing of the base."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from ztok_fast.codec import byte_planes
from ztok_fast.codec.config import ZTokConfig

WEIGHTS = "codec.safetensors"
PACKED_WEIGHTS = "codec.packed.safetensors"
"""The same in less space, as codecs in the package are kept (`ztok_fast.codec.byte_planes`)."""


DECODING_SETTINGS = (
    "segment_length",
    "context_segments",
    "section_segments",
    "num_codebooks",
    "codebook_size",
    "max_unit_length",
    "z_position",
    "unit_conditioning",
    "copy_path",
    "lora_alpha",
)
"""Settings that the weights' names and shapes do not show and that change what codes decode to."""

_FORMER_SETTINGS = {"section_segments": "window_segments"}
_FORMER_TENSORS = {"autoregressive.": "serial."}
"""What settings, and the beginnings of tensor names, were called in the first files. Such weights still load, and the
fingerprint is taken over these names, so that files which carry it stay valid."""


class WeightsError(ValueError):
    """Codec weights are missing, damaged or of another codec."""


def save_weights(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Write ``state``, cast to ``dtype`` if given, under `WEIGHTS`."""
    tensors = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    path, packed = Path(folder) / WEIGHTS, Path(folder) / PACKED_WEIGHTS
    if path.is_file():
        packed = path
    if not packed.is_file():
        raise WeightsError(f"codec folder {folder}: expected the weights file {WEIGHTS} or {PACKED_WEIGHTS}, got none")
    try:
        return load_file(path) if packed == path else load(byte_planes.unpack(packed.read_bytes()))
    except (SafetensorError, ValueError, zlib.error) as error:
        raise WeightsError(f"{packed}: expected a whole safetensors file, got {error}") from error


def copy_state(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Copy ``state`` into the tensors of ``own`` by name, after checking every name and shape."""
    former = {_former_name(name): name for name in own}
    state = {former.get(name, name): tensor for name, tensor in state.items()}
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        raise WeightsError(
            f"codec weights: expected the tensors of this codec, got missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise WeightsError(
                f"codec weights {name}: expected shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _former_name(name: str) -> str:
    for current, former in _FORMER_TENSORS.items():
        if name.startswith(current):
            return former + name.removeprefix(current)
    return name


def codec_fingerprint(config: ZTokConfig, state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the settings that matter for decoding and every weight, as 64 hexadecimal digits."""
    digest = hashlib.sha256(config.base_fingerprint.encode())
    for name in DECODING_SETTINGS:
        digest.update(f"{_FORMER_SETTINGS.get(name, name)}={getattr(config, name)};".encode())
    named = {_former_name(name): tensor for name, tensor in state.items()}
    for name in sorted(named):
        tensor = named[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
