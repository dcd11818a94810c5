"""FlashAttention's function as vLLM calls it, in plain torch."""

from __future__ import annotations

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    v: torch.Tensor,  # as k
    *,
    out: torch.Tensor,  # as q
    cu_seqlens_q: torch.Tensor,  # [num_reqs + 1] int32
    max_seqlen_q: int,
    seqused_k: torch.Tensor,  # [num_reqs] int32
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],  # keys to the left and to the right, -1: all
    softcap: float,  # 0: none
    block_table: torch.Tensor,  # [num_reqs, max_num_blocks] int32
    fa_version: int,
    s_aux: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:
    """Attention over a paged cache."""
    query_lens, num_keys = cu_seqlens_q.diff().tolist(), seqused_k.tolist()
    assert fa_version in (2, 3, 4), "all that is asked of it"
    assert len(query_lens) == len(num_keys) == len(block_table)
    assert sum(query_lens) == len(q) and cu_seqlens_q[0] == 0
    assert max_seqlen_q >= max(query_lens) and max_seqlen_k >= max(num_keys)
    for req, (query_len, num_seen) in enumerate(zip(query_lens, num_keys, strict=True)):
        rows = slice(int(cu_seqlens_q[req]), int(cu_seqlens_q[req + 1]))
        keys, values = (
            cache[block_table[req].long()].flatten(0, 1)[:num_seen].float()
            for cache in (k, v)
        )
        query = q[rows].float().reshape(query_len, keys.shape[1], -1, q.shape[2])
        scores = torch.einsum("qhgd,khd->hgqk", query, keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(num_seen - query_len, num_seen)[:, None]
        distance = distance - torch.arange(num_seen)
        hidden = (distance < 0) & causal
        if window_size[0] >= 0:
            hidden |= distance > window_size[0]
        scores = scores.masked_fill(hidden, -torch.inf).flatten(0, 1)
        if s_aux is not None:
            sinks = s_aux.float()[:, None, None].expand(-1, query_len, 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(2)[..., :num_seen]
        weights = weights.reshape(keys.shape[1], -1, query_len, num_seen)
        attended = torch.einsum("hgqk,khd->qhgd", weights, values)
        out[rows] = attended.flatten(1, 2).to(q.dtype)
    return out
