"""`compress` and `decompress` as entries of the benchmark: cases, contenders, checks.

The registry imports this module, also where nothing but ops is measured and transformers and PEFT may be absent: what
needs them is imported when a run is made.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from bench.micro.case import Case, Mismatch, Op, Peer, Work

if TYPE_CHECKING:
    from ztok_fast.codec.zbatch import ZBatch

RATIO = 4.0
TINY = "tiny"
"""Name of an untrained codec on a random base of two layers, written when it is asked for: for tests."""


def _cases(op: str) -> tuple[Case, ...]:
    found = []

    def add(codec, documents, characters, smallest):
        shape = {"codec": codec, "documents": documents, "characters": characters}
        found.append(Case(op, shape, set=smallest))

    add(TINY, 3, 60, "tiny")
    add("ztok-mini", 8, 1500, "quick")
    add("ztok-mini", 1, 1500, "default")
    add("ztok-mini", 32, 1500, "default")
    add("ztok-mini", 32, 150, "default")
    if op == "compress":
        add("ztok-smollm2-135m", 4, 600, "default")
    else:
        add("ztok-smollm2-135m", 4, 200, "full")  # two minutes, most of them `generate`
    return tuple(found)


def _takes_minutes(case: Case) -> str | None:
    """32 long documents one after another take as long as eight do, four times over."""
    if case["documents"] * case["characters"] <= 12_000:
        return None
    return "one after another these documents would take minutes; the cases of fewer and of shorter ones have it"


def needs(case: Case) -> str | None:
    """Why a case cannot be run here, None when it can."""
    from bench.codec import files

    return files.missing(case["codec"])


def _documents(case: Case, device: torch.device, generator: torch.Generator) -> dict:
    from bench.codec import files

    # On the CPU whatever the device: the same documents everywhere.
    seed = torch.Generator().manual_seed(generator.initial_seed())
    texts = files.documents(case["documents"], case["characters"], seed)
    codec = files.codec(case["codec"], str(device))
    tokens = codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {"texts": texts, "tokens": tokens, "codec": codec, "device": str(device)}


def _adapted_weights(codec, adapter: str) -> tuple[int, int]:
    """Number of weights that every token goes through under an adapter, and width of the attention."""
    weights = 0
    for layer in codec.model.adapted.peft.modules():
        if adapter in getattr(layer, "lora_A", ()):
            weights += layer.base_layer.weight.numel() + layer.lora_A[adapter].weight.numel()
            weights += layer.lora_B[adapter].weight.numel()
    config = codec.base.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights, config.num_attention_heads * head


# compress


def make_compress(case, device, generator):
    return _documents(case, device, generator)


def run_compress(case, inputs) -> ZBatch:
    return inputs["codec"].compress(inputs["texts"], RATIO)


def _units(z: ZBatch):
    bounds = z.cu_ztokens.diff().tolist()
    return list(zip(z.unit_lengths.split(bounds), z.codes.split(bounds)))


def check_compress_peer(case, inputs, found) -> None:
    from bench.codec import oracle

    if "expected" not in inputs:
        inputs["expected"] = oracle.expected_units(case["codec"], inputs["device"], inputs["tokens"], RATIO)
    oracle.check_codes(case["codec"], inputs["expected"], found)


def check_compress(case, inputs, z) -> None:
    check_compress_peer(case, inputs, _units(z))


def work_compress(case, inputs) -> Work:
    codec, config = inputs["codec"], inputs["codec"].config
    weights, width = _adapted_weights(codec, "compressor")
    layers, S = codec.model.adapted.compressor_layers, config.segment_length
    tokens = sum(map(len, inputs["tokens"]))
    segments = [min(S, len(own) - i) for own in inputs["tokens"] for i in range(0, len(own), S)]
    attention = sum(2.0 * n * n * width for n in segments) * layers  # scores and values, half of them masked
    units = tokens / RATIO
    books = codec.model.codebooks.numel()
    latents = 4.0 * units * config.latent_dim * codec.model.adapted.hidden_size
    flops = 2.0 * tokens * weights + attention + 2.0 * units * books + latents
    return Work(flops, 4.0 * (weights + books) + 8 * tokens)


def _compress_peer(merged: bool, tight: bool, case, inputs):
    from bench.codec import huggingface

    parts = huggingface.load(case["codec"], "compressor", merged, inputs["device"])
    texts = inputs["texts"]
    return torch.inference_mode()(lambda: huggingface.compress(parts, texts, RATIO, tight))


PADDED, TIGHT, TIGHT_MERGED = "HF + PEFT, padded documents", "HF + PEFT, padded segments", "HF merged, padded segments"

COMPRESS = Op(
    "compress",
    _cases("compress"),
    make_compress,
    lambda inputs: None,
    run_compress,
    check_compress,
    work_compress,
    check_compress_peer,
    (
        Peer(
            PADDED,
            functools.partial(_compress_peer, False, False),
            lambda found: found,
            note="transformers (sdpa) under PEFT's LoRA layers, every document padded to the longest, attention mask; "
            "halting, means and codes by plain torch operations",
        ),
        Peer(
            TIGHT,
            functools.partial(_compress_peer, False, True),
            lambda found: found,
            note="the same with segments and not documents as padded rows, which this codec's independent segments "
            "allow",
        ),
        Peer(
            TIGHT_MERGED,
            functools.partial(_compress_peer, True, True),
            lambda found: found,
            note="the same with the adapter merged into a copy of the base, which then serves compression alone",
        ),
    ),
    companions=("halting_units", "lora_linear", "quantize_ragged"),
    needs=needs,
    whole=True,
)


# decompress


def make_decompress(case, device, generator):
    inputs = _documents(case, device, generator)
    codec = inputs["codec"]
    inputs["z"] = z = codec.compress(inputs["texts"], RATIO)
    inputs["segments"] = []
    for document in z:
        bounds = document.cu_segments.diff().tolist()
        inputs["segments"].append(list(zip(document.unit_lengths.split(bounds), document.codes.split(bounds))))
    return inputs


def run_decompress(case, inputs) -> list[str]:
    return inputs["codec"].decompress(inputs["z"])


def check_decompress_peer(case, inputs, found) -> None:
    """Tokens by the oracle, and texts that are those of the tokens."""
    from bench.codec import oracle

    tokens, texts = found
    oracle.check_tokens(case["codec"], inputs["device"], inputs["z"], tokens)
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    wanted = [inputs["codec"].tokenizer.decode(own, **settings) for own in tokens]
    if texts != wanted:
        wrong = sum(a != b for a, b in zip(texts, wanted))
        raise Mismatch(f"texts: {wrong} of {len(wanted)} are not those of the tokens")


def check_decompress(case, inputs, texts) -> None:
    check_decompress_peer(case, inputs, (inputs["codec"].decompress_tokens(inputs["z"]), texts))


def work_decompress(case, inputs) -> Work:
    codec = inputs["codec"]
    weights, width = _adapted_weights(codec, "decompressor")
    layers = codec.base.model.config.num_hidden_layers
    head = codec.model.adapted.embedding.weight.numel()
    tokens, prefix, attention = 0, 0, 0.0
    for own in inputs["segments"]:
        for lengths, _ in own:
            n, k = int(lengths.sum()), len(lengths)
            tokens, prefix = tokens + n, prefix + k
            attention += 2.0 * (n + k) ** 2 * width * layers
    flops = 2.0 * (tokens + prefix) * weights + 2.0 * tokens * head + attention
    return Work(flops, 4.0 * (weights + head) + 8 * tokens)


def _decompress_peer(merged: bool, batched: bool, case, inputs):
    from bench.codec import huggingface

    parts = huggingface.load(case["codec"], "decompressor", merged, inputs["device"])
    segments = inputs["segments"]
    return torch.inference_mode()(lambda: huggingface.decompress(parts, segments, batched))


ONE_BY_ONE, BATCHED, BATCHED_MERGED = "generate, one by one", "generate, batched", "generate, batched, merged"

DECOMPRESS = Op(
    "decompress",
    _cases("decompress"),
    make_decompress,
    lambda inputs: None,
    run_decompress,
    check_decompress,
    work_decompress,
    check_decompress_peer,
    (
        Peer(
            ONE_BY_ONE,
            functools.partial(_decompress_peer, False, False),
            lambda found: found,
            note="transformers' `generate` under PEFT's LoRA layers, greedy, key-value cache, one document after "
            "another, the segments of a document side by side",
            refuses=_takes_minutes,
        ),
        Peer(
            BATCHED,
            functools.partial(_decompress_peer, False, True),
            lambda found: found,
            note="the same with the segments of all documents side by side, padded on the left",
        ),
        Peer(
            BATCHED_MERGED,
            functools.partial(_decompress_peer, True, True),
            lambda found: found,
            note="the same with the adapter merged into a copy of the base, which then serves decompression alone",
        ),
    ),
    companions=("lora_linear", "ragged_gather"),
    needs=needs,
    whole=True,
)
