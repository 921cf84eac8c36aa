"""Compile cases of the Z head, sampling, from the tables' entries."""

from tests.ops.aot_case import Case, capability_of, text_of

MODULE = "ztok_fast.ops.zhead.triton_kernels"
TENSORS = {"row_ids": "*i64", "scores": "*fp32", "indices": "*i32", "sums": "*fp32", "V": "i32", "parts": "i32"}
KEY = dict.fromkeys(("temperature_low", "temperature_high", "seed_low", "seed_high", "step"), "i32")
CONSTANTS = {"D": 576, "SAMPLE": True, "ROW_IDS": True}


def scan(arch, key, tile):
    """`scan_kernel`, in half precision (wgmma on sm_90) or float32 (products one by one)."""
    kind = {2: "*bf16", 4: "*fp32"}[key[1]]
    yield Case(
        f"zhead-scan-{text_of(key)}-{arch}", f"{MODULE}:scan_kernel",
        {"hidden": kind, "rows": kind, **TENSORS, "B": "i32", "tiles": "i32", **KEY},
        {**CONSTANTS, "UPCAST": False, "BB": tile.sequences, "BV": tile.codes, "BK": tile.width},
        tile.warps, tile.stages, capabilities=(capability_of(arch),),
        sm90_needs=("wgmma",) if key[1] == 2 else (),
    )  # fmt: skip


def select(arch, key, tile):
    """`select_kernel` with the most parts that it may have to merge."""
    from ztok_fast.ops.zhead.triton_configs import MOST_PARTS

    for kind in ("bf16", "fp32"):
        yield Case(
            f"zhead-select-{kind}-{text_of(key)}-{arch}", f"{MODULE}:select_kernel",
            {"hidden": f"*{kind}", "rows": f"*{kind}", **TENSORS, "codes": "*i32", "log_probs": "*fp32", **KEY},
            {**CONSTANTS, "REL": 1e-5, "P": MOST_PARTS, "BC": tile.codes, "BK": tile.width},
            tile.warps, capabilities=(capability_of(arch),),
        )  # fmt: skip


TABLES = {"SCAN": scan, "SELECT": select}
QUICK = ("zhead-scan-16-2-sm_90", "zhead-select-bf16-any-sm_80")
