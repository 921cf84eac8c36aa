"""Triton backend of the Z head: host side. The kernels are in `triton_kernels.py`.

Extra memory: nine numbers per sequence and part of the codes; no logits.
"""

from __future__ import annotations

import struct

import torch
import triton
from torch import Tensor

from ztok_fast.ops.nearest.triton_configs import FUSION
from ztok_fast.ops.nearest.triton_error import relative_error
from ztok_fast.ops.requirements import triton_is_interpreted
from ztok_fast.ops.zhead import triton_kernels as kernels

# bytes of an element -> sequences x codes x width of a tile, warps, stages; from resource reports, not from timings
TILES = {2: (16, 128, 64, 8, 3), 4: (16, 64, 32, 8, 4)}
# codes per step of the float64 search, and width of a step of it
EXACT_CODES, EXACT_WIDTH = 32, 64
# blocks that fill the device, and the most parts that one program merges at once
FULL_BLOCKS, MOST_PARTS = 256, 256


def z_select(
    hidden: Tensor,
    rows: Tensor,
    temperature: float,
    top_p: float,
    seed: int,
    row_ids: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.zhead.contract.z_select`; `top_p` is 1 or the temperature 0, as the requirements table says.

    Work: the rows are read once per 16 sequences. A logit whose partial sums overflow float32 counts as infinite.
    """
    batch, width = hidden.shape
    num_codes = rows.shape[0]
    codes = torch.empty(batch, dtype=torch.int32, device=hidden.device)
    log_probs = torch.empty(batch, dtype=torch.float32, device=hidden.device)
    if batch == 0:
        return codes, log_probs
    hidden, rows = hidden.contiguous(), rows.contiguous()
    sample = temperature > 0
    words = struct.unpack("<5i", struct.pack("<dQI", temperature, seed, step))
    key = dict(zip(kernels.KEY, words, strict=True))
    tile_batch, tile_codes, tile_width, warps, stages = TILES[hidden.element_size()]
    blocks, tiles = triton.cdiv(batch, tile_batch), triton.cdiv(num_codes, tile_codes)
    parts = max(1, min(tiles, MOST_PARTS, FULL_BLOCKS // blocks))
    tiles_per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, tiles_per_part)
    scores = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    indices = torch.empty((2, batch, parts), dtype=torch.int32, device=hidden.device)
    sums = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    constants = {"D": width, "SAMPLE": sample, "ROW_IDS": row_ids is not None, **FUSION}
    kernels.scan_kernel[(blocks, parts)](
        hidden, rows, row_ids, scores, indices, sums, batch, num_codes, tiles_per_part, parts, **key, **constants,
        UPCAST=triton_is_interpreted(), BB=tile_batch, BV=tile_codes, BK=tile_width, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    # float32 products are summed one by one
    terms = 16 * width if hidden.dtype == torch.float32 else width
    kernels.select_kernel[(batch,)](
        hidden, rows, row_ids, scores, indices, sums, codes, log_probs, num_codes, parts, **key, **constants,
        REL=relative_error(terms, 1, 1), P=max(2, triton.next_power_of_2(parts)), BC=EXACT_CODES, BK=EXACT_WIDTH,
        num_warps=4,
    )  # fmt: skip
    return codes, log_probs
