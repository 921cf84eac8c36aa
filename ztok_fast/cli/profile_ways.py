"""What `ztok bench` runs: the codec on the user's documents, and the same work without this package."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ztok_fast.cli import common, profile_machine
from ztok_fast.codec import huggingface
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.huggingface_slots import named_tokens
from ztok_fast.codec.passes import BATCH_TOKENS, batches
from ztok_fast.codec.text import detokenize
from ztok_fast.codec.zbatch import ZBatch

OURS = "ztok_fast"
ONE_BY_ONE, BATCHED, MERGED = "HF + PEFT, one by one", "HF + PEFT, batched", "HF, adapter merged, batched"
LLAMA_CPP = "llama.cpp, Q8_0"
MOST_BYTES_OF_A_TOKEN = 64
WARM_UP_CHARACTERS = 300

Answer = list[Any]
"""What the ways are compared by: unit codes of the sections (of slots, the tokens that they name, by place in the
text), tokens of the documents, or new codes."""


@dataclass
class Work:
    """What is to be done, and how much it is.

    Attributes:
        amount: tokens that it counts as, of the kind `unit`.
        texts: for compress; z: for the others.
    """

    command: str
    codec: ZTokCodec
    amount: int
    unit: str
    ratio: float
    new: int
    texts: list[str] = field(default_factory=list)
    z: ZBatch | None = None

    @property
    def documents(self) -> int:
        return len(self.texts) if self.z is None else len(self.z)

    @property
    def segments(self) -> int | None:
        """How many segments decompress writes; None for the other commands."""
        return len(self.z.cu_segments) - 1 if self.command == "decompress" and self.z is not None else None

    def small(self) -> Work:
        """A little of it, to warm up with."""
        texts = [text[:WARM_UP_CHARACTERS] for text in self.texts[:1]]
        return Work(self.command, self.codec, 0, self.unit, self.ratio, 2, texts, None if self.z is None else self.z[0])


@dataclass
class Way:
    """One way to do the work; `run` gives the time that it took and keeps the answer."""

    name: str
    call: Callable[[Work], Answer]
    samples: list[float] = field(default_factory=list)
    memory: int = 0
    answer: Answer = field(default_factory=list)

    def run(self, work: Work) -> None:
        before = profile_machine.memory("VmRSS")
        profile_machine.reset_peak()
        start = time.perf_counter()
        self.answer = self.call(work)
        self.samples.append(time.perf_counter() - start)
        self.memory = max(self.memory, profile_machine.memory("VmHWM") - before)

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


def take_turns(ways: Sequence[Way], work: Work, seconds: float) -> int:
    """Run all of them in turns for about so long, each at least once; returns the number of rounds."""
    rounds, start = 0, time.perf_counter()
    while not rounds or (time.perf_counter() - start) * (rounds + 1) / rounds <= seconds:
        for way in ways if rounds % 2 == 0 else reversed(ways):
            way.run(work)
        rounds += 1
    return rounds


# The work


def read_work(options, codec: ZTokCodec) -> Work:
    """The documents of the files that are named, their first `--tokens` tokens."""
    batch_files = [name for name in options.files if name.endswith(".ztok")]
    if options.what == "compress" and batch_files:
        raise common.UsageError(f"{batch_files[0]}: expected a text to compress, got Z-tokens")
    if batch_files and len(batch_files) != len(options.files):
        raise common.UsageError(
            f"files: expected texts or .ztok files, got both ({batch_files[0]} is one of the latter)"
        )
    ratio = codec.config.check_ratio(options.ratio)
    if batch_files:
        z = _first_documents([common.load_batch(name, options) for name in batch_files], options.tokens)
    else:
        texts = read_texts(codec, options.files, options.tokens)
        if options.what == "compress":
            amount = sum(map(len, codec.tokenize(texts)))
            return Work("compress", codec, amount, "tokens", ratio, options.max_new_ztokens, texts)
        z = codec.compress(texts, ratio)
    amount, unit = (
        (z.tokens, "tokens") if options.what == "decompress" else (len(z) * options.max_new_ztokens, "Z-tokens")
    )
    if not z.ztokens:
        raise common.UsageError(f"{', '.join(options.files)}: expected at least one Z-token, got none")
    return Work(options.what, codec, amount, unit, ratio, options.max_new_ztokens, z=z)


def read_texts(codec: ZTokCodec, files: Sequence[str], limit: int) -> list[str]:
    """The text files, up to `limit` tokens of all of them together; empty ones are left out."""
    texts, left = [], limit
    for name in files:
        data = common.read_bytes(name)[: left * MOST_BYTES_OF_A_TOKEN]
        tokens = codec.tokenize([data.decode("utf-8", "replace")])[0][:left]
        left -= len(tokens)
        if len(tokens):
            texts.append(detokenize(codec.tokenizer, tokens).decode("utf-8", "replace"))
        if not left:
            break
    if not texts:
        raise common.UsageError(f"{', '.join(files)}: expected at least one token of text, got none")
    return texts


def _first_documents(found: Sequence[ZBatch], limit: int) -> ZBatch:
    """Whole documents, at least one, up to `limit` tokens; those that are stored raw are left out."""
    kept: list[ZBatch] = []
    left = limit
    for document in (own for z in found for own in z):
        corrections = document.documents[0].corrections
        if not document.ztokens or (corrections is not None and corrections.raw is not None):
            continue
        if kept and document.tokens > left:
            break
        kept.append(document)
        left -= document.tokens
    if not kept:
        raise common.UsageError("files: expected at least one document with Z-tokens, got none")
    return ZBatch.concatenate(kept)


# The codec


def ours(work: Work) -> Answer:
    """What a user calls."""
    codec = work.codec
    if work.z is None:
        z = codec.compress(work.texts, work.ratio)
        return _said(_units(z.sections(codec.config.section_segments)[0]))
    if work.command == "decompress":
        codec.decompress_bytes(work.z)
        return []
    # Of slots also their places, as `huggingface.continue_ztokens` has them.
    return [torch.cat(own[1:], 1) for own in _units(codec.generate(work.z, work.new, end_threshold=1.0))]


def our_answer(work: Work) -> Answer:
    """As `ours`, in the form that ways are compared in."""
    return work.codec.decompress_tokens(work.z) if work.command == "decompress" and work.z is not None else ours(work)


def _units(z) -> list[huggingface.Coded]:
    """The Z-tokens of every document."""
    counts = z.cu_ztokens.diff().tolist()
    parts = (own for own in (z.unit_lengths, z.codes, z.slot_offsets) if own is not None)
    return list(zip(*(own.split(counts) for own in parts)))


def _said(documents: Sequence[huggingface.Coded]) -> Answer:
    """What compressing is compared by."""
    # Slots by the place in the text: one unit more would shift all codes after it.
    return [named_tokens(*own) if len(own) == 3 else own[1] for own in documents]


# Without this package


def baselines(work: Work, folder: Path, base_name: str | None) -> tuple[list[Way], list[str]]:
    """The ways of Hugging Face and PEFT, and sentences about those that cannot run."""
    if work.z is not None and any(own.levels != work.codec.config.num_codebooks for own in work.z.documents):
        return [], ["Hugging Face + PEFT: left out, the files do not have all residual levels"]
    try:
        adapter = huggingface.adapter_of(work.command, folder)
        layered, merged = (
            huggingface.load(folder, _fresh_base(folder, base_name), adapter, merge, "cpu") for merge in (False, True)
        )
    except CodecError as error:
        return [], [f"Hugging Face + PEFT: left out, {error}"]
    plan = ((ONE_BY_ONE, layered, False), (BATCHED, layered, True), (MERGED, merged, True))
    return [Way(name, _baseline(parts, batched)) for name, parts, batched in plan], []


def _fresh_base(folder: Path, name: str | None) -> BaseModel:
    """The codec's base without adapters, found as `ZTokCodec.from_pretrained` finds it."""
    config = ZTokConfig.load(folder)
    own = str(folder / "base") if (folder / "base").is_dir() else config.base_model
    return load_base(name or own, expected_fingerprint=config.base_fingerprint or None)


