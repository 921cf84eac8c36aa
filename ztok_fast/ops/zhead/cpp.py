"""The Z head of the compiled CPU library; the requirements table loads it before it chooses this."""

import torch


def z_select(hidden, rows, temperature, top_p, seed, row_ids, step):
    """See `ztok_fast.ops.zhead.contract.z_select`.

    O(B V D) time; O(B V / 128) extra memory. With `top_p` below 1 a sampled row takes several times as long and O(V)
    memory per thread: all its logits are summed in float64 and sorted.
    """
    return torch.ops.ztok.z_select_native(hidden, rows, temperature, top_p, seed, row_ids, step)
