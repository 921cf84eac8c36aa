"""Writing texts of known length: one token per pass, one pass per token that is not told, or drafted whole and verified
in blocks (block Jacobi).

All give the same tokens. A pass over several rows has the bits of steps, so a guess that the model confirms is what
steps would have written. Where the text is nearly fixed by what the sequence holds already, most guesses are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ztok_fast.engine import checks
from ztok_fast.engine.engine import Engine
from ztok_fast.engine.sequences import Sequences

DRAFTED_SEQUENCES = 2
"""Up to so many sequences `write_blocks` is the faster way. A pass over few rows costs what reading the weights costs,
so more rows are nearly free there. With more sequences steps fill a pass themselves, and wrong guesses cost more than
they save. On ztok-mini (int8, one thread, CPU time) blocks won for one sequence, were even for two and lost from four
on."""


TOLD_SHARE = 0.25
"""Where at least so many of the tokens are told, `write_told` is the faster way for any number of sequences. With a
codec of slots that tells 64 % (128 tokens a segment, int8, one thread, CPU time) it took 0.7 of the time of steps, for
one segment and for 49. With 10 % told at random it was even with steps for 49; with none it took 1.1 of their time, and
1.2 for one."""


Choose = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""(hidden states [T, D], biases [T, D], their texts, their columns) -> tokens int64 [T]"""


@dataclass(frozen=True)
class Texts:
    """Texts to be written after B sequences.

    Attributes:
        lengths: int64 [B], tokens of each; L is the largest.
        vectors: float32 [B, L, D]; that of column c is added to the input row that predicts column c, so that of
            column 0 is not used.
        biases: float32 [B, L, D], added to the hidden state that predicts a column.
        forced: int64 [B, L], tokens to write instead of the model's own; -1 where there is none.
    """

    lengths: Tensor
    vectors: Tensor | None = None
    biases: Tensor | None = None
    forced: Tensor | None = None


@dataclass(frozen=True)
class Written:
    """Texts: int64 `tokens` [B, L], -1 past a text's end; int64 `passes` [B], in how many passes each had rows."""

    tokens: Tensor
    passes: Tensor


