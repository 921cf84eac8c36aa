"""The speed targets of the project, as data: which cases, which comparison, which threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.codec.runs import BATCHED, ONE_BY_ONE, PADDED
from bench.micro import results


@dataclass(frozen=True)
class Target:
    """One target on one kind of device.

    Attributes:
        op: heading in the table; text: the target in words.
        device: "cpu" or "cuda".
        measure: (case, all cases) -> how many times as fast as what it is compared with, None where the case says
            nothing about the target. Always "at least": a time limit of 1.15× is a speed of at least 1 / 1.15.
        least: threshold of that number.
    """

    op: str
    text: str
    device: str
    measure: Callable[[dict, list[dict]], float | None]
    least: float


def against(op: str, *peers: str, direction: str = "forward", **sizes) -> Callable[[dict, list[dict]], float | None]:
    """Speed of the preferred backend against the first of `peers` that was measured, on cases of the given sizes.

    Args:
        sizes: a value, or a predicate on the value; `dtype` is compared with the case's dtype.
    """

    def measure(case, cases):
        if case["op"] != op or case["direction"] != direction or not _has(case, sizes):
            return None
        ours = results.default_backend(case)
        theirs = next(filter(None, (results.contender(case, name) for name in peers)), None)
        return results.seconds(theirs) / results.seconds(ours) if ours and theirs else None

    return measure


def bandwidth_of(op: str, mark: str) -> Callable[[dict, list[dict]], float | None]:
    """Bytes per second of the preferred backend's forward pass against those of a mark, each counting its own bytes."""

    def measure(case, cases):
        if case["op"] != op or case["direction"] != "forward":
            return None
        ours, theirs = results.default_backend(case), results.contender(case, mark)
        return ours["gbs"] / theirs["gbs"] if ours and theirs else None

    return measure


def _has(case: dict, sizes: dict) -> bool:
    for name, wanted in sizes.items():
        value = case["dtype"] if name == "dtype" else case["shape"][name]
        if not (wanted(value) if callable(wanted) else value == wanted):
            return False
    return True


def mixed_against_one(case: dict, cases: list[dict]) -> float | None:
    """Speed of several adapters in one batch against the same layer with one."""
    if case["op"] != "lora_linear" or case["shape"]["n"] == 1:
        return None
    for other in cases:
        same = other["op"] == "lora_linear" and other["shape"] == {**case["shape"], "n": 1}
        if same and (other["dtype"], other["direction"]) == (case["dtype"], case["direction"]):
            ours, single = results.default_backend(case), results.default_backend(other)
            return results.seconds(single) / results.seconds(ours) if ours and single else None
    return None


HALF = "bfloat16"
MOVES = ("ragged_pack", "ragged_unpack", "ragged_gather")
_MASKS = {"ragged_pack": "boolean mask", "ragged_unpack": "boolean mask", "ragged_gather": "boolean masks"}
_UNPAD = {"ragged_pack": "flash-attn unpad", "ragged_unpack": "flash-attn pad", "ragged_gather": "boolean masks"}
COPY_BANDWIDTH = "≥ 70 % of the bandwidth of a copy (torch.clone of a tensor as large as the result)"
_COMPRESS = "compress, mixed-length documents"
_HEAD = ("full head + arg-max", "full head + multinomial")


def many(documents: int) -> bool:
    """A single document has nothing to pad and nothing to batch."""
    return documents > 1


