"""Attention for packed batches, registered with transformers under the name ``ztok``.

Two ways in. With ``cu_seq_lens_q`` the rows of all sequences lie one after another in a batch of one,
and each sequence attends causally to itself, whatever its position ids: the mask is said here and never
guessed from position ids. With a four-dimensional boolean mask (decoding over a cache) the mask is used
as it is. What else transformers may ask of an attention function (padding masks, sliding windows shorter than
the sequence, logit caps, sinks) is refused, never ignored.
"""

from __future__ import annotations

import inspect
import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ztok_fast.ops import ragged_pack, ragged_unpack

ATTENTION_NAME = "ztok"


def packed_attention(query, key, value, cu_seqlens, max_length: int, scaling: float | None):
    """Causal self-attention of every packed sequence to itself.

    Args:
        query: ``[T, H, d]``; ``key``, ``value``: ``[T, H_kv, d]`` with H a multiple of H_kv.
        cu_seqlens: int32 ``[B + 1]`` offsets; ``max_length`` the longest sequence.

    Returns:
        ``[T, H, d]``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, cu_seqlens, max_length, scaling)
    if query.is_cpu:
        return _runs(query, key, value, cu_seqlens, scaling)
    return _padded(query, key, value, cu_seqlens, max_length, scaling)


def _runs(query, key, value, cu_seqlens, scaling):
    """Neighbours of equal length share a call, as a batch that views the packed rows; nothing is padded or copied.

    The lengths are read on the host, which is free on the CPU alone.
    """
    runs = [(length, sum(1 for _ in same)) for length, same in itertools.groupby(cu_seqlens.diff().tolist()) if length]
    sizes = [length * count for length, count in runs]
    outs = []
    for (length, count), *parts in zip(runs, *(x.split(sizes) for x in (query, key, value))):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if outs else query.clone()  # no rows


def _padded(query, key, value, cu_seqlens, max_length, scaling):
    """What is left for a GPU in float32, which has no kernel for packed sequences."""
    # Padding lies to the right of each sequence, so the causal mask alone keeps it out of every valid row.
    q, k, v = (ragged_unpack(x, cu_seqlens, max_length).transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return ragged_pack(out.transpose(1, 2).contiguous(), cu_seqlens, query.shape[0])


def _varlen(query, key, value, cu_seqlens, max_length, scaling):
    from torch.nn.attention.varlen import varlen_attn

    # The causal switch was renamed between torch releases: a window of (-1, 0) replaced `is_causal`.
    renamed = "is_causal" not in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if renamed else {"is_causal": True}
    cu = cu_seqlens.to(torch.int32)
    return varlen_attn(query, key, value, cu, cu, max_length, max_length, scale=scaling, **causal)


def masked_attention(query, key, value, mask, scaling: float | None):
    """Attention ``[B, H, Tq, d]`` over ``[B, H_kv, Tk, d]`` with a boolean mask ``[B, 1, Tq, Tk]``.

    The heads that share a key head are folded into the query rows, so the cache is never expanded.
    """
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    folded = query.reshape(batch, kv_heads, groups * rows, width)
    if mask is not None and groups > 1:
        if rows == 1:
            mask = mask.expand(batch, 1, groups, mask.shape[-1])  # a step of decoding: nothing to copy
        else:
            mask = mask.expand(batch, 1, rows, mask.shape[-1]).repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, width)


def ztok_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The function transformers calls: ``[B, H, T, d]`` in, ``([B, T, H, d], None)`` out.

    Raises:
        ValueError: several packed rows, or what this attention does not do (see the module's docstring).
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    _refuse_others(key.shape[2] if cu_seqlens is None else kwargs["max_length_q"], kwargs)
    if cu_seqlens is not None:
        if query.shape[0] != 1:
            raise ValueError(f"packed attention: expected a batch of one packed row, got {query.shape[0]}")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return packed_attention(q, k, v, cu_seqlens, kwargs["max_length_q"], scaling)[None], None
    if attention_mask is None:
        if 1 < query.shape[2] < key.shape[2]:
            raise ValueError(
                f"attention: expected an explicit mask for {query.shape[2]} new rows over {key.shape[2]} cached ones, "
                "got none"
            )
        groups = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = scaled_dot_product_attention(query, k, v, is_causal=query.shape[2] > 1, scale=scaling)
    else:
        out = masked_attention(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2), None


def _refuse_others(longest: int, kwargs: dict) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and longest > window:
        raise ValueError(f"attention: expected at most {window} rows (the base's sliding window), got {longest}")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attention: expected a base model without {name}, which is not implemented, got one with it"
            )


def no_mask(*args, attention_mask=None, **kwargs) -> None:
    """Packed batches carry their structure in ``cu_seq_lens_q``; no mask tensor is built.

    Raises:
        ValueError: a padding mask that hides something, which plain causal attention would not honour.
    """
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        raise ValueError("attention_mask: expected none, a four-dimensional one or one without padding, got padding")


def register() -> None:
    """Make ``attn_implementation="ztok"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, ztok_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, no_mask)