class _Writing:
    """What the ways of writing share: checked arguments, input rows of columns and tokens from hidden states.

    The row of column c is that of its token; its hidden state predicts column c + 1.
    """

    def __init__(self, engine: Engine, sequences: Sequences, given: Texts, chooser: Choose | None = None) -> None:
        count, hidden, lengths = len(sequences), engine.settings.hidden, given.lengths
        checks.tensor("lengths", lengths, (count,), torch.int64)
        longest = int(lengths.max()) if count else 0
        for name, value in (("vectors", given.vectors), ("biases", given.biases)):
            if value is not None:
                checks.tensor(name, value, (count, longest, hidden), torch.float32, engine.device)
        if given.forced is not None:
            checks.tensor("forced", given.forced, (count, longest), torch.int64)
        if count and int(lengths.min()) < 0:
            raise ValueError(f"engine: lengths: expected at least 0, got {int(lengths.min())}")
        needed = sequences.lengths + lengths - 1  # the last token is written and not read
        if count and int(needed.max()) > engine.capacity:
            raise ValueError(
                f"engine: lengths: expected texts that fit {engine.capacity} rows, the capacity, got one that needs "
                f"{int(needed.max())}; call reserve(capacity=...)"
            )
        self.engine, self.sequences, self.given, self.chooser = engine, sequences, given, chooser
        self.tokens = torch.full((count, longest), -1)
        self.passes = torch.zeros(count, dtype=torch.int64)

    def forward(self, texts: Tensor, firsts: Tensor, counts: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
        """Read `counts` rows of each of `texts`, from column `firsts` on; `tokens` and `columns` are packed."""
        s, rows = self.sequences, texts.repeat_interleave(counts)
        self.passes[texts] += 1
        return self.engine.forward(
            tokens,
            s.positions[rows] + columns,
            torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
            s.slots[texts],
            s.lengths[texts] + firsts.int(),
            s.adapters[texts],
            None if self.given.vectors is None else self.given.vectors[rows, columns + 1],
        )

    def choose(self, hidden: Tensor, texts: Tensor, columns: Tensor) -> Tensor:
        """The tokens of columns from the hidden states that predict them."""
        biases = None if self.given.biases is None else self.given.biases[texts, columns]
        tokens = (
            self.engine.argmax(hidden, biases) if self.chooser is None else self.chooser(hidden, biases, texts, columns)
        )
        if self.given.forced is None:
            return tokens
        forced = self.given.forced[texts, columns]
        return torch.where(forced >= 0, forced, tokens)

    def first(self) -> None:
        """Column 0, which the hidden states of the sequences predict."""
        texts = (self.given.lengths > 0).nonzero()[:, 0]
        if len(texts):
            self.tokens[texts, 0] = self.choose(self.sequences.hidden[texts], texts, torch.zeros_like(texts))

    def finish(self) -> Written:
        columns = torch.arange(self.tokens.shape[1])
        return Written(self.tokens.masked_fill(columns >= self.given.lengths[:, None], -1), self.passes)


@torch.inference_mode()
def write_steps(engine: Engine, sequences: Sequences, given: Texts) -> Written:
    """Write a text after each sequence, the tokens with the highest logits, one per pass.

    The sequences, whose hidden states predict the first column, stay as they are; rows past their lengths in their
    slots are overwritten.
    """
    text, lengths = _Writing(engine, sequences, given), given.lengths
    text.first()
    for column in range(text.tokens.shape[1] - 1):
        texts = (lengths > column + 1).nonzero()[:, 0]
        columns = torch.full_like(texts, column)
        hidden = text.forward(texts, columns, torch.ones_like(texts), text.tokens[texts, column], columns)
        text.tokens[texts, column + 1] = text.choose(hidden, texts, columns + 1)
    return text.finish()


@torch.inference_mode()
def write_told(engine: Engine, sequences: Sequences, given: Texts, choose: Choose | None = None) -> Written:
    """What `write_steps` writes, in one pass for each token that is not forced; the arguments are the same.

    A pass reads a sequence's last token and all forced ones after it, and so predicts its next token to guess. What
    comes after the last guess is not read.

    Args:
        choose: finds the tokens that are not forced in place of those with the highest logits. It is asked for the
            first column, where that is not forced, and then in each pass for the next token of every text.
    """
    text, lengths, forced = _Writing(engine, sequences, given, choose), given.lengths, given.forced
    longest = text.tokens.shape[1]
    if not longest:
        return text.finish()
    columns = torch.arange(longest)
    guessed = columns < lengths[:, None]
    if forced is not None:
        text.tokens = forced.clone()
        guessed &= forced < 0
    # The first column to guess from each column on; `longest` where there is none.
    following = torch.where(guessed, columns, longest).flip(1).cummin(1).values.flip(1)
    following = torch.nn.functional.pad(following, (0, 1), value=longest)
    first = guessed[:, 0].nonzero()[:, 0]
    if len(first):
        text.tokens[first, 0] = text.choose(sequences.hidden[first], first, torch.zeros_like(first))
    texts = (following[:, 1] < longest).nonzero()[:, 0]
    begins, stops = torch.zeros_like(texts), following[texts, 1]
    while len(texts):
        counts = stops - begins
        ends = counts.cumsum(0)
        rows = texts.repeat_interleave(counts)
        read = torch.arange(len(rows)) + (stops - ends).repeat_interleave(counts)
        hidden = text.forward(texts, begins, counts, text.tokens[rows, read], read)
        text.tokens[texts, stops] = text.choose(hidden[ends - 1], texts, stops)
        going = following[texts, stops + 1] < longest
        texts, begins = texts[going], stops[going]
        stops = following[texts, begins + 1]
    return text.finish()


@torch.inference_mode()
def write_blocks(
    engine: Engine, sequences: Sequences, given: Texts, block: int = 8, draft: Tensor | None = None
) -> Written:
    """What `write_steps` writes, in fewer passes where guesses are right; the arguments are the same.

    A first pass reads rows without tokens, their vectors alone, and so drafts the whole text. Each further pass reads
    up to `block` tokens after the last one that is certain. Those that the model confirms stay, and one more is certain
    then; the rest of the block is guessed anew from this pass.

    Args:
        block: rows that a sequence has in a pass at most; 1 is step by step.
        draft: int64 [B, L], guesses to begin with; None makes them with the first pass.
    """
    checks.integer("block", block, 1)
    text, lengths = _Writing(engine, sequences, given), given.lengths
    text.first()
    certain = lengths.clamp(max=1)
    if draft is not None:
        checks.tensor("draft", draft, tuple(text.tokens.shape), torch.int64)
        text.tokens[:, 1:] = draft[:, 1:].clamp(0, engine.settings.vocabulary - 1)
    elif text.tokens.shape[1] > 1 and block > 1:
        certain = _draft(text, certain)
    offsets = torch.arange(block)
    while True:
        texts = (certain < lengths).nonzero()[:, 0]
        if not len(texts):
            return text.finish()
        firsts = certain[texts] - 1
        counts = (lengths - certain)[texts].clamp(max=block)
        inside = offsets < counts[:, None]
        rows, columns = texts.repeat_interleave(counts), (firsts[:, None] + offsets)[inside]
        hidden = text.forward(texts, firsts, counts, text.tokens[rows, columns], columns)
        # Row i of a block predicts the token that row i + 1 has read.
        guesses = torch.full(inside.shape, -1)
        guesses[inside] = text.tokens[rows, columns + 1]
        found = torch.full_like(guesses, -1)
        found[inside] = tokens = text.choose(hidden, rows, columns + 1)
        right = ((guesses == found) & inside).cumprod(1).sum(1)
        text.tokens[rows, columns + 1] = tokens
        certain[texts] += torch.minimum(right + 1, counts)


def _draft(text: _Writing, certain: Tensor) -> Tensor:
    """Guess all columns from one pass over rows without tokens but the first; returns how many columns are certain."""
    texts = (text.given.lengths > 1).nonzero()[:, 0]
    counts = text.given.lengths[texts] - 1
    offsets = torch.arange(int(counts.max()))
    inside = offsets < counts[:, None]
    rows, columns = texts.repeat_interleave(counts), offsets.expand(len(texts), -1)[inside]
    tokens = torch.where(columns == 0, text.tokens[rows, columns], -1)
    hidden = text.forward(texts, torch.zeros_like(texts), counts, tokens, columns)
    text.tokens[rows, columns + 1] = text.choose(hidden, rows, columns + 1)
    return certain + (text.given.lengths > 1).long()  # the first row had its token, so column 1 is right
