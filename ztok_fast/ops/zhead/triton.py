"""Triton backend of the Z head: host side. The kernels are in `triton_kernels.py`.

Extra memory: nine numbers per sequence and part of the codes; no logits.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.nearest.triton_bound import error_bound
from ztok_fast.ops.triton_launch import Tiles, parts_of
from ztok_fast.ops.zhead import triton_kernels as kernels

# blocks that fill the device, and the most parts that one program merges at once
FULL_BLOCKS, MOST_PARTS = 256, 256


_scan_tiles = functools.partial(Tiles, kernels.scan_kernel, "BB BV BK", key=("D", "SAMPLE"))
SCAN = _scan_tiles((16, 128, 64, 8, 3), (16, 128, 64, 4, 3), (16, 128, 128, 8, 3), maxnreg=255)
# float32 is multiplied without tensor cores, in registers
SCAN_FLOAT32 = _scan_tiles((16, 64, 32, 8, 4), (16, 64, 32, 4, 4), maxnreg=128)
SELECT = Tiles(kernels.select_kernel, "BC BK", (32, 64, 4))


def z_select(hidden, rows, temperature, top_p, seed, row_ids, step) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.z_select`; `top_p` is 1 or the temperature 0, as the op says.

    Work: the rows are read once per tile of 16 sequences. A logit whose partial sums overflow float32 counts as
    infinite.
    """
    batch, width = hidden.shape
    num_codes = rows.shape[0]
    codes = torch.empty(batch, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(batch, dtype=torch.float32, device=hidden.device)
    if batch == 0:
        return codes, log_probs
    sample = temperature > 0
    words = struct.unpack("<5i", struct.pack("<dQI", temperature, seed, step))
    key = dict(zip(kernels.KEY, words, strict=True))
    scan = SCAN_FLOAT32 if hidden.dtype == torch.float32 else SCAN
    blocks, tiles = triton.cdiv(batch, scan.BB), triton.cdiv(num_codes, scan.BV)
    parts, tiles_per_part = parts_of(tiles, blocks, FULL_BLOCKS, MOST_PARTS)
    scores = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    indices = torch.empty((2, batch, parts), dtype=torch.int32, device=hidden.device)
    sums = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    constants = {"D": width, "SAMPLE": sample, "ROW_IDS": row_ids is not None}
    scan[blocks, parts](
        hidden, rows, row_ids, scores, indices, sums, batch, num_codes, tiles_per_part, parts, **key, **constants,
        UPCAST=triton_is_interpreted(),
    )  # fmt: skip
    # float32 products are summed one by one
    terms = 16 * width if hidden.dtype == torch.float32 else width
    SELECT[(batch,)](
        hidden, rows, row_ids, scores, indices, sums, codes, log_probs, num_codes, parts, **key, **constants,
        BOUND=error_bound(terms, 1, 1), P=max(2, triton.next_power_of_2(parts)),
    )  # fmt: skip
    return codes, log_probs
