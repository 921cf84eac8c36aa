"""`range_encode`: streams of bytes from the intervals of symbols; `range_decoder`: where decoding them begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import FLOATS, cpp
from ztok_fast.ops.entropy import reference
from ztok_fast.ops.entropy.coder import BYTES_AT_END, BYTES_PER_SYMBOL, TOTAL_LIMIT
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, mixed_lengths, offsets, same_as

OP = "range_encode"


class Streams(NamedTuple):
    """Streams of bytes, one after another.

    Attributes:
        data: uint8 [N]. Bytes after the last stream are 0.
        cu_bytes: int64 [B + 1], where each stream begins and ends.
    """

    data: Tensor
    cu_bytes: Tensor

    def to_bytes(self) -> list[bytes]:
        """Each stream."""
        data, ends = self.data[: int(self.cu_bytes[-1])].cpu().numpy().tobytes(), self.cu_bytes.tolist()
        return [data[begin:end] for begin, end in zip(ends, ends[1:])]

    @staticmethod
    def from_bytes(streams: Sequence[bytes]) -> Streams:
        """The same from each stream, on the CPU."""
        data = bytearray().join(streams)
        packed = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return Streams(packed, offsets([len(stream) for stream in streams], torch.device("cpu"), torch.int64))


def range_encode(start: Tensor, size: Tensor, total: Tensor, cu_symbols: Tensor) -> Streams:
    """Range-code the symbols of each stream; `decode_tokens` and `decode_symbols` are the inverse.

    A stream has -Σ log2(size / total) bits and at most 2 bytes more, plus what large totals lose: the share of a symbol
    is rounded down by a fraction of total / 2^56 at most. Symbols may come from `token_intervals`, from
    `symbol_intervals` or from anywhere else, mixed within a stream. Zero bytes at the end are left out, and a decoder
    reads zeros past the end, so the length must be stored beside the stream.

    O(T) time, T = number of symbols. A GPU's tensors are coded on the host.

    Args:
        start, size, total: int64 [T], 0 <= start < start + size <= total < 2^49.
        cu_symbols: int32 or int64 [B + 1], offsets of the streams' symbols; streams may be empty.

    Returns:
        `Streams` with room for 7 T + 8 B bytes, so that the call does not wait for a GPU to know a size.

    Raises:
        ValueError: wrong rank, dtype, device or size; intervals or offsets out of range.
    """
    given = checks.Arguments(OP)
    for name, value in (("start", start), ("size", size), ("total", total)):
        given.tensor(name, value, "[T]", (torch.int64,))
    given.tensor("cu_symbols", cu_symbols, "[B + 1]", checks.INDICES)
    return Streams(*RANGE_ENCODE(start, size, total, cu_symbols.long()))


def range_decoder(data: Tensor, cu_bytes: Tensor) -> Tensor:
    """The state of a decoder at the beginning of each stream, for `decode_tokens` and `decode_symbols`.

    O(B) time.

    Args:
        data: uint8 [N], as in `Streams`.
        cu_bytes: int32 or int64 [B + 1], offsets within data.

    Returns:
        int64 [B, 4]: bits of the unsigned range and value, position of the next byte, end of the stream. Rows may be
        selected, repeated and joined with those of other streams in the same data.

    Raises:
        ValueError: wrong rank, dtype or device; offsets out of range.
    """
    given = checks.Arguments("range_decoder")
    given.tensor("data", data, "[N]", (torch.uint8,))
    given.tensor("cu_bytes", cu_bytes, "[B + 1]", checks.INDICES)
    checks.check_cu_seqlens_values("range_decoder", "cu_bytes", cu_bytes, data.shape[0], exact=False)
    begin, end = cu_bytes[:-1].long(), cu_bytes[1:].long()
    at = begin[:, None] + torch.arange(8, device=data.device)
    padded = torch.cat([data, data.new_zeros(1)]).long()
    digits = torch.where(at < end[:, None], padded[at.clamp(max=data.shape[0])], 0)
    value = (digits << torch.arange(56, -1, -8, device=data.device)).sum(1)
    return torch.stack([torch.full_like(value, -1), value, torch.minimum(begin + 8, end), end], 1)


def check_streams(given: checks.Arguments, state: Tensor, data: Tensor) -> None:
    """Tensors as `range_decoder` takes and gives them."""
    given.tensor("state", state, "[B, 4]", (torch.int64,))
    given.tensor("data", data, "[N]", (torch.uint8,))


def check_state_values(op: str, state: Tensor) -> None:
    """No range below the least. With any other words decoding gives some symbols and reads nothing outside."""
    if checks.value_checks(state) and bool((state[:, 0] >> 56 == 0).any()):
        checks.fail(op, "state", "a result of range_decoder or of a decoding step", "a range below 2^56")


def _check_values(start: Tensor, size: Tensor, total: Tensor, cu_symbols: Tensor) -> None:
    checks.check_cu_seqlens_values(OP, "cu_symbols", cu_symbols, start.shape[0])
    if not checks.value_checks(start):
        return
    bad = (start < 0) | (size <= 0) | (total >= TOTAL_LIMIT) | (start > total) | (size > total - start)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        got = f"{int(start[i])}, {int(size[i])} and {int(total[i])} for symbol {i}"
        checks.fail(OP, "start, size, total", "0 <= start < start + size <= total < 2^49", got)


def _fake(start, size, total, cu_symbols):
    streams = cu_symbols.shape[0] - 1
    capacity = BYTES_PER_SYMBOL * start.shape[0] + BYTES_AT_END * streams
    return start.new_empty(capacity, dtype=torch.uint8), start.new_empty(streams + 1)


# --- specification


def make(sizes, dtype, generator):
    """`B` streams of up to `T` symbols, every third of them empty; totals up to 2^`bits`."""
    lengths = [0 if i % 3 == 1 else n for i, n in enumerate(mixed_lengths(max(1, sizes["B"]), sizes["T"], generator))]
    lengths = lengths[: sizes["B"]]
    limit, symbols, device = min(1 << sizes["bits"], TOTAL_LIMIT - 1), sum(lengths), generator.device
    total = torch.randint(1, limit + 1, (symbols,), generator=generator, device=device)
    total[::2] = limit
    # sizes of all magnitudes, from 1 to the total
    share = torch.rand(symbols, generator=generator, device=device, dtype=torch.float64) * sizes["bits"]
    size = torch.minimum((2**share).long().clamp(min=1), total)
    room = torch.rand(symbols, generator=generator, device=device, dtype=torch.float64)
    start = torch.minimum((room * (total - size + 1)).long(), total - size)
    return {"start": start, "size": size, "total": total, "cu_symbols": offsets(lengths, device)}


RANGE_ENCODE = Op(
    "range_encode(Tensor start, Tensor size, Tensor total, Tensor cu_symbols) -> (Tensor, Tensor)",
    reference=reference.range_encode,
    fake=_fake,
    backends=(cpp(FLOATS, checks_values=True),),
    check_values=_check_values,
    spec=Spec(
        range_encode,
        make,
        samples=(
            {"B": 1, "T": 1, "bits": 1},
            {"B": 5, "T": 40, "bits": 49},
            {"B": 0, "T": 1, "bits": 8},
            {"B": 2, "T": 0, "bits": 8},
            {"B": 9, "T": 300, "bits": 31},
        ),
        check=same_as(reference.range_encode),
        outputs=tuple,
        dtypes=(torch.float32,),
        cases=(
            Case({"B": 3, "T": 20, "bits": 32}, set="tiny"),
            Case({"B": 32, "T": 512, "bits": 34}, set="quick"),
            Case({"B": 1, "T": 65536, "bits": 34}),
        ),
        work=lambda case, inputs: Work(0.0, 24 * inputs["start"].shape[0]),
    ),
)
