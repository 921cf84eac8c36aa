"""`symbol_intervals`: where small integers lie in tables of counts, which may learn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp
from ztok_fast.ops.entropy import reference
from ztok_fast.ops.entropy.token_intervals import Intervals
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, mixed_lengths, offsets, same_as

OP = "symbol_intervals"
MOST_SYMBOLS, MOST_INCREMENT, MOST_COUNT = 1 << 16, 1 << 16, 1 << 31


def symbol_intervals(symbols: Tensor, counts: Tensor, cu_symbols: Tensor, increment: int = 0) -> Intervals:
    """The intervals of symbols among the cumulative counts of tables, for `range_encode`.

    With an increment the table of each stream learns: it starts as given, and after each symbol the increment is added
    to the symbol's count. When the total then exceeds 2^16, every count is halved, rounding up, so a table that is to
    learn should start far below that. `decode_symbols` changes its tables in the same way.

    O(T A) time at worst, for alphabets of a few hundred symbols; O(B A) memory.

    Args:
        symbols: int32 or int64 [T], in [0, A).
        counts: int64 [A], or [B, A] for a table per stream: 1 to 2^31 each, A at most 65,536.
        cu_symbols: int32 or int64 [B + 1], offsets of the streams' symbols.
        increment: 0 to 65,536; 0 for tables that stay as they are.

    Returns:
        `Intervals`.

    Raises:
        ValueError: wrong rank, dtype, device or size; symbols, counts, offsets or increment out of range.
    """
    given = checks.Arguments(OP)
    given.tensor("symbols", symbols, "[T]", checks.INDICES)
    check_tables(given, counts, cu_symbols, increment)
    return Intervals(*SYMBOL_INTERVALS(symbols.long(), counts, cu_symbols.long(), increment))


def check_tables(given: checks.Arguments, counts: Tensor, cu_symbols: Tensor, increment: int) -> None:
    """What `symbol_intervals` and `decode_symbols` ask of their tables and offsets."""
    given.tensor("cu_symbols", cu_symbols, "[B + 1]", checks.INDICES)
    given.tensor("counts", counts, "[A] or [B, A]", (torch.int64,))
    if not 1 <= counts.shape[-1] <= MOST_SYMBOLS:
        checks.fail(given.op, "counts", f"of 1 to {MOST_SYMBOLS:,} columns", checks.describe(counts))
    checks.check_count(given.op, "increment", increment)
    if increment > MOST_INCREMENT:
        checks.fail(given.op, "increment", f"at most {MOST_INCREMENT}", increment)


def check_counts_values(op: str, counts: Tensor) -> None:
    """Counts from 1 to 2^31."""
    checks.check_range_values(op, "counts", counts, 1, MOST_COUNT, f"in [1, {MOST_COUNT}]")


def _check_values(symbols: Tensor, counts: Tensor, cu_symbols: Tensor, increment: int) -> None:
    size = counts.shape[-1]
    checks.check_range_values(OP, "symbols", symbols, 0, size - 1, f"in [0, {size})")
    check_counts_values(OP, counts)
    checks.check_cu_seqlens_values(OP, "cu_symbols", cu_symbols, symbols.shape[0])


def _fake(symbols, counts, cu_symbols, increment):
    return tuple(torch.empty_like(symbols, memory_format=torch.contiguous_format) for _ in range(3))


# --- specification


def make(sizes, dtype, generator):
    """`B` streams of up to `T` symbols of an alphabet of `A`, low ones more often; `tables`: one per stream."""
    lengths = mixed_lengths(max(1, sizes["B"]), sizes["T"], generator)[: sizes["B"]]
    device, A = generator.device, sizes["A"]
    share = torch.rand(sum(lengths), generator=generator, device=device)
    shape = (sizes["B"], A) if sizes.get("tables") else (A,)
    return {
        "symbols": (share.square() * A).long().clamp(max=A - 1),
        "counts": torch.randint(1, sizes.get("most", 9), shape, generator=generator, device=device),
        "cu_symbols": offsets(lengths, device),
        "increment": sizes.get("increment", 0),
    }


SAMPLES = (
    {"B": 1, "T": 1, "A": 1},
    {"B": 3, "T": 50, "A": 2, "increment": 32},
    {"B": 0, "T": 1, "A": 4},
    {"B": 4, "T": 30, "A": 17, "tables": True, "most": 2**31},
    {"B": 3, "T": 300, "A": 40, "tables": True, "increment": 4000},
)
CASES = (
    Case({"B": 2, "T": 20, "A": 5, "increment": 24}, set="tiny"),
    Case({"B": 32, "T": 512, "A": 32, "increment": 24}, set="quick"),
)

SYMBOL_INTERVALS = Op(
    "symbol_intervals(Tensor symbols, Tensor counts, Tensor cu_symbols, int increment) -> (Tensor, Tensor, Tensor)",
    reference=reference.symbol_intervals,
    fake=_fake,
    backends=(cpp(checks_values=True),),
    check_values=_check_values,
    spec=Spec(
        symbol_intervals,
        make,
        samples=SAMPLES,
        check=same_as(reference.symbol_intervals),
        outputs=tuple,
        dtypes=(torch.float32,),
        cases=CASES,
        work=lambda case, inputs: Work(0.0, 32 * inputs["symbols"].shape[0]),
    ),
)
