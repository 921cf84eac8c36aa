"""The codec as one writes it without this library: Hugging Face and PEFT layers, padded batches, plain torch.

It reads the same files and follows the same definitions (`ztok_fast.codec.pooled_model`, or with `huggingface_slots`
`ztok_fast.codec.slot_model`), but runs none of this package's ops, attention or decoding. Only what the shipped codecs
use is written here; others are refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from ztok_fast.codec import huggingface_slots as slots
from ztok_fast.codec.base_model import BaseModel
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.emission import SEGMENT_SPREAD, mass_floor
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.huggingface_slots import unit_ends
from ztok_fast.codec.pooled_model import COPY_LOGIT
from ztok_fast.codec.weights import load_weights
from ztok_fast.ops.quantize.reference import RMS_EPS

BISECTIONS = 16
ROWS = 128
"""Segments that are decoded side by side at most, as in `ZTokCodec.decompress`."""

Coded = tuple[Tensor, ...]
"""Z-tokens without padding: unit lengths `[K]`, codes `[K, L]`, and for slots their places `[K, L]`."""


@dataclass
class Parts:
    """A base under one adapter, and the codec's own weights by name."""

    config: ZTokConfig
    model: Any
    tokenizer: Any
    weights: dict[str, Tensor]

    @property
    def slots(self) -> bool:
        return self.config.emission == "slots"


def adapter_of(command: str, folder: Path) -> str:
    """The adapter that a codec runs "compress", "decompress" or "generate" with."""
    # What is written into slots follows from what the decompressor would guess.
    compressor = "decompressor" if ZTokConfig.load(folder).emission == "slots" else "compressor"
    return {"compress": compressor, "decompress": "decompressor", "generate": "inferencer"}[command]


def load(folder: Path, base: BaseModel, adapter: str, merged: bool, device: str) -> Parts:
    """One of a codec's adapters on its base, as PEFT layers, or merged into the base's weights.

    Args:
        folder: of the codec; base: loaded for this call alone, which changes it.

    Raises:
        CodecError: a codec with settings, or a base of a kind, that are not written here.
    """
    config = ZTokConfig.load(folder)
    if config.emission not in ("fire", "slots"):
        raise CodecError(f"codec {folder.name}: emission must be 'fire' or 'slots', got {config.emission!r}")
    settings = {"context_segments": 0, "z_position": "start", "unit_conditioning": True}
    for setting, wanted in settings.items():
        if getattr(config, setting) != wanted:
            raise CodecError(f"codec {folder.name}: {setting} must be {wanted!r}, got {getattr(config, setting)!r}")
    if not hasattr(base.model, "model") or not hasattr(base.model.model, "layers"):
        raise CodecError(f"base model {base.name}: expected one built as Llama is, got {type(base.model).__name__}")
    weights = load_weights(folder)
    decoder = base.model.model
    if adapter == "compressor" and config.compressor_layers:
        decoder.layers = decoder.layers[: config.compressor_layers]
    linear = [n for n, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)]
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=[f"layers.{n}" for n in linear])
    peft = get_peft_model(base.model, lora, adapter_name=adapter)
    with torch.no_grad():
        for parameter_name, parameter in peft.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(weights[f"adapters.{parameter_name}"])
    model = peft.merge_and_unload() if merged else peft.get_base_model()
    model = model.to(device).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # as many tokens as are asked for, whatever they are
    own = {key: value.float().to(device) for key, value in weights.items() if not key.startswith("adapters.")}
    return Parts(config, model, base.tokenizer, own)


def compress(parts: Parts, texts: Sequence[str], ratio: float) -> list[Coded]:
    """As `compress_tokens`, of texts."""
    return compress_tokens(parts, parts.tokenizer(list(texts), add_special_tokens=False)["input_ids"], ratio)


