"""`compress` and `decompress` of the whole codec: cases, checks, baselines.

The registry imports this module, also where nothing but ops is measured and transformers and PEFT may be absent: what
needs them is imported when a run is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.subject import Baseline, Subject, same
from ztok_fast.ops.spec import Case, Mismatch, Work

RATIO = 4.0
TINY, TINY_SLOTS = "tiny", "tiny-slots"
"""Names of untrained codecs on a random base of two layers, pooled and of slots, written when they are asked for: for
tests."""
SLOT_PASSES = 2
"""Passes that compressing into slots needs at least: one to find what is guessed wrong, one to see that the rest is
right."""


def _cases() -> tuple[Case, ...]:
    def case(codec, documents, characters, smallest):
        return Case({"codec": codec, "documents": documents, "characters": characters}, set=smallest)

    return (
        case(TINY, 3, 60, "tiny"),
        case(TINY_SLOTS, 3, 60, "tiny"),
        case("ztok-mini", 8, 1500, "quick"),
        case("ztok-mini", 1, 1500, "default"),
        case("ztok-mini", 32, 1500, "default"),
        case("ztok-mini", 32, 150, "default"),
        case("ztok-smollm2-135m", 4, 200, "full"),  # two minutes, most of them the baselines'
    )


def _takes_minutes(case: Case) -> str | None:
    """32 long documents one after another take as long as eight do, four times over."""
    if case["documents"] * case["characters"] <= 12_000:
        return None
    return "one after another these documents would take minutes; the cases of fewer and of shorter ones have it"


@dataclass(frozen=True)
class CodecRun(Subject):
    """What both runs share: the documents and the codec."""

    whole = True
    cases = _cases()

    def needs(self, case):
        from bench.codec import files

        return files.missing(case["codec"])

    def make(self, case, generator):
        from bench.codec import files

        # On the CPU whatever the device: the same documents everywhere.
        seed = torch.Generator().manual_seed(generator.initial_seed())
        texts = files.documents(case["documents"], case["characters"], seed)
        codec = files.codec(case["codec"], str(generator.device))
        tokens = codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"texts": texts, "tokens": tokens, "codec": codec, "device": str(generator.device)}


def _adapted_weights(codec, adapter: str) -> tuple[int, int]:
    """Number of weights that every token goes through under an adapter, and width of the attention."""
    weights = 0
    for layer in codec.model.adapted.peft.modules():
        if adapter in getattr(layer, "lora_A", ()):
            parts = (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
            weights += sum(part.weight.numel() for part in parts)
    config = codec.base.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights, config.num_attention_heads * head


def _decompressor_work(codec, sizes) -> tuple[float, float]:
    """Operations and bytes of reading segments once, each given by its tokens and its Z-tokens."""
    weights, width = _adapted_weights(codec, "decompressor")
    layers, head = codec.base.model.config.num_hidden_layers, codec.model.adapted.embedding.weight.numel()
    tokens, both = sum(n for n, _ in sizes), sum(n + k for n, k in sizes)
    attention = sum(2.0 * (n + k) ** 2 * width * layers for n, k in sizes)
    return 2.0 * both * weights + 2.0 * tokens * head + attention, 4.0 * (weights + head) + 8 * tokens


def units_of(z, bounds: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Unit lengths and codes, of slots with their places, of all that is between the offsets ``bounds``."""
    counts = bounds.diff().tolist()
    parts = (own for own in (z.unit_lengths, z.codes, z.slot_offsets) if own is not None)
    return list(zip(*(own.split(counts) for own in parts)))


@dataclass(frozen=True)
class Compress(CodecRun):
    def run(self, case, inputs):
        return inputs["codec"].compress(inputs["texts"], RATIO)

    def check(self, case, inputs, found):
        self.check_baseline(case, inputs, units_of(found, found.cu_ztokens), found.precision)

    def check_baseline(self, case, inputs, answer, precision="float"):
        from bench.codec import oracle

        if inputs["codec"].config.emission == "slots":
            if "expected" not in inputs:
                inputs["expected"] = oracle.expected_names(case["codec"], inputs["device"], inputs["tokens"], RATIO)
            expected = inputs["expected"]
            oracle.check_slots(case["codec"], inputs["device"], inputs["tokens"], expected, answer, RATIO, precision)
            return
        if "expected" not in inputs:
            inputs["expected"] = oracle.expected_units(case["codec"], inputs["device"], inputs["tokens"], RATIO)
        oracle.check_codes(case["codec"], inputs["expected"], answer, precision)

    def work(self, case, inputs):
        codec, config = inputs["codec"], inputs["codec"].config
        if config.emission == "slots":
            sizes = [(len(own), len(own) / RATIO) for own in inputs["tokens"]]
            flops, memory = _decompressor_work(codec, sizes)
            return Work(SLOT_PASSES * flops, memory)
        weights, width = _adapted_weights(codec, "compressor")
        layers, S = codec.model.adapted.compressor_layers, config.segment_length
        tokens = sum(map(len, inputs["tokens"]))
        segments = [min(S, len(own) - i) for own in inputs["tokens"] for i in range(0, len(own), S)]
        attention = sum(2.0 * n * n * width for n in segments) * layers  # scores and values, half of them masked
        units, books = tokens / RATIO, codec.model.codebooks.numel()
        latents = 4.0 * units * config.latent_dim * codec.model.adapted.hidden_size
        return Work(
            2.0 * tokens * weights + attention + 2.0 * units * books + latents, 4.0 * (weights + books) + 8 * tokens
        )