def _baseline(parts: huggingface.Parts, batched: bool) -> Callable[[Work], Answer]:
    @torch.inference_mode()
    def call(work: Work) -> Answer:
        if work.z is None:
            return _compress(parts, work, batched)
        if work.command == "decompress":
            segments = [_units(_by_segment(document)) for document in work.z]
            return huggingface.decompress(parts, segments, batched)[0]
        documents = _units(work.z)
        if batched:
            return huggingface.continue_ztokens(parts, documents, work.new)
        return [codes for own in documents for codes in huggingface.continue_ztokens(parts, [own], work.new)]

    return call


class _by_segment:
    """A document's Z-tokens, with its segments in the place of documents."""

    def __init__(self, document: ZBatch) -> None:
        self.codes, self.unit_lengths, self.cu_ztokens = document.codes, document.unit_lengths, document.cu_segments
        self.slot_offsets = document.slot_offsets


def _compress(parts: huggingface.Parts, work: Work, batched: bool) -> Answer:
    limit, found = parts.config.section_tokens, []
    documents = parts.tokenizer(work.texts, add_special_tokens=False, verbose=False)["input_ids"]
    for own in [documents] if batched else [[document] for document in documents]:
        sections = [tokens[i : i + limit] for tokens in own for i in range(0, len(tokens), limit)]
        for batch in batches([len(section) for section in sections], BATCH_TOKENS):
            found += huggingface.compress_tokens(parts, [sections[i] for i in batch], work.ratio)
    return _said(found)