def compress_tokens(parts: Parts, documents: Sequence[Sequence[int]], ratio: float) -> list[Coded]:
    """Compress documents in one batch whose rows are their segments, the last ones of documents padded.

    Args:
        documents: the tokens of each, at most one section.

    Returns:
        the Z-tokens of every document, on the CPU.
    """
    config, weights, device = parts.config, parts.weights, parts.model.device
    S, B = config.segment_length, len(documents)
    most = max(-(-len(d) // S) for d in documents)
    ids = torch.zeros(B, most * S, dtype=torch.int64)
    lengths = torch.tensor([len(d) for d in documents])
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document, dtype=torch.int64)
    valid = torch.arange(most * S) < lengths[:, None]
    ids, valid = ids.to(device).view(-1, S), valid.to(device).view(-1, S)
    document_of_row = torch.arange(B, device=device).repeat_interleave(most)
    index = torch.arange(most, device=device).repeat(B)  # of the segment in its document
    used = valid.any(1)
    ids, valid, document_of_row, index = ids[used], valid[used], document_of_row[used], index[used]

    if parts.slots:
        z = slots.choose(parts, slots.Segments(ids, valid, document_of_row, slots.said(parts, ids)), ratio)
        return [z.of_rows(document_of_row == document) for document in range(B)]

    embeds = parts.model.get_input_embeddings()(ids)
    budget = torch.tensor([1.0, math.log2(ratio) - 1], device=device)
    positions = torch.arange(S, device=device).expand_as(ids)
    hidden = parts.model.model(
        inputs_embeds=embeds + budget @ weights["budget_embedding"],
        attention_mask=valid.long(),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state

    linear, silu = nn.functional.linear, nn.functional.silu
    density = silu(linear(hidden, weights["halting.hidden.weight"], weights["halting.hidden.bias"]))
    density = linear(density, weights["halting.out.weight"], weights["halting.out.bias"])
    floor = mass_floor(config.max_unit_length)
    mass = (density[..., 0].clamp(-4, 4).exp() / ratio).clamp(floor, 1.0)
    last = valid & ~torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    wanted = (lengths.to(device) / ratio).clamp(min=1.0)
    factor = (1 + SEGMENT_SPREAD * ((index * 0.6180339887) % 1 - 0.5))[:, None]
    spread = mass * factor
    low = torch.full((B,), -max(4.0, math.log2(config.max_unit_length)), device=device)
    high = -low
    for _ in range(BISECTIONS):  # the most units that the budget allows each document
        middle = (low + high) / 2
        ends = unit_ends((spread * middle.exp2()[document_of_row, None]).clamp(floor, 1.0) * valid, last)
        over = torch.zeros(B, device=device).index_add_(0, document_of_row, ends.sum(1).float()) > wanted
        high, low = torch.where(over, middle, high), torch.where(over, low, middle)
    # In the order of the definition: rounding decides where a unit ends.
    scale = factor * low.exp2()[document_of_row, None]
    ends = unit_ends((mass * scale).clamp(floor, 1.0) * valid, last)

    # From here on without padding.
    ended = ends[valid]
    unit = ended.cumsum(0) - ended.long()
    length = torch.bincount(unit)
    offset = torch.arange(len(unit), device=device) - (length.cumsum(0) - length)[unit]
    gate = weights["binding"][(length[unit] - 1) * config.max_unit_length + offset]
    words = nn.functional.normalize(embeds[valid], dim=-1) * embeds.shape[-1] ** 0.5
    rows = (weights["hidden_gain"] * hidden[valid] + weights["embedding_gain"] * words) * gate
    sums = rows.new_zeros(len(length), rows.shape[1]).index_add_(0, unit, rows)
    means = sums / length[:, None]
    latents = rows[ended] @ weights["end_projection"].T + means @ weights["mean_projection"].T
    residual = latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + RMS_EPS)
    codes = []
    for book in weights["codebooks"]:
        code = torch.addmm(book.square().sum(1), residual, book.T, alpha=-2).argmin(1)
        residual = residual - book[code]
        codes.append(code)
    of_document = torch.zeros(B, dtype=torch.int64, device=device).index_add_(0, document_of_row, ends.sum(1)).tolist()
    return list(zip(length.cpu().split(of_document), torch.stack(codes, 1).cpu().split(of_document)))


class _Conditioning:
    """Gives the base's decoder stack, by forward hooks, what `generate` has no argument for: positions of the prefix,
    the conditioning of each text row on its unit, and the bias of the logits, added to the last hidden states."""

    def __init__(self, parts: Parts, positions: Tensor, conditioning: Tensor, logit_bias: Tensor | None) -> None:
        self.parts, self.positions, self.column = parts, positions, 0
        self.conditioning, self.logit_bias = conditioning, logit_bias

    def __enter__(self) -> _Conditioning:
        stack, before = self.parts.model.model, self._before
        hooks = stack.register_forward_pre_hook(before, with_kwargs=True), stack.register_forward_hook(self._after)
        self._hooks = hooks
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module, args, kwargs):
        if self.column == 0:
            kwargs["position_ids"] = self.positions
        else:
            row = self.parts.model.get_input_embeddings()(kwargs["input_ids"])
            kwargs |= {"input_ids": None, "inputs_embeds": row + self.conditioning[:, self.column, None]}
            kwargs["position_ids"] = torch.full_like(self.positions[:, :1], self.column)
        return args, kwargs

    def _after(self, module, args, output):
        if self.logit_bias is not None:
            last = output.last_hidden_state[:, -1:] + self.logit_bias[:, self.column, None]
            output.last_hidden_state = last
        self.column += 1
        return output


