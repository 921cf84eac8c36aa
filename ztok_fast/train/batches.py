"""Streaming training batches: rows → documents → sections of consecutive segments → packed batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.train.text_data import iter_rows

BARREN_ROWS = 100_000
"""Rows in a row that give no section, after which a stream gives up."""


@dataclass
class Section:
    """Consecutive text tokens of one document, with a question and its answer where the row has one."""

    tokens: list[int]
    question: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """A packed batch of sections.

    Attributes:
        tokens: int64 ``[T]``; cu_segments int32 ``[S + 1]`` in tokens; cu_sections int32 ``[G + 1]`` in segments.
        sections: the sections themselves, in order.
    """

    tokens: torch.Tensor
    cu_segments: torch.Tensor
    cu_sections: torch.Tensor
    sections: list[Section]

    def to(self, device) -> Batch:
        tokens, cu_segments, cu_sections = (
            t.to(device, non_blocking=True) for t in (self.tokens, self.cu_segments, self.cu_sections)
        )
        return Batch(tokens, cu_segments, cu_sections, self.sections)


def make_batch(sections: list[Section], segment_length: int) -> Batch:
    """Pack ``sections``; every section is cut into segments of ``segment_length`` tokens."""
    segments, counts = split_segments([len(c.tokens) for c in sections], segment_length)
    return Batch(
        torch.tensor([t for c in sections for t in c.tokens], dtype=torch.int64),
        offsets(torch.tensor(segments)),
        offsets(torch.tensor(counts)),
        sections,
    )


class SectionStream:
    """Endless shuffled stream of batches over JSON-lines files, with a state that can be saved.

    Rows are read one at a time and never all held; the shuffle draws from a buffer of sections. Two streams
    with the same settings and state give the same batches.

    Args:
        files: JSON-lines files, read in order, again and again.
        tokenizer: Hugging Face tokenizer.
        section_tokens: most tokens of a section; shorter rests under ``min_tokens`` are left out.
        batch_tokens: a batch is closed when it holds at least this many tokens.
        rank, world: this process reads every ``world``-th row.

    Raises:
        ValueError: a count out of range; when batches are drawn, `DataError` for a file that cannot be read.
    """

    def __init__(
        self,
        files: list[str],
        tokenizer,
        *,
        segment_length: int,
        section_tokens: int,
        batch_tokens: int,
        seed: int,
        exclude_sources: Sequence[str] = (),
        buffer_sections: int = 2048,
        min_tokens: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, value, low in (
            ("segment_length", segment_length, 1),
            ("section_tokens", section_tokens, min_tokens),
            ("batch_tokens", batch_tokens, 1),
            ("buffer_sections", buffer_sections, 1),
            ("min_tokens", min_tokens, 1),
        ):
            if value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1} of {world} processes, got {rank}")
        self.files, self.tokenizer = list(files), tokenizer
        self.segment_length, self.section_tokens, self.batch_tokens = segment_length, section_tokens, batch_tokens
        self.excluded = tuple(exclude_sources)
        self.buffer_sections, self.min_tokens = buffer_sections, min_tokens
        self.rank, self.world = rank, world
        self.random = random.Random(f"{seed}-{rank}")
        self.rows_read = 0
        self.buffer: list[Section] = []
        self._rows: Iterator[dict] | None = None

    def _read_rows(self, skip: int) -> Iterator[dict]:
        passed = 0
        while True:
            before = passed
            for path in self.files:
                for row in iter_rows(path):
                    passed += 1
                    if passed > skip:
                        yield row
            rows = passed - before
            if not rows:
                raise ValueError(f"training files {self.files}: expected at least one row, got none")
            # Whole passes that are skipped need not be read.
            passed += max(0, skip - passed) // rows * rows

    def _fill(self) -> None:
        if self._rows is None:
            self._rows = self._read_rows(self.rows_read)
        without_section = 0
        while len(self.buffer) < self.buffer_sections:
            row = next(self._rows)
            self.rows_read += 1
            if self.rows_read % self.world != self.rank:
                continue
            if self.excluded and str(row.get("source", "")).startswith(self.excluded):
                sections = []
            else:
                sections = self.sections_of(row)
            self.buffer += sections
            without_section = 0 if sections else without_section + 1
            if without_section > BARREN_ROWS:
                raise ValueError(
                    f"training files {self.files}: expected rows of at least {self.min_tokens} tokens "
                    f"outside the excluded sources, got none in {BARREN_ROWS:,} rows"
                )

    def sections_of(self, row: dict) -> list[Section]:
        """The sections of one row; a question goes with its row's text only where that fits one section."""
        ids = self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        if len(ids) < self.min_tokens:
            return []
        if len(ids) <= self.section_tokens:
            question, answer = self._question(row)
            return [Section(ids, question, answer)]
        parts = [ids[i : i + self.section_tokens] for i in range(0, len(ids), self.section_tokens)]
        return [Section(part) for part in parts if len(part) >= self.min_tokens]

    def _question(self, row: dict) -> tuple[list[int], list[int]]:
        pairs = [(row.get("question"), row.get("answer"))]
        pairs += [(item.get("question"), item.get("answer")) for item in row.get("qa") or [] if isinstance(item, dict)]
        pairs = [(q, a) for q, a in pairs if isinstance(q, str) and isinstance(a, str) and q and a]
        if not pairs:
            return [], []
        question, answer = self.random.choice(pairs)
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        return encode(question), encode(answer)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch: sections drawn from the buffer until they hold ``batch_tokens``."""
        chosen, count = [], 0
        while count < self.batch_tokens:
            self._fill()
            index = self.random.randrange(len(self.buffer))
            self.buffer[index], self.buffer[-1] = self.buffer[-1], self.buffer[index]
            chosen.append(self.buffer.pop())
            count += len(chosen[-1].tokens)
        return make_batch(chosen, self.segment_length)

    def state(self) -> dict:
        """What `load_state` needs to go on with exactly the next batch."""
        return {
            "rows_read": self.rows_read,
            "random": self.random.getstate(),
            "buffer": [(c.tokens, c.question, c.answer) for c in self.buffer],
        }

    def load_state(self, state: dict) -> None:
        self.rows_read = state["rows_read"]
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))
        self.buffer = [Section(*item) for item in state["buffer"]]
        self._rows = None
