"""Training of a codec whose Z-tokens are slots: the decompressor learns to guess what is not written."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ztok_fast.codec.draft import draft, symbol_losses
from ztok_fast.codec.draft_head import share_of
from ztok_fast.codec.engines import AUTO, Engines
from ztok_fast.codec.layout import sequence_of_row
from ztok_fast.codec.selection import choose_ztokens, guess
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slots import fill_slots, slot_mass, written_tokens
from ztok_fast.train.batches import Batch
from ztok_fast.train.inferencer import inferencer_losses

SHARES = (0.15, 0.9)
"""Of the tokens of a segment that are written, drawn evenly between these."""

LEANING = 3.0
"""How much likelier, in log odds, tokens that are guessed wrong are written than others, at most."""

SECOND_PASS = 0.5
"""Share of the batches whose written tokens lean on what a first pass guesses wrong; the others draw at random."""

FOLLOWED = 0.3
"""Share of the tokens that a first pass gets wrong and that are not written, which the text before a row then shows as
they were guessed: so the decompressor learns to go on after its own mistakes."""

LOOSE = 0.25
"""Share of the segments whose units end before their slots are full, as low ratios ask."""


RATIOS = (4.0, 24.0)
"""Between which the ratios are drawn that the compressor learns from, evenly in their logarithm."""

READ_RATIOS = (3.0, 12.0)
"""The same for the inferencer; about half of these Z-tokens give the text back exactly."""

REFRESHED = 8
"""Steps after which drafts are written by the compressor as it is then."""

DRAFTED = 0.3
"""Weight of the loss of the guessed tokens: a better draft prices what follows better."""


def draw_ratios(bounds: tuple[float, float], count: int, seed: int) -> torch.Tensor:
    """fp32 ``[count]``, drawn evenly in their logarithm."""
    low, high = (math.log(ratio) for ratio in bounds)
    return (low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed))).exp()


class CompressorObjective(nn.Module):
    """The compressor's model prices the symbols of Z-tokens. The decompressor stays as it is."""

    def __init__(self, model: SlotModel) -> None:
        super().__init__()
        self.model, self._steps = model, 0
        self._engines = Engines(model, AUTO)

    def forward(self, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        """The loss terms, 0-d; ``symbols`` is in nats a text token.

        Args:
            seed: of the draw of ratios.
        """
        model, tokens, cu = self.model, batch.tokens, batch.cu_segments
        ratios = draw_ratios(RATIOS, len(batch.sections), seed).to(tokens.device)
        if self._steps % REFRESHED == 0:
            self._engines.use()
        self._steps += 1
        with torch.no_grad():
            z = choose_ztokens(model, tokens, cu, batch.cu_sections, ratios)
            named = written_tokens(z)
            section = sequence_of_row(batch.cu_sections, len(cu) - 1)
            share = share_of(named >= 0, section[sequence_of_row(cu, len(tokens))], len(batch.sections))[section]
            written = draft(model, named, cu, share)
        symbols, guesses = symbol_losses(model, written, named, tokens, cu, share)
        total = symbols.mean() + DRAFTED * guesses.sum() / len(tokens)
        return {
            "symbols": symbols.mean(),
            "accuracy": (written == tokens).float().mean(),
            "written": (named >= 0).float().mean(),
            "total": total,
            "ztokens": torch.tensor(z.ztokens),
        }


class InferencerObjective(nn.Module):
    """The inferencer over the Z-tokens of slots: what comes next, and answers. The decompressor stays as it is."""

    def __init__(self, model: SlotModel, answer: float) -> None:
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        """The loss terms, 0-d; ``zspace`` is in nats a slot.

        Args:
            seed: of the draw of ratios.
        """
        model, tokens, cu = self.model, batch.tokens, batch.cu_segments
        ratios = draw_ratios(READ_RATIOS, len(batch.sections), seed).to(tokens.device)
        with torch.no_grad():
            z = choose_ztokens(model, tokens, cu, batch.cu_sections, ratios)
            embeddings = model.embed(z)
        zspace, answer = inferencer_losses(model, batch, z, embeddings, bool(self.answer))
        terms = {"zspace": zspace, "total": zspace}
        if answer is not None:
            terms |= {"answer": answer, "total": zspace + self.answer * answer}
        return {**terms, "ztokens": torch.tensor(z.ztokens)}


class SlotObjective(nn.Module):
    """The decompressor guesses what is not written. One ``forward`` gives every loss term."""

    def __init__(self, model: SlotModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        """The loss terms, 0-d: ``total``, and what tells how training goes.

        Args:
            seed: of this step's random draws.
        """
        model, tokens, cu = self.model, batch.tokens, batch.cu_segments
        draw = torch.Generator(device=tokens.device).manual_seed(seed)
        segment = sequence_of_row(cu, len(tokens))
        count = len(cu) - 1
        uniform = lambda n: torch.rand(n, generator=draw, device=tokens.device)  # noqa: E731
        share = SHARES[0] + (SHARES[1] - SHARES[0]) * uniform(count)
        odds = torch.logit(share)[segment]
        written, prefix = uniform(len(tokens)) < share[segment], tokens
        if uniform(1).item() < SECOND_PASS:
            first = guess(model, tokens, written, cu)
            # What is written is known to be wrong or right only where it was not told.
            told, lean = written, LEANING * uniform(count)[segment]
            odds = odds + torch.where(told, 0.0, torch.where(first.right, -lean, lean))
            written = uniform(len(tokens)) < odds.sigmoid()
            follow = (uniform(count) < 0.5)[segment] & (uniform(len(tokens)) < FOLLOWED)
            prefix = torch.where(~written & ~told & ~first.right & follow, first.tokens, tokens)
        z = fill_slots(
            tokens,
            written,
            cu,
            batch.cu_sections,
            model.config.num_codebooks,
            self._mass(written, cu, segment, uniform),
        )
        inputs = model.decoder_inputs(model.embed(z), z, prefix, cu)
        hidden = model.decompressor_hidden(inputs)[~written]
        # The Z-tokens tell what is written, so there is nothing to learn at those rows.
        logits = model.adapted.logits(hidden).float()
        loss = cross_entropy(logits, tokens[~written])
        return {
            "total": loss,
            "accuracy": (logits.detach().argmax(-1) == tokens[~written]).float().mean(),
            "written": written.float().mean(),
            "ztokens": torch.tensor(z.ztokens),
        }

    def _mass(self, written, cu, segment, uniform) -> torch.Tensor:
        slots = self.model.config.num_codebooks
        used = torch.where(uniform(len(cu) - 1) < LOOSE, (slots * uniform(len(cu) - 1)).ceil().clamp(min=1), slots)
        mass = slot_mass(written, cu, slots)
        return (mass * (slots / used)[segment]).clamp(max=1.0)
