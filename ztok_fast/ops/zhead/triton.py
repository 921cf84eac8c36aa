"""Triton backend of the Z head: host side. The kernels are in `triton_kernels.py`.

Extra memory: nine numbers per sequence and part of the codes; no logits.
"""

from __future__ import annotations

import struct

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.nearest.triton_error import relative_error
from ztok_fast.ops.triton_tables import FUSION, capability_of, look_up
from ztok_fast.ops.zhead import triton_configs as configs
from ztok_fast.ops.zhead import triton_kernels as kernels


def z_select(
    hidden: Tensor,
    rows: Tensor,
    temperature: float,
    top_p: float,
    seed: int,
    row_ids: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.z_select`; `top_p` is 1 or the temperature 0, as the op says.

    Work: the rows are read once per tile of 16 or 32 sequences. A logit whose partial sums overflow float32 counts as
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
    capability = capability_of(hidden)
    tile = look_up(configs.SCAN, capability, batch, hidden.element_size())
    blocks, tiles = triton.cdiv(batch, tile.sequences), triton.cdiv(num_codes, tile.codes)
    parts = max(1, min(tiles, configs.MOST_PARTS, configs.FULL_BLOCKS // blocks))
    tiles_per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, tiles_per_part)
    scores = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    indices = torch.empty((2, batch, parts), dtype=torch.int32, device=hidden.device)
    sums = torch.empty((3, batch, parts), dtype=torch.float32, device=hidden.device)
    constants = {"D": width, "SAMPLE": sample, "ROW_IDS": row_ids is not None, **FUSION}
    kernels.scan_kernel[(blocks, parts)](
        hidden, rows, row_ids, scores, indices, sums, batch, num_codes, tiles_per_part, parts, **key, **constants,
        UPCAST=triton_is_interpreted(), BB=tile.sequences, BV=tile.codes, BK=tile.width,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    # float32 products are summed one by one
    terms = 16 * width if hidden.dtype == torch.float32 else width
    select = look_up(configs.SELECT, capability, width)
    kernels.select_kernel[(batch,)](
        hidden, rows, row_ids, scores, indices, sums, codes, log_probs, num_codes, parts, **key, **constants,
        REL=relative_error(terms, 1, 1), P=max(2, triton.next_power_of_2(parts)), BC=select.codes, BK=select.width,
        num_warps=select.warps,
    )  # fmt: skip
    return codes, log_probs
