"""FlashAttention's function as vLLM calls it, in plain torch."""

from __future__ import annotations

import torch

from vllm_treespec.kernels.reference.tree_attention import tree_attention


def flash_attn_varlen_func(
    q: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    v: torch.Tensor,  # as k
    out: torch.Tensor,  # as q, written in place
    *,
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
    """Attention of causal rows over a paged cache."""
    num_reqs = seqused_k.shape[0]
    assert causal and fa_version in (2, 3), "all that is asked of it"
    assert cu_seqlens_q.shape == (num_reqs + 1,) and len(block_table) == num_reqs
    assert q.shape[0] == int(cu_seqlens_q[-1]), "rows that no request has"
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k >= int(seqused_k.max())
    no_trees = torch.zeros(num_reqs, 1, 1, dtype=torch.int32, device=q.device)
    tree_attention(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        out,
        cu_seqlens_q,
        seqused_k,
        block_table,
        no_trees[:, 0, 0],
        no_trees[:, 0],
        no_trees,
        max_query_len=max_seqlen_q,
        scale=softmax_scale,
        sliding_window=None if window_size[0] < 0 else window_size[0] + 1,
        soft_cap=softcap or None,
        sinks=s_aux,
    )
    return out
