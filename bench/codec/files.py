"""What the runs work on: codecs by name, and documents cut from the text that ships with the repository."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from bench.codec.runs import TINY, TINY_SLOTS
from bench.machine import ROOT
from bench.tiny import SLOTS, write_texts, write_tiny_codec
from ztok_fast.codec import huggingface
from ztok_fast.codec.base_model import BaseModel, BaseModelError, load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.shipped import MODELS
from ztok_fast.ops.spec import mixed_lengths

TEXTS = ("ztok_fast/data/demo.txt", "tests/data/unseen.txt")


@functools.cache
def text() -> str:
    """The texts that ship, one after another: about 6,700 characters of English prose."""
    return "\n".join((ROOT / name).read_text(encoding="utf-8").strip() for name in TEXTS)


def documents(count: int, longest: int, generator: torch.Generator) -> list[str]:
    """Cut `count` documents of mixed lengths, up to `longest` characters, at random places of the text.

    Raises:
        ValueError: the text is shorter than `longest`.
    """
    whole = text()
    if longest >= len(whole):
        raise ValueError(f"documents: longest must be below the {len(whole)} characters of the text, got {longest}")
    cut = []
    for length in mixed_lengths(count, longest, generator):
        first = int(torch.randint(0, len(whole) - length, (), generator=generator, device=generator.device))
        cut.append(whole[first : first + length])
    return cut


@functools.cache
def folder(name: str) -> Path:
    """The codec's folder: one that ships, or that of a tiny codec, made now."""
    if name not in (TINY, TINY_SLOTS):
        return MODELS / name
    scratch = tempfile.TemporaryDirectory()
    _KEPT.append(scratch)
    settings = SLOTS if name == TINY_SLOTS else {}
    return write_tiny_codec(Path(scratch.name) / name, write_texts(Path(scratch.name) / "texts.jsonl"), **settings)


_KEPT: list[tempfile.TemporaryDirectory] = []


@functools.cache
def missing(name: str) -> str | None:
    """Why a codec cannot be loaded here (its base is not installed); None when it can."""
    try:
        base(name)
    except BaseModelError as error:
        return str(error).splitlines()[-1]
    return None


def base(name: str) -> BaseModel:
    """The codec's base model, loaded afresh: plain Hugging Face, float32, on the CPU.

    Raises:
        BaseModelError: it is not on this machine.
    """
    config, own = ZTokConfig.load(folder(name)), folder(name) / "base"
    name_or_folder = str(own) if own.is_dir() else config.base_model
    return load_base(name_or_folder, expected_fingerprint=config.base_fingerprint or None)


@functools.cache
def codec(name: str, device: str) -> ZTokCodec:
    """The codec as a user loads it."""
    return ZTokCodec.from_pretrained(folder(name)).to(device)


@functools.cache
def parts(name: str, adapter: str, merged: bool, device: str) -> huggingface.Parts:
    """The codec for the baselines: one of its adapters on a base of its own."""
    return huggingface.load(folder(name), base(name), adapter, merged, device)
