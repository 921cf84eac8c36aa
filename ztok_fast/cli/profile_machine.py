"""What the machine reaches now, what a run needs of it, and how much memory it takes: for `ztok bench`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ztok_fast.codec.adapters import find_decoder, find_layers
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.ops import int8_linear, int8_pack
from ztok_fast.profiling import HEAD, MODEL, Profile

CALIBRATION_SECONDS = 0.15
WIDTH = 1024


@dataclass
class Marks:
    """Products (multiply and add, counted as one) and bytes per second, and by what call they were reached."""

    products: float
    products_by: str
    read: float
    read_by: str
    read_bytes: int

    def best(self, other: Marks) -> Marks:
        """The higher rate of each kind."""
        products = max(self, other, key=lambda own: own.products)
        read = max(self, other, key=lambda own: own.read)
        return Marks(products.products, products.products_by, read.read, read.read_by, self.read_bytes)


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """The least seconds that a call takes, of those made in that time."""
    call()
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@torch.inference_mode()
def calibrate(precision: str, weight_bytes: int, seconds: float = CALIBRATION_SECONDS) -> Marks:
    """Measure products in the arithmetic of an engine, and reads of as many bytes as the weights have.

    A small model's weights stay in the caches, so reading them is faster than reading memory: hence the same size.
    """
    generator = torch.Generator().manual_seed(0)
    if precision == "int8":
        panels, scales = int8_pack(torch.randn(WIDTH, WIDTH, generator=generator))
        products, by = 0.0, ""
        for rows in (128, 512):
            x = torch.randn(rows, WIDTH, generator=generator)
            rate = rows * WIDTH**2 / _fastest(lambda x=x: int8_linear(x, panels, scales, WIDTH), seconds / 2)  # type: ignore[misc]
            if rate > products:
                products, by = rate, f"int8_linear, {rows} rows"
    else:
        x, weight = torch.randn(512, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
        products, by = 512 * WIDTH**2 / _fastest(lambda: torch.mm(x, weight), seconds), "torch.mm in float32, 512 rows"
    count = max(1 << 16, weight_bytes // 4)
    values = torch.ones(count)
    read, read_by = 4 * count / _fastest(values.sum, seconds / 2), "torch.sum"
    del values
    if precision == "int8":
        out = max(16, weight_bytes // WIDTH // 16 * 16)
        panels = torch.randint(0, 255, (out // 16, WIDTH // 4, 16, 4), dtype=torch.uint8, generator=generator)
        scales, row = torch.ones(out), torch.randn(1, WIDTH, generator=generator)
        rate = panels.numel() / _fastest(lambda: int8_linear(row, panels, scales, out), seconds / 2)
        if rate > read:
            read, read_by = rate, "int8_linear, 1 row"
    return Marks(products, by, read, read_by, 4 * count)


@dataclass
class Weights:
    """Numbers of weights that a pass reads: of each layer's linear layers, and of the head."""

    layers: list[int]
    head: int
    bytes_each: int

    @classmethod
    def of(cls, codec: ZTokCodec, precision: str) -> Weights:
        model = codec.model.adapted.model
        _, stack = find_layers(find_decoder(model))
        layers = [
            sum(
                module.weight.numel()
                for name, module in layer.named_modules()
                if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name
            )
            for layer in stack
        ]
        return cls(layers, model.get_output_embeddings().weight.numel(), 1 if precision == "int8" else 4)

    def of_pass(self, layers: int | None) -> int:
        return sum(self.layers if layers is None else self.layers[:layers])


def least_seconds(profile: Profile, weights: Weights, marks: Marks) -> dict[str, float]:
    """The least time that the marks allow for the linear layers of the passes and for the head, by stage.

    Each pass has to make its products and to read its weights once; whichever takes longer is its least time.
    Attention, norms, adapters that are not folded in, and the codec's own small layers are not counted.
    """
    found = {MODEL: 0.0, HEAD: 0.0}
    for span in profile.spans:
        if span.name in found and span.rows:
            own = weights.of_pass(span.layers) if span.name == MODEL else weights.head
            found[span.name] += max(span.rows * own / marks.products, own * weights.bytes_each / marks.read)
    return found


def reset_peak() -> bool:
    """Let the kernel begin the peak of the memory anew; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory(which: str) -> int:
    """Bytes of memory that the process has ("VmRSS") or had at its peak ("VmHWM")."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