@dataclass(frozen=True)
class Decompress(CodecRun):
    def make(self, case, generator):
        inputs = super().make(case, generator)
        inputs["z"] = inputs["codec"].compress(inputs["texts"], RATIO)
        inputs["segments"] = []
        for document in inputs["z"]:
            inputs["segments"].append(units_of(document, document.cu_segments))
        return inputs

    def run(self, case, inputs):
        return inputs["codec"].decompress(inputs["z"])

    def check(self, case, inputs, found):
        from bench.codec import oracle

        answer = inputs["codec"].decompress_tokens(inputs["z"]), found
        self.check_baseline(case, inputs, answer, inputs["z"].precision)
        oracle.check_steps(inputs["codec"], inputs["z"], answer[0])

    def check_baseline(self, case, inputs, answer, precision="float"):
        """Tokens by the oracle, and texts that are those of the tokens."""
        from bench.codec import oracle

        tokens, texts = answer
        oracle.check_tokens(case["codec"], inputs["device"], inputs["z"], tokens, precision)
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        wanted = [inputs["codec"].tokenizer.decode(own, **settings) for own in tokens]
        if texts != wanted:
            wrong = sum(a != b for a, b in zip(texts, wanted))
            raise Mismatch(f"texts: {wrong} of {len(wanted)} are not those of the tokens")

    def work(self, case, inputs):
        sizes = [(int(own[0].sum()), len(own[0])) for document in inputs["segments"] for own in document]
        return Work(*_decompressor_work(inputs["codec"], sizes))


def _compress(merged: bool):
    def prepare(case, inputs):
        from bench.codec import files
        from ztok_fast.codec import huggingface

        adapter = huggingface.adapter_of("compress", files.folder(case["codec"]))
        parts = files.parts(case["codec"], adapter, merged, inputs["device"])
        return torch.inference_mode()(lambda: huggingface.compress(parts, inputs["texts"], RATIO))

    return prepare


def _decompress(merged: bool, batched: bool):
    def prepare(case, inputs):
        from bench.codec import files
        from ztok_fast.codec import huggingface

        parts = files.parts(case["codec"], "decompressor", merged, inputs["device"])
        return torch.inference_mode()(lambda: huggingface.decompress(parts, inputs["segments"], batched))

    return prepare


PADDED, PADDED_MERGED = "HF + PEFT, padded segments", "HF merged, padded segments"
ONE_BY_ONE, BATCHED, BATCHED_MERGED = "generate, one by one", "generate, batched", "generate, batched, merged"
_MERGED = "the same with the adapter merged into a copy of the base, which then serves {} alone"

COMPRESS = Compress(
    "compress",
    (
        Baseline(PADDED, _compress(False), same,
                 note="transformers (sdpa) under PEFT's LoRA layers, segments as padded rows with an attention mask; "
                 "halting, means and codes, or the closed loop of slots, by plain torch operations"),
        Baseline(PADDED_MERGED, _compress(True), same, note=_MERGED.format("compression")),
    ),
    ("halting_units", "lora_linear", "quantize_ragged"),
)  # fmt: skip
DECOMPRESS = Decompress(
    "decompress",
    (
        Baseline(ONE_BY_ONE, _decompress(False, False), same, refuses=_takes_minutes,
                 note="transformers' `generate` under PEFT's LoRA layers, greedy, key-value cache, one document after "
                 "another, the segments of a document side by side"),
        Baseline(BATCHED, _decompress(False, True), same,
                 note="the same with the segments of all documents side by side, padded on the left"),
        Baseline(BATCHED_MERGED, _decompress(True, True), same, note=_MERGED.format("decompression")),
    ),
    ("lora_linear", "ragged_gather"),
)  # fmt: skip
