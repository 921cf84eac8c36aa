"""`decode_symbols`: symbols of range-coded streams from tables of counts, which may learn from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, float32

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp
from ztok_fast.ops.entropy import reference
from ztok_fast.ops.entropy.range_encode import check_state_values, check_streams, range_decoder, range_encode
from ztok_fast.ops.entropy.symbol_intervals import CASES, SAMPLES, check_counts_values, check_tables, symbol_intervals
from ztok_fast.ops.entropy.symbol_intervals import make as make_symbols
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Spec, Work, same_as

OP = "decode_symbols"


class DecodedSymbols(NamedTuple):
    """Result of `decode_symbols` for B streams.

    Attributes:
        symbols: int64 [T], in [0, A), those of each stream where cu_symbols says.
        state: int64 [B, 4], for what comes next in the streams.
    """

    symbols: Tensor
    state: Tensor


def decode_symbols(
    counts: Tensor, state: Tensor, data: Tensor, cu_symbols: Tensor, total: int, increment: int = 0
) -> DecodedSymbols:
    """Decode the symbols of each stream: the inverse of `symbol_intervals` and `range_encode`.

    A stream that is damaged or has ended gives arbitrary symbols of the alphabet; no byte outside of `data` is read.

    O(T A) time at worst, O(B A) memory. A GPU's tensors are decoded on the host.

    Args:
        counts: int64 [A], or [B, A] for a table per stream, as `symbol_intervals` was given.
        state: int64 [B, 4], from `range_decoder` or an earlier step; not changed.
        data: uint8 [N], the bytes of all streams.
        cu_symbols: int32 or int64 [B + 1], offsets of the streams' symbols in the result.
        total: T, the last element of cu_symbols; given, so that the call does not wait for a GPU.
        increment: as `symbol_intervals` was given.

    Returns:
        `DecodedSymbols`.

    Raises:
        ValueError: wrong rank, dtype, device or size; counts, offsets or increment out of range; a state that no
            decoder has.
    """
    given = checks.Arguments(OP)
    check_tables(given, counts, cu_symbols, increment)
    check_streams(given, state, data)
    checks.check_count(OP, "total", total)
    return DecodedSymbols(*DECODE_SYMBOLS(counts, state, data, cu_symbols.long(), total, increment))


def _check_values(counts: Tensor, state: Tensor, data: Tensor, cu_symbols: Tensor, total: int, increment: int) -> None:
    check_counts_values(OP, counts)
    check_state_values(OP, state)
    checks.check_cu_seqlens_values(OP, "cu_symbols", cu_symbols, total)


def _fake(counts, state, data, cu_symbols, total, increment):
    return state.new_empty(total), state.new_empty(state.shape)


# --- specification


def make(sizes, dtype, generator):
    """The streams of what `symbol_intervals` is given."""
    inputs = make_symbols(sizes, dtype, generator)
    streams = range_encode(*symbol_intervals(**inputs), inputs["cu_symbols"])
    return {
        "counts": inputs["counts"],
        "state": range_decoder(*streams),
        "data": streams.data,
        "cu_symbols": inputs["cu_symbols"],
        "total": inputs["symbols"].shape[0],
        "increment": inputs["increment"],
    }


DECODE_SYMBOLS = Op(
    "decode_symbols(Tensor counts, Tensor state, Tensor data, Tensor cu_symbols, int total, int increment) "
    "-> (Tensor, Tensor)",
    reference=reference.decode_symbols,
    fake=_fake,
    backends=(cpp(checks_values=True),),
    check_values=_check_values,
    spec=Spec(
        decode_symbols,
        make,
        samples=SAMPLES,
        check=same_as(reference.decode_symbols),
        outputs=tuple,
        dtypes=(float32,),
        cases=CASES,
        work=lambda case, inputs: Work(0.0, 8 * inputs["total"] + inputs["data"].numel()),
    ),
)
