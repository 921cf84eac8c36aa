"""The codec whose language model does the work: Z-tokens write down what the decompressor would not guess."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ztok_fast.codec.config import ConfigError, ZTokConfig
from ztok_fast.codec.draft_head import DraftHead
from ztok_fast.codec.segment_model import SegmentModel, root_mean_square
from ztok_fast.codec.slot_space import GAPS, SlotSpaceHead
from ztok_fast.codec.slots import ahead, slot_stream, written_tokens
from ztok_fast.codec.ztokens import ZTokens, one_each
from ztok_fast.ops.zhead.z_select import check_sampling

AHEAD = 4
"""Written tokens ahead that every row of the decompressor sees beside the text so far."""

DISTANCES = 16
"""Distances to them that are told apart; larger ones count as the largest."""


AHEAD_ROWS = 512
"""Text rows whose conditioning is made at once."""


class SlotModel(SegmentModel):
    """Z-tokens of L slots, each with one token of the vocabulary and its place in the unit.

    A unit's input embedding is the sum over its slots. Every text row of the decompressor also sees the next written
    tokens and how far they are: where they stand is known, and need not be found by attention.
    """

    zspace: SlotSpaceHead

    def __init__(self, base: PreTrainedModel, config: ZTokConfig) -> None:
        super().__init__(base, config)
        words = self.adapted.embedding.weight
        if config.codebook_size != len(words):
            raise ConfigError(
                f"codec setting codebook_size: expected the base model's {len(words)} tokens with emission "
                f"'slots', got {config.codebook_size}"
            )
        width = words.shape[1]
        rms = root_mean_square(words)
        self.start_embedding = nn.Parameter(torch.randn(width) * rms)
        self.slot_projection = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.slot_projection.weight)
        self.slot_gates = nn.Parameter(0.5 + 0.1 * torch.randn(config.num_codebooks, width))
        self.slot_places = nn.Embedding(DISTANCES, width)
        nn.init.normal_(self.slot_places.weight, std=0.3 * rms)
        self.ahead_projection = nn.Linear(width, AHEAD * width, bias=False)
        with torch.no_grad():
            self.ahead_projection.weight.copy_(torch.eye(width).repeat(AHEAD, 1))
        # The base model's own prediction stays nearly as it was at first.
        self.ahead_gates = nn.Parameter(0.05 * torch.randn(AHEAD, DISTANCES + 1, width))
        self.ahead_places = nn.Parameter(0.05 * rms * torch.randn(AHEAD, DISTANCES + 1, width))
        start = base.config.bos_token_id
        own = self.start_embedding if start is None else words[start]
        self.zspace = SlotSpaceHead(width, config, own, rms)
        self.draft = DraftHead(own)

    def embed(self, z: ZTokens, vectors: torch.Tensor | None = None) -> torch.Tensor:
        # Slots have no vectors beside their codes.
        assert vectors is None and z.slot_offsets is not None
        table, rows = self.runtime.linear_of_words(self.slot_projection, z.codes.clamp(min=0).long())
        if self.runtime.exact:
            return torch.ops.ztok.engine_slot_rows(
                table,
                rows.contiguous(),
                z.codes.int().contiguous(),
                z.slot_offsets.int().contiguous(),
                self.slot_gates.detach().float(),
                self.slot_places.weight.detach().float(),
                self.start_embedding.detach().float(),
            )
        words = nn.functional.embedding(rows, table)
        places = self.slot_places(z.slot_offsets.clamp(0, DISTANCES - 1).long())
        total = torch.zeros_like(places[:, 0])
        # One addition after another: the sum has the same bits whatever the number of rows.
        for slot in range(self.config.num_codebooks):
            own = words[:, slot] * self.slot_gates[slot] + places[:, slot]
            total = total + torch.where((z.codes[:, slot] >= 0)[:, None], own, 0.0)
        # A row of zeros would stay one in every layer, and each norm would multiply its gradient.
        return torch.where((z.codes[:, :1] >= 0), total, self.start_embedding)

    def written(self, z: ZTokens) -> torch.Tensor:
        return written_tokens(z)

    def conditioning(self, embeddings, z: ZTokens, total: int) -> tuple[torch.Tensor, None]:
        named = written_tokens(z)
        index, distance = ahead(named >= 0, z.cu_text, AHEAD)
        # One row more, for those that have nothing ahead to point at.
        told = torch.cat([named[named >= 0], named.new_zeros(1)])
        table, row = self.runtime.linear_of_words(self.ahead_projection, told)
        words = table.view(len(table) * AHEAD, -1)
        # Row 0 of the gates and places says that there is no token ahead.
        gates = self.ahead_gates * (torch.arange(DISTANCES + 1, device=named.device) > 0)[None, :, None]
        found = []
        # In blocks that stay in the processor's caches, but for training, where torch keeps all of them.
        block = max(1, total) if torch.is_grad_enabled() else AHEAD_ROWS
        for at, near in zip(row[index].split(block), distance.clamp(max=DISTANCES).split(block)):
            rows = torch.zeros((), device=at.device)
            for step in range(AHEAD):
                gate = nn.functional.embedding(near[:, step], gates[step])
                said = nn.functional.embedding(at[:, step] * AHEAD + step, words)
                rows = rows + nn.functional.embedding(near[:, step], self.ahead_places[step]) + said * gate
            found.append(rows)
        return torch.cat(found), None

    @property
    def steps_per_ztoken(self) -> int:
        return self.config.num_codebooks

    def inferencer_rows(self, z: ZTokens, embeddings: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, gaps, cu_slots = slot_stream(z)
        return self.zspace.rows(self.adapted.embedding(tokens), gaps.clamp(max=GAPS - 1)), cu_slots

    def next_row(self, hidden: torch.Tensor, *, temperature, top_p, seed, row_ids, step, allow_end):
        check_sampling("generate", temperature, top_p, seed, step)
        head, runtime, rule = self.zspace, self.runtime, (temperature, top_p, seed, row_ids)
        logits = head.choices(runtime.linear(head.gap_head, hidden.float()))
        if allow_end:
            gaps = runtime.choose(logits, *rule, 2 * step)
            ended = gaps == head.longest
            # What a document that has ended goes on with is not kept.
            ends, gaps = ended.double(), gaps.masked_fill(ended, 0)
        else:
            ends, gaps = runtime.last_share(logits), runtime.choose(logits[:, :-1], *rule, 2 * step)
        tokens = runtime.sample(hidden, nn.functional.embedding(gaps, head.gap_biases), *rule, 2 * step + 1)
        rows = head.rows(self.adapted.embedding(tokens), gaps)
        return one_each(tokens[:, None].int(), gaps + 1, gaps[:, None].int()), ends, rows

    def zspace_loss(self, hidden: torch.Tensor, z: ZTokens, is_end: torch.Tensor) -> torch.Tensor:
        tokens, gaps, _ = slot_stream(z)
        return self.zspace.loss(hidden, gaps.clamp(max=GAPS - 1), tokens, is_end, self.adapted.logits)
