"""The speed targets of the project, as data: which cases, which comparison, which threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench import results
from bench.codec.runs import BATCHED, ONE_BY_ONE, PADDED


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


def against(
    op: str, *baselines: str, direction: str = "forward", **sizes
) -> Callable[[dict, list[dict]], float | None]:
    """Speed of the preferred backend against the first of `baselines` that was measured, on cases of the given sizes.

    Args:
        sizes: a value, or a predicate on the value; `dtype` is compared with the case's dtype.
    """

    def measure(case, cases):
        if case["op"] != op or case["direction"] != direction or not _has(case, sizes):
            return None
        ours = results.default_backend(case)
        theirs = next(filter(None, (results.measured(case, name) for name in baselines)), None)
        return results.seconds(theirs) / results.seconds(ours) if ours and theirs else None

    return measure


def bandwidth_of(op: str, mark: str) -> Callable[[dict, list[dict]], float | None]:
    """Bytes per second of the preferred backend's forward pass against those of a mark, each counting its own bytes."""

    def measure(case, cases):
        if case["op"] != op or case["direction"] != "forward":
            return None
        ours, theirs = results.default_backend(case), results.measured(case, mark)
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


MOVES = ("ragged_pack", "ragged_unpack", "ragged_gather")
_MASKS = {"ragged_pack": "boolean mask", "ragged_unpack": "boolean mask", "ragged_gather": "boolean masks"}
_UNPAD = {"ragged_pack": "flash-attn unpad", "ragged_unpack": "flash-attn pad", "ragged_gather": "boolean masks"}
COPY_BANDWIDTH = "≥ 70 % of the bandwidth of a copy (torch.clone of a tensor as large as the result)"
_COMPRESS = "compress, mixed-length documents"
_HEAD = ("full head + arg-max", "full head + multinomial")
_VECTOR_QUANTIZE = "vector-quantize-pytorch"


def many(documents: int) -> bool:
    """A single document has nothing to pad and nothing to batch."""
    return documents > 1


def _nearest(*baselines: str, **sizes):
    return against("codebook_assign", *baselines, **sizes)


def _codec(op: str, baseline: str):
    return against(op, baseline, documents=many)


def _of_device(device: str, *rows) -> tuple[Target, ...]:
    return tuple(Target(op, text, device, measure, least) for op, text, measure, least in rows)


TARGETS: tuple[Target, ...] = _of_device(
    "cpu",
    ("nearest code", "≥ 1.5× faiss IndexFlatL2, d = 64", _nearest("faiss", d=64), 1.5),
    ("nearest code", "≥ 1.2× faiss IndexFlatL2, d = 576", _nearest("faiss", d=576), 1.2),
    ("nearest code", "≥ 1.0× the bare torch.mm of the same shape, fp32", _nearest("mm", dtype="float32"), 1.0),
    ("residual search", "≥ 3× vector-quantize-pytorch ResidualVQ, L = 4",
     against("residual_quantize", _VECTOR_QUANTIZE, L=4), 3.0),
    *((op, "≥ 3× boolean masks", against(op, _MASKS[op]), 3.0) for op in MOVES),
    *((op, COPY_BANDWIDTH, bandwidth_of(op, "clone"), 0.7) for op in MOVES),
    ("LoRA linear", "≥ 1.2× PEFT, forward", against("lora_linear", "PEFT"), 1.2),
    ("Z head", "≥ 5× the full-vocabulary head + arg-max or multinomial", against("z_select", *_HEAD), 5.0),
    (_COMPRESS, "≥ 2× Hugging Face + PEFT, padded", _codec("compress", PADDED), 2.0),
    ("decompress", "≥ 5× `generate`, one document after another", _codec("decompress", ONE_BY_ONE), 5.0),
    ("decompress", "≥ 2× `generate`, batched and padded", _codec("decompress", BATCHED), 2.0),
) + _of_device(
    "cuda",
    ("nearest code", "≤ 1.15× the time of the bare matmul, bf16",
     _nearest("mm", "mm in blocks", dtype="bfloat16"), 1 / 1.15),
    ("nearest code", "≥ 1.0× flash-kmeans, d = 128", _nearest("flash-kmeans", dtype="bfloat16", d=128), 1.0),
    ("nearest code", "≥ 1.5× flash-kmeans, d ≥ 1024",
     _nearest("flash-kmeans", dtype="bfloat16", d=lambda d: d >= 1024), 1.5),
    ("nearest code", "≥ 5× vector-quantize-pytorch", _nearest(_VECTOR_QUANTIZE), 5.0),
    ("residual search", "≥ 5× vector-quantize-pytorch ResidualVQ, L = 4",
     against("residual_quantize", _VECTOR_QUANTIZE, L=4), 5.0),
    *((op, f"≥ 3× {_UNPAD[op]}, end to end", against(op, _UNPAD[op]), 3.0) for op in MOVES),
    *((op, COPY_BANDWIDTH, bandwidth_of(op, "clone"), 0.7) for op in MOVES),
    ("LoRA linear", "≥ 1.25× PEFT, forward and backward, rank 16 to 128",
     against("lora_linear", "PEFT", direction="forward+backward", n=1), 1.25),
    ("LoRA linear", "three adapters mixed ≤ 1.15× the time of one", mixed_against_one, 1 / 1.15),
    ("Z head", "≥ 3× the full-vocabulary head + arg-max or multinomial", against("z_select", *_HEAD), 3.0),
    (_COMPRESS, "≥ 3× Hugging Face + PEFT, padded", _codec("compress", PADDED), 3.0),
    ("decompress", "≥ 10× `generate`, one document after another", _codec("decompress", ONE_BY_ONE), 10.0),
    ("decompress", "≥ 3× `generate`, batched and padded", _codec("decompress", BATCHED), 3.0),
)  # fmt: skip


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
        met = f"met on {self.met} of {len(self.values)}" if self.met else "missed"
        return f"**{met}**: {100 * missed:.0f} % short at {key}"


def judge(target: Target, cases: list[dict]) -> Verdict:
    """The verdict on the cases of the target's device."""
    cases = [case for case in cases if case["device"] == target.device]
    found = [(case["key"], value) for case in cases if (value := target.measure(case, cases)) is not None]
    return Verdict(target, tuple(sorted(found, key=lambda pair: pair[1])))
