"""One entry of a table: its key, what could stand there, and what that is timed on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY

FAMILIES = ("nearest", "quantize", "halting", "lora", "zhead")


@dataclass
class Place:
    """Where inputs are made and the most that a dimension of theirs may be; tests make small ones on the CPU."""

    device: str = "cuda"
    most: int | None = None

    def few(self, size: int) -> int:
        """The size of a dimension."""
        return size if self.most is None else min(size, self.most)


PLACE = Place()


@dataclass(frozen=True)
class Entry:
    """A key of a table, for every architecture that has it.

    Attributes:
        family: names the module of the table, `ztok_fast.ops.<family>.triton_configs`.
        table: its name there.
        key: (size at most, *kind).
        candidates: configurations to choose from.
        prepare: makes inputs at `PLACE` and returns what is timed: a call of the family's host side, which looks the
            configuration up in the table.
    """

    family: str
    table: str
    key: tuple
    candidates: tuple[NamedTuple, ...]
    prepare: Callable[[], Callable[[], object]]

    @property
    def name(self) -> str:
        """As it stands in the table's file."""
        return f"{self.family}.{self.table}[{text(self.key)}]"

    def of(self, arch: str) -> dict[tuple, NamedTuple]:
        """The table's entries for an architecture."""
        return getattr(importlib.import_module(f"ztok_fast.ops.{self.family}.triton_configs"), self.table)[arch]


def text(key: tuple) -> str:
    """A key as it is written in a table."""
    return f"({', '.join('ANY' if part == ANY else repr(part) for part in key)}{',' * (len(key) == 1)})"


def line(entry: Entry, arch: str, chosen: NamedTuple) -> str:
    """A line that can be pasted into the table's file."""
    return f"{entry.table}[{arch!r}][{text(entry.key)}] = {type(chosen).__name__}{tuple(chosen)}"


def size_of(key: tuple, stands_for_any: int) -> int:
    """The size that an entry is timed on: its bound, or one that stands for all sizes above the others."""
    return stands_for_any if key[0] == ANY else key[0]


def all_entries(tables: Iterable[str] = ()) -> Iterator[Entry]:
    """The entries of all families, or of the named tables ("nearest", "nearest.STEPS")."""
    wanted = set(tables)
    for family in FAMILIES:
        for entry in importlib.import_module(f"bench.tune.{family}").entries():
            if not wanted or wanted & {family, f"{family}.{entry.table}"}:
                yield entry