def llama_cpp(work: Work, gguf: str | None) -> tuple[list[Way], list[str]]:
    """llama.cpp on the base alone: it reads or writes as many text tokens, segment by segment, without Z-tokens."""
    if work.command == "generate":
        return [], ["llama.cpp: left out, it has no Z-space"]
    names = f"{work.codec.base.name} {work.codec.config.base_model}".lower()
    if "smollm2" not in names:
        return [], ["llama.cpp: left out, the base model is not SmolLM2"]
    if importlib.util.find_spec("llama_cpp") is None:
        return [], ["llama.cpp: left out, llama-cpp-python is not installed"]
    if gguf is None:
        return [], ["llama.cpp: left out, --gguf names no Q8_0 file of the base model"]
    from llama_cpp import Llama

    size = work.codec.config.segment_length
    try:
        model = Llama(model_path=gguf, n_ctx=size + 8, n_threads=torch.get_num_threads(), verbose=False)
    except (ValueError, RuntimeError) as error:
        raise common.UsageError(f"--gguf {gguf}: llama.cpp cannot load it: {error}") from error

    def call(work: Work) -> Answer:
        if work.z is None:
            for tokens in work.codec.tokenize(work.texts):
                for start in range(0, len(tokens), size):
                    model.reset()
                    model.eval(list(tokens[start : start + size]))
            return []
        for length in work.z.cu_text.diff().tolist():
            model.reset()
            model.eval([model.token_bos()])
            for _ in range(length - 1):
                model.eval([model.sample(temp=0.0)])
        return []

    return [Way(LLAMA_CPP, call)], []


def agreement(ours: Answer, other: Answer) -> float | None:
    """The share of equal tokens or codes, in their places; None where nothing can be compared."""
    if not other or len(ours) != len(other):
        return None
    same = total = 0
    for own, found in zip(ours, other):
        a, b = torch.as_tensor(own).long(), torch.as_tensor(found).long()
        total += a.numel()
        same += int((a == b).sum()) if a.shape == b.shape else 0
    return same / total if total else None