TARGETS: tuple[Target, ...] = (
    Target("nearest code", "≥ 1.5× faiss IndexFlatL2, d = 64", "cpu", against("codebook_assign", "faiss", d=64), 1.5),
    Target("nearest code", "≥ 1.2× faiss IndexFlatL2, d = 576", "cpu", against("codebook_assign", "faiss", d=576), 1.2),
    Target(
        "nearest code",
        "≥ 1.0× the bare torch.mm of the same shape, fp32",
        "cpu",
        against("codebook_assign", "mm", dtype="float32"),
        1.0,
    ),
    Target(
        "residual search",
        "≥ 3× vector-quantize-pytorch ResidualVQ, L = 4",
        "cpu",
        against("residual_quantize", "vector-quantize-pytorch", L=4),
        3.0,
    ),
    *(Target(op, "≥ 3× boolean masks", "cpu", against(op, _MASKS[op]), 3.0) for op in MOVES),
    *(Target(op, COPY_BANDWIDTH, "cpu", bandwidth_of(op, "clone"), 0.7) for op in MOVES),
    Target("LoRA linear", "≥ 1.2× PEFT, forward", "cpu", against("lora_linear", "PEFT"), 1.2),
    Target("Z head", "≥ 5× the full-vocabulary head + arg-max or multinomial", "cpu", against("z_select", *_HEAD), 5.0),
    Target(_COMPRESS, "≥ 2× Hugging Face + PEFT, padded", "cpu", against("compress", PADDED, documents=many), 2.0),
    Target(
        "decompress",
        "≥ 5× `generate`, one document after another",
        "cpu",
        against("decompress", ONE_BY_ONE, documents=many),
        5.0,
    ),
    Target(
        "decompress", "≥ 2× `generate`, batched and padded", "cpu", against("decompress", BATCHED, documents=many), 2.0
    ),
    Target(
        "nearest code",
        "≤ 1.15× the time of the bare matmul, bf16",
        "cuda",
        against("codebook_assign", "mm", "mm in blocks", dtype=HALF),
        1 / 1.15,
    ),
    Target(
        "nearest code",
        "≥ 1.0× flash-kmeans, d = 128",
        "cuda",
        against("codebook_assign", "flash-kmeans", dtype=HALF, d=128),
        1.0,
    ),
    Target(
        "nearest code",
        "≥ 1.5× flash-kmeans, d ≥ 1024",
        "cuda",
        against("codebook_assign", "flash-kmeans", dtype=HALF, d=lambda d: d >= 1024),
        1.5,
    ),
    Target(
        "nearest code",
        "≥ 5× vector-quantize-pytorch",
        "cuda",
        against("codebook_assign", "vector-quantize-pytorch"),
        5.0,
    ),
    Target(
        "residual search",
        "≥ 5× vector-quantize-pytorch ResidualVQ, L = 4",
        "cuda",
        against("residual_quantize", "vector-quantize-pytorch", L=4),
        5.0,
    ),
    *(Target(op, f"≥ 3× {_UNPAD[op]}, end to end", "cuda", against(op, _UNPAD[op]), 3.0) for op in MOVES),
    *(Target(op, COPY_BANDWIDTH, "cuda", bandwidth_of(op, "clone"), 0.7) for op in MOVES),
    Target(
        "LoRA linear",
        "≥ 1.25× PEFT, forward and backward, rank 16 to 128",
        "cuda",
        against("lora_linear", "PEFT", direction="forward+backward", n=1),
        1.25,
    ),
    Target("LoRA linear", "three adapters mixed ≤ 1.15× the time of one", "cuda", mixed_against_one, 1 / 1.15),
    Target(
        "Z head", "≥ 3× the full-vocabulary head + arg-max or multinomial", "cuda", against("z_select", *_HEAD), 3.0
    ),
    Target(_COMPRESS, "≥ 3× Hugging Face + PEFT, padded", "cuda", against("compress", PADDED, documents=many), 3.0),
    Target(
        "decompress",
        "≥ 10× `generate`, one document after another",
        "cuda",
        against("decompress", ONE_BY_ONE, documents=many),
        10.0,
    ),
    Target(
        "decompress", "≥ 3× `generate`, batched and padded", "cuda", against("decompress", BATCHED, documents=many), 3.0
    ),
)

ELSEWHERE = {"cpu": (), "cuda": ((_COMPRESS, "host share < 10 %"),)}
"""By device, targets that no case measures (op, target): the host's share is in the profile of `bench.profile_codec`."""


@dataclass(frozen=True)
class Verdict:
    """A target against results: the number of every case it speaks of, worst first."""

    target: Target
    values: tuple[tuple[str, float], ...]

    @property
    def met(self) -> int:
        return sum(value >= self.target.least for _, value in self.values)

    def measured(self) -> str:
        """Median, range and number of shapes."""
        if not self.values:
            return "not measured"
        numbers = [value for _, value in self.values]
        if len(numbers) == 1:
            return f"{numbers[0]:.2f}× (one shape)"
        return f"median {median(numbers):.2f}× ({numbers[0]:.2f}× to {numbers[-1]:.2f}×, {len(numbers)} shapes)"

    def said(self) -> str:
        """Met, or on how many shapes, and by how much the worst one misses."""
        if not self.values:
            return "–"
        if self.met == len(self.values):
            return "met"
        key, worst = self.values[0]
        missed = 1 - worst / self.target.least
        return f"**{'missed' if not self.met else f'met on {self.met} of {len(self.values)}'}**: {100 * missed:.0f} % short at {key}"


def judge(target: Target, cases: list[dict]) -> Verdict:
    """The verdict on the cases of the target's device."""
    cases = [case for case in cases if case["device"] == target.device]
    found = [(case["key"], value) for case in cases if (value := target.measure(case, cases)) is not None]
    return Verdict(target, tuple(sorted(found, key=lambda pair: pair[1])))