def _padded(rows: Tensor, bounds: list[tuple[int, int]], left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence([rows[a:b] for a, b in bounds], batch_first=True, padding_side=side)


def _slot_rows(parts: Parts, segments: Sequence[Coded]) -> tuple[Tensor, Tensor, Tensor]:
    """Of segments with slots: Z embeddings, conditioning `[B, S, D]` of the text rows, and named tokens `[B, S]`."""
    lengths, codes, places = (torch.cat(own).long().to(parts.model.device) for own in zip(*segments))
    bounds = _bounds([int(own[0].sum()) for own in segments])
    named = slots.named_tokens(lengths, codes, places)
    padded = nn.utils.rnn.pad_sequence([named[a:b] for a, b in bounds], batch_first=True, padding_value=-1)
    conditioning = slots.conditioning(parts, padded >= 0, slots.said(parts, padded.clamp(min=0)))
    return slots.embed(parts, codes, places), conditioning, padded


def _pooled_rows(parts: Parts, segments: Sequence[Coded]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of segments with pooled units: Z embeddings, and conditioning and logit bias of the text rows `[B, S, D]`."""
    config, weights, device = parts.config, parts.weights, parts.model.device
    length, codes = (torch.cat(own).long().to(device) for own in zip(*segments))
    text_bounds = _bounds([int(own[0].sum()) for own in segments])
    vectors = sum(book[code] for book, code in zip(weights["codebooks"], codes.T))
    embeddings = vectors @ weights["z_projection.weight"].T + weights["z_projection.bias"]
    embeddings = embeddings + weights["length_embedding.weight"][length]
    unit = torch.arange(len(length), device=device).repeat_interleave(length)
    offset = torch.arange(len(unit), device=device) - (length.cumsum(0) - length)[unit]
    unbound = embeddings[unit] * weights["unbinding"][(length[unit] - 1) * config.max_unit_length + offset]
    conditioning, logit_bias = unbound + weights["offset_embedding.weight"][offset], None
    if config.copy_path:
        rms = parts.model.get_input_embeddings().weight.float().pow(2).mean().sqrt().item()
        conditioning = weights["copy_gains"][1] * unbound + weights["offset_embedding.weight"][offset]
        logit_bias = (COPY_LOGIT / (rms**2 * unbound.shape[1])) * weights["copy_gains"][0] * unbound
        logit_bias = _padded(logit_bias, text_bounds)
    return embeddings, _padded(conditioning, text_bounds), logit_bias


def write_segments(parts: Parts, segments: Sequence[Coded]) -> list[list[int]]:
    """The text tokens of segments, given by their Z-tokens, by one call of `generate`."""
    weights, model = parts.weights, parts.model
    device, logit_bias, forced = model.device, None, []
    if parts.slots:
        embeddings, conditioning, named = _slot_rows(parts, segments)
        forced = [slots.Forced(named)]
    else:
        embeddings, conditioning, logit_bias = _pooled_rows(parts, segments)
    length = torch.cat([own[0] for own in segments]).long().to(device)
    counts, tokens = [len(own[0]) for own in segments], [int(own[0].sum()) for own in segments]
    z_bounds = _bounds(counts)
    start_of_unit = length.cumsum(0) - length
    start = weights["start_embedding"] + conditioning[:, :1]
    prefix = torch.cat([_padded(embeddings, z_bounds, left=True), start], 1)
    first = torch.cat([start_of_unit[a:b] - start_of_unit[a] for a, b in z_bounds])
    positions = nn.functional.pad(_padded(first, z_bounds, left=True), (0, 1))  # the start row is at 0
    padding = prefix.shape[1] - 1 - torch.tensor(counts, device=device)
    mask = torch.arange(prefix.shape[1], device=device) >= padding[:, None]
    settings = GenerationConfig(max_new_tokens=max(tokens), do_sample=False, pad_token_id=0, eos_token_id=None)
    with _Conditioning(parts, positions, conditioning, logit_bias):
        written = model.generate(
            inputs_embeds=prefix,
            attention_mask=mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList(forced),
        )
    return [row[:count] for row, count in zip(written.tolist(), tokens)]


def _bounds(counts: list[int]) -> list[tuple[int, int]]:
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [(stop - count, stop) for stop, count in zip(stops, counts)]


def decompress(parts: Parts, segments: Sequence[Sequence[Coded]], batched: bool) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts of documents, each given by its segments.

    Args:
        batched: the segments of all documents side by side, at most `ROWS`, padded on the left. Else one document after
            another, its segments side by side.
    """
    if batched:
        flat = [segment for own in segments for segment in own]
        written = [row for i in range(0, len(flat), ROWS) for row in write_segments(parts, flat[i : i + ROWS])]
    else:
        written = [row for own in segments for row in write_segments(parts, own)]
    tokens, at = [], 0
    for own in segments:
        tokens.append([token for row in written[at : at + len(own)] for token in row])
        at += len(own)
    decode = functools.partial(parts.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokens, [decode(own) for own in tokens]


def continue_ztokens(parts: Parts, documents: Sequence[Coded], new: int) -> list[Tensor]:
    """The likeliest next Z-tokens of documents, side by side with padding on the left; end-of-Z is never drawn.

    Args:
        parts: with the adapter "inferencer"; documents: the Z-tokens of each; new: Z-tokens to write.

    Returns:
        the codes of each document, `[new, L]`; of slots with their places, `[new, 2 L]`.
    """
    if parts.slots:
        return slots.continue_ztokens(parts, documents, new)
    weights, books = parts.weights, parts.weights["codebooks"]
    linear = nn.functional.linear

    def embed(codes: Tensor, lengths: Tensor) -> Tensor:
        vectors = torch.stack([book[code] for book, code in zip(books, codes.T)]).sum(0)
        rows = linear(vectors, weights["z_projection.weight"], weights["z_projection.bias"])
        return rows + weights["length_embedding.weight"][lengths]

    device = parts.model.device
    rows = [
        torch.cat([weights["zspace.marks"][:1], embed(codes.long().to(device), lengths.long().to(device))])
        for lengths, codes in documents
    ]
    counts = torch.tensor([len(own) for own in rows], device=device)
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    column = torch.arange(inputs.shape[1], device=device)
    mask = (column >= (inputs.shape[1] - counts)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    written: list[Tensor] = []
    for step in range(new):
        hidden = parts.model.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        chosen, codes = hidden.new_zeros(len(rows), books.shape[2]), []
        for level, book in enumerate(books):
            code = ((hidden @ weights["zspace.queries"][level].T + chosen) @ book.T).argmax(-1)
            codes.append(code)
            chosen = chosen + book[code]
        logits = linear(hidden, weights["zspace.length_query.weight"], weights["zspace.length_query.bias"])
        length = (logits + linear(chosen, weights["zspace.length_of_codes.weight"])).argmax(-1) + 1
        written.append(torch.stack(codes, 1))
        if step + 1 == new:
            break
        inputs = embed(written[-1], length)[:, None]
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    return list(torch.stack(written, 1).cpu())
