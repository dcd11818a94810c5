"""Every variant of every kernel, as its wrapper launches it on a GPU."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from vllm_treespec.kernels.attention_plan import TileSizes, default_tiles
from vllm_treespec.kernels.compact_kv import chunk_size
from vllm_treespec.kernels.tree_attention import MERGED_PIECES, MERGED_ROWS

# A string is a run-time type, anything else the value of a constexpr or an option.
Arguments = dict[str, Any]


def tree_attention(dtype: str, group: int, head_size: int, **changes: Any) -> Arguments:
    element_size = 4 if dtype == "fp32" else 2
    rows = changes.pop("max_query_len", 33) * group
    tiles = default_tiles(rows, group, head_size, element_size)
    return attention_of(tiles, dtype, group, head_size) | changes


def attention_of(
    tiles: TileSizes, dtype: str, group: int, head_size: int, cache: str | None = None
) -> Arguments:
    scale = None if cache is None else "*fp32"
    return {
        "query_ptr": f"*{dtype}",
        "query_stride_token": "i32",
        "query_stride_head": "i32",
        "key_ptr": f"*{cache or dtype}",
        "key_stride_block": "i32",
        "key_stride_head": "i32",
        "key_stride_slot": "i32",
        "value_ptr": f"*{cache or dtype}",
        "value_stride_block": "i32",
        "value_stride_head": "i32",
        "value_stride_slot": "i32",
        "output_ptr": f"*{dtype}",
        "output_stride_token": "i32",
        "output_stride_head": "i32",
        "sinks_ptr": None,
        "key_scale_ptr": scale,
        "value_scale_ptr": scale,
        "query_start_loc_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "block_table_ptr": "*i32",
        "block_table_stride": "i32",
        "num_nodes_ptr": "*i32",
        "depths_ptr": "*i32",
        "depths_stride": "i32",
        "masks_ptr": "*i32",
        "masks_stride_req": "i32",
        "masks_stride_node": "i32",
        "weighted_ptr": None,
        "peaks_ptr": None,
        "totals_ptr": None,
        "cuts_ptr": None,
        "num_reqs": "i32",
        "num_kv_heads": "i32",
        "min_share": "i32",
        "scale": "fp32",
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": tiles.head_size_padded,
        "BLOCK_SIZE": 16,
        "SLIDING_WINDOW": 0,
        "SOFT_CAP": 0.0,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def quantized(cache: str, dtype: str, **changes: Any) -> Arguments:
    tiles = default_tiles(132, 4, 128, 2)
    return attention_of(tiles, dtype, 4, 128, cache) | changes


SPLIT = {
    "weighted_ptr": "*fp32",
    "peaks_ptr": "*fp32",
    "totals_ptr": "*fp32",
    "cuts_ptr": "*i32",
}


def merge_pieces(dtype: str, head_size: int, block_m: int) -> Arguments:
    return SPLIT | {
        "output_ptr": f"*{dtype}",
        "output_stride_token": "i32",
        "output_stride_head": "i32",
        "sinks_ptr": None,
        "GROUP": 4,
        "HEAD_SIZE": head_size,
        "HEAD_SIZE_PADDED": head_size,
        "BLOCK_M": block_m,
        "BLOCK_ROWS": MERGED_ROWS,
        "BLOCK_PIECES": MERGED_PIECES,
    }


def compact_kv(word: tl.dtype, row_words: int) -> Arguments:
    return {
        "layers_ptr": "*i64",
        "slots_ptr": "*i32",
        "root_positions_ptr": "*i32",
        "paths_ptr": "*i32",
        "paths_stride": "i32",
        "path_lens_ptr": "*i32",
        "WORD": word,
        "ROW_WORDS_PADDED": row_words,
        "CHUNK": chunk_size(row_words),
    }


def int32_arguments(*names: str, **others: Any) -> Arguments:
    int32s = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names}
    return int32s | others


def ancestor_mask(block_words: int, slots: str = "*i32") -> Arguments:
    return int32_arguments(
        "parents_ptr",
        "parents_stride",
        "num_nodes_ptr",
        "depths_ptr",
        "depths_stride",
        "masks_ptr",
        "masks_slot_stride",
        "masks_node_stride",
        "num_words",
        slots_ptr=slots,
        BLOCK_NODES=64,
        BLOCK_WORDS=block_words,
    )


def gather_positions(block_nodes: int) -> Arguments:
    return int32_arguments(
        "slots_ptr",
        "cu_num_logits_ptr",
        "query_start_loc_ptr",
        "num_nodes_ptr",
        "depths_ptr",
        "depths_stride",
        "row_num_nodes_ptr",
        "row_depths_ptr",
        "row_depths_stride",
        "root_positions_ptr",
        "num_reqs",
        positions_ptr="*i64",
        BLOCK_NODES=block_nodes,
    )


def gather_masks(block_words: int) -> Arguments:
    return int32_arguments(
        "slots_ptr",
        "cu_num_logits_ptr",
        "num_nodes_ptr",
        "masks_ptr",
        "masks_slot_stride",
        "masks_node_stride",
        "row_masks_ptr",
        "row_masks_row_stride",
        "row_masks_node_stride",
        "num_words",
        BLOCK_NODES=64,
        BLOCK_WORDS=block_words,
    )


def walk_tree(block_nodes: int) -> Arguments:
    return int32_arguments(
        "slots_ptr",
        "cu_num_logits_ptr",
        "token_ids_ptr",
        "token_ids_stride",
        "parents_ptr",
        "parents_stride",
        "num_nodes_ptr",
        "sampled_stride",
        "num_sampled_ptr",
        "paths_ptr",
        "paths_stride",
        "path_lens_ptr",
        "proposers_ptr",
        "counts_stride",
        "max_num_nodes",
        "num_proposers",
        target_ids_ptr="*i64",
        sampled_ptr="*i64",
        counts_ptr="*i64",
        NUM_RANKS=9,
        BLOCK_RANKS=16,
        BLOCK_NODES=block_nodes,
    )


def count_step(block_nodes: int, slots: str = "*i64") -> Arguments:
    return int32_arguments(
        "cu_num_logits_ptr",
        "num_nodes_ptr",
        "parents_ptr",
        "proposers_ptr",
        "tree_stride",
        "paths_ptr",
        "paths_stride",
        "path_lens_ptr",
        "counts_stride",
        "num_proposers",
        slots_ptr=slots,
        counts_ptr="*i64",
        NUM_RANKS=9,
        BLOCK_RANKS=16,
        BLOCK_NODES=block_nodes,
    )


def tally_candidates(
    block_nodes: int, slots: str = "*i64", tokens: str = "*i32"
) -> Arguments:
    return int32_arguments(
        "merged_token_ids_ptr",
        "merged_parents_ptr",
        "proposers_ptr",
        "own_scores_proposer_stride",
        "merged_stride",
        "num_merged_ptr",
        "sibling_bits_ptr",
        "token_ids_stride",
        "num_emitted_ptr",
        "sums_row_stride",
        "num_proposers",
        slots_ptr=slots,
        own_scores_ptr="*fp32",
        token_ids_ptr=tokens,
        num_tokens_ptr=tokens,
        slopes_ptr="*fp32",
        offsets_ptr="*fp32",
        sums_ptr="*fp32",
        BLOCK_NODES=block_nodes,
        num_warps=1,
    )


def learn_mixture() -> Arguments:
    return int32_arguments(
        "sums_row_stride",
        "memory_stride",
        "num_rows",
        sums_ptr="*fp32",
        slopes_ptr="*fp32",
        offsets_ptr="*fp32",
        memory_ptr="*fp32",
        BLOCK_ROWS=64,
        num_warps=1,
    )


def merge_candidates(
    block_candidates: int, block_nodes: int, slots: str = "*i64"
) -> Arguments:
    return int32_arguments(
        "token_ids_ptr",
        "parents_ptr",
        "candidates_proposer_stride",
        "candidates_req_stride",
        "num_candidates_ptr",
        "num_candidates_stride",
        "merged_token_ids_ptr",
        "merged_parents_ptr",
        "merged_proposers_ptr",
        "own_scores_proposer_stride",
        "merged_stride",
        "num_merged_ptr",
        "sibling_bits_ptr",
        "num_proposers",
        "max_num_merged",
        slots_ptr=slots,
        scores_ptr="*fp32",
        own_scores_ptr="*fp32",
        BLOCK_CANDIDATES=block_candidates,
        BLOCK_NODES=block_nodes,
        num_warps=1,
    )


def rate_candidates(
    block_nodes: int, slots: str = "*i64", is_drawn: str | None = None
) -> Arguments:
    return int32_arguments(
        "parents_ptr",
        "proposers_ptr",
        "own_scores_proposer_stride",
        "merged_stride",
        "num_merged_ptr",
        "sibling_bits_ptr",
        "num_proposers",
        slots_ptr=slots,
        own_scores_ptr="*fp32",
        scores_ptr="*fp32",
        slopes_ptr="*fp32",
        offsets_ptr="*fp32",
        is_drawn_ptr=is_drawn,
        BLOCK_NODES=block_nodes,
        num_warps=1,
    )


def select_nodes(
    block_candidates: int, block_drafts: int, chain_only: str = "*i1"
) -> Arguments:
    return int32_arguments(
        "slots_ptr",
        "token_ids_ptr",
        "parents_ptr",
        "proposers_ptr",
        "candidates_stride",
        "num_candidates_ptr",
        "max_nodes_ptr",
        "num_sampled_ptr",
        "num_nodes",
        "tree_token_ids_ptr",
        "tree_parents_ptr",
        "tree_proposers_ptr",
        "tree_stride",
        "tree_num_nodes_ptr",
        "max_num_drafts",
        scores_ptr="*fp32",
        chain_only_ptr=chain_only,
        draft_tokens_ptr="*i64",
        BLOCK_CANDIDATES=block_candidates,
        BLOCK_DRAFTS=block_drafts,
    )


def perturb_logits(logits: str = "*fp32") -> Arguments:
    return int32_arguments(
        "logits_stride",
        "positions_ptr",
        "first_node",
        "num_rows",
        "noisy_stride",
        "vocab_size",
        logits_ptr=logits,
        temperatures_ptr="*fp32",
        seeds_ptr="*i64",
        is_drawn_ptr="*i1",
        noisy_ptr="*fp32",
        SALT=0x51AB3D27,
        BLOCK_VOCAB=4096,
    )


def newest_tokens(slots: str = "*i64") -> Arguments:
    return int32_arguments(
        "num_sampled_ptr",
        "token_ids_ptr",
        "token_ids_stride",
        "num_tokens_ptr",
        "newest_ptr",
        "newest_stride",
        "max_new",
        slots_ptr=slots,
        BLOCK_NEW=32,
    )


def read_nodes(block_nodes: int, indices: str = "*i64") -> Arguments:
    return int32_arguments(
        "cu_num_logits_ptr",
        "input_ids_ptr",
        "texts_ptr",
        "texts_stride",
        "parents_ptr",
        "parents_stride",
        "num_nodes_ptr",
        "paths_ptr",
        "paths_stride",
        "path_lens_ptr",
        "sampled_stride",
        "num_logits",
        "num_reqs",
        slots_ptr=indices,
        logits_indices_ptr=indices,
        positions_ptr="*i64",
        sampled_ptr="*i64",
        contexts_ptr="*i64",
        roots_ptr="*i64",
        BLOCK_NODES=block_nodes,
        num_warps=1,
    )


def read_roots(slots: str = "*i64") -> Arguments:
    return int32_arguments(
        "num_tokens_ptr",
        "texts_ptr",
        "texts_stride",
        "num_reqs",
        slots_ptr=slots,
        roots_ptr="*i64",
        BLOCK_REQS=32,
        num_warps=1,
    )


TABLE = {
    "owners_ptr": "*i64",
    "table_ids_ptr": "*i32",
    "table_weights_ptr": "*fp32",
    "before_ptr": "*i64",
    "token_ids_ptr": "*i64",
}


def weigh_successors(values: str, block: int) -> Arguments:
    return int32_arguments(
        "num_contexts",
        "best_ids_stride",
        "best_values_stride",
        "num_best",
        "vocab_size",
        "num_rows",
        "successors_ptr",
        before_ptr="*i64",
        token_ids_ptr="*i64",
        best_ids_ptr="*i64",
        best_values_ptr=values,
        picks_ptr="*i64",
        keys_ptr="*i64",
        weights_ptr="*fp32",
        BLOCK_BEST=block,
        num_warps=1,
    )


def blend_successors(block_new: int, block_old: int) -> Arguments:
    return int32_arguments(
        "num_keys",
        "successors_ptr",
        "num_new",
        "vocab_size",
        "nobody",
        "num_old",
        "max_age",
        **TABLE,
        keys_ptr="*i64",
        entries_ptr="*i64",
        weights_ptr="*fp32",
        BLOCK_NEW=block_new,
        BLOCK_OLD=block_old,
        BLOCK=2 * block_old,
        num_warps=1,
    )


def learn_rates() -> Arguments:
    return int32_arguments(
        "emitted_stride",
        "num_emitted_ptr",
        "max_depth",
        "vocab_size",
        "num_rows",
        "k",
        **TABLE,
        emitted_ptr="*i64",
        right_ptr="*fp32",
        known_ptr="*fp32",
        BLOCK_K=16,
        num_warps=1,
    )


def fit_rates() -> Arguments:
    return {
        "right_ptr": "*fp32",
        "known_ptr": "*fp32",
        "knots_ptr": "*fp32",
        "BLOCK_BINS": 64,
    }


def grow_paths(active: str, block_nodes: int) -> Arguments:
    return int32_arguments(
        "vocab_size",
        "num_rows",
        "k",
        "found_ptr",
        "out_ids_ptr",
        "out_parents_ptr",
        "out_stride",
        "out_num_ptr",
        "max_nodes",
        **TABLE,
        active_ptr=active,
        knots_ptr="*fp32",
        out_scores_ptr="*fp32",
        DEPTH=8,
        BLOCK_K=16,
        BLOCK_NODES=block_nodes,
    )


def penalize_paths(vector: str = "*i32") -> Arguments:
    return int32_arguments(
        "logits_stride",
        "token_ids_ptr",
        "token_ids_stride",
        "parents_ptr",
        "parents_stride",
        "prompt_masks_ptr",
        "prompt_masks_stride",
        "output_counts_ptr",
        "output_counts_stride",
        "vocab_size",
        logits_ptr="*fp32",
        slots_ptr=vector,
        nodes_ptr=vector,
        repetition_ptr="*fp32",
        frequency_ptr="*fp32",
        presence_ptr="*fp32",
        BLOCK_SIZE=8192,
    )


def ban_words(vector: str = "*i32") -> Arguments:
    return int32_arguments(
        "logits_stride",
        "token_ids_ptr",
        "token_ids_stride",
        "parents_ptr",
        "parents_stride",
        "word_token_ids_ptr",
        "word_token_ids_stride",
        "word_starts_ptr",
        "word_starts_stride",
        "num_words_ptr",
        "all_token_ids_ptr",
        "all_token_ids_stride",
        "prompt_lens_ptr",
        "total_lens_ptr",
        logits_ptr="*fp32",
        slots_ptr=vector,
        nodes_ptr=vector,
    )


def walk_drawn(
    block_nodes: int, block_vocab: int = 4096, draft: str = "*bf16", **others: Any
) -> Arguments:
    return int32_arguments(
        "cu_num_logits_ptr",
        "target_logits_stride",
        "sources_ptr",
        "drawn_ptr",
        "token_ids_ptr",
        "parents_ptr",
        "num_nodes_ptr",
        "num_sampled_ptr",
        "path_nodes_ptr",
        "path_lengths_ptr",
        "num_reqs",
        "max_num_nodes",
        "vocab_size",
        slots_ptr="*i64",
        target_logits_ptr="*fp32",
        draft_logits_ptr=draft,
        temperatures_ptr="*fp32",
        seeds_ptr="*i64",
        positions_ptr="*i64",
        sampled_ptr="*i64",
        BLOCK_REQS=max(4096 // max(block_nodes, block_vocab), 1),
        BLOCK_NODES=block_nodes,
        BLOCK_VOCAB=block_vocab,
        **others,
    )


# "module:kernel variant" -> its arguments as the wrapper passes them.
SIGNATURES: dict[str, Arguments] = {
    "compact_kv:_compact_kv_kernel 8-byte words": compact_kv(tl.int64, 64),
    "compact_kv:_compact_kv_kernel 1-byte words": compact_kv(tl.int8, 2048),
    "tree_attention:_tree_attention_kernel bf16": tree_attention("bf16", 4, 128),
    "tree_attention:_tree_attention_kernel fp16 window": tree_attention(
        "fp16", 3, 80, SLIDING_WINDOW=4096
    ),
    "tree_attention:_tree_attention_kernel bf16 wide window soft-cap": tree_attention(
        "bf16", 2, 256, SLIDING_WINDOW=4096, SOFT_CAP=72.1, BLOCK_SIZE=544
    ),
    "tree_attention:_tree_attention_kernel fp32": tree_attention("fp32", 7, 64),
    "tree_attention:_tree_attention_kernel bf16 decode": tree_attention(
        "bf16",
        1,
        64,
        max_query_len=1,
        key_stride_block="i64",
        value_stride_block="i64",
    ),
    "tree_attention:_tree_attention_kernel bf16 split": tree_attention(
        "bf16", 4, 128, **SPLIT
    ),
    "tree_attention:_tree_attention_kernel fp16 wide window soft-cap split": (
        tree_attention("fp16", 2, 256, SLIDING_WINDOW=4096, SOFT_CAP=72.1, **SPLIT)
    ),
    "tree_attention:_tree_attention_kernel bf16 sinks": tree_attention(
        "bf16", 8, 64, SLIDING_WINDOW=128, sinks_ptr="*bf16"
    ),
    "tree_attention:_tree_attention_kernel e4m3": quantized("fp8e4nv", "bf16"),
    "tree_attention:_tree_attention_kernel e4m3 split sinks": quantized(
        "fp8e4nv", "fp16", sinks_ptr="*fp16", **SPLIT
    ),
    "tree_attention:_tree_attention_kernel e5m2": quantized("fp8e5", "bf16"),
    "tree_attention:_merge_pieces_kernel sinks": merge_pieces("bf16", 64, 16)
    | {"sinks_ptr": "*bf16"},
    "tree_attention:_merge_pieces_kernel": merge_pieces("bf16", 128, 128),
    "tree_attention:_merge_pieces_kernel wide": merge_pieces("fp16", 256, 64),
    "ancestor_mask:_ancestor_mask_kernel 1025 nodes": ancestor_mask(64),
    "ancestor_mask:_ancestor_mask_kernel long slots": ancestor_mask(2, slots="*i64"),
    "gather_trees:_gather_positions_kernel": gather_positions(64),
    "gather_trees:_gather_positions_kernel 1025 nodes": gather_positions(2048),
    "gather_trees:_gather_masks_kernel": gather_masks(2),
    "gather_trees:_gather_masks_kernel 1025 nodes": gather_masks(64),
    "penalize_paths:_penalize_paths_kernel": penalize_paths(),
    "penalize_paths:_penalize_paths_kernel long slots": penalize_paths("*i64"),
    "ban_words:_ban_words_kernel": ban_words(),
    "ban_words:_ban_words_kernel long slots": ban_words("*i64"),
    "walk_tree:_walk_tree_kernel": walk_tree(64),
    "walk_tree:_walk_tree_kernel 1025 nodes": walk_tree(2048),
    "walk_without_replacement:_walk_down_kernel": walk_drawn(64, REPLACED=False),
    "walk_without_replacement:_walk_down_kernel 1025 nodes": walk_drawn(
        2048, REPLACED=False
    ),
    "walk_without_replacement:_walk_down_kernel small vocabulary": walk_drawn(
        64, 512, "*fp32", REPLACED=False
    ),
    "walk_without_replacement:_walk_down_kernel iid": walk_drawn(
        64, draft="*fp16", REPLACED=True
    ),
    "walk_traversal:_walk_traversal_kernel": walk_drawn(64),
    "walk_traversal:_walk_traversal_kernel 1025 nodes": walk_drawn(2048),
    "walk_traversal:_walk_traversal_kernel small vocabulary": walk_drawn(
        64, 512, "*fp32"
    ),
    "count_step:_count_step_kernel": count_step(64),
    "count_step:_count_step_kernel short slots": count_step(32, "*i32"),
    "count_step:_count_step_kernel 1025 nodes": count_step(2048),
    "tally_candidates:_tally_candidates_kernel": tally_candidates(64),
    "tally_candidates:_tally_candidates_kernel long ids": tally_candidates(
        32, "*i32", "*i64"
    ),
    "tally_candidates:_tally_candidates_kernel 512 nodes": tally_candidates(512),
    "learn_mixture:_learn_mixture_kernel": learn_mixture(),
    "merge_candidates:_merge_candidates_kernel": merge_candidates(32, 64),
    "merge_candidates:_merge_candidates_kernel short slots": merge_candidates(
        8, 32, "*i32"
    ),
    "merge_candidates:_merge_candidates_kernel 512 nodes": merge_candidates(256, 512),
    "rate_candidates:_rate_candidates_kernel": rate_candidates(64),
    "rate_candidates:_rate_candidates_kernel drawn": rate_candidates(
        64, is_drawn="*i1"
    ),
    "rate_candidates:_rate_candidates_kernel 512 nodes": rate_candidates(512, "*i32"),
    "select_nodes:_select_nodes_kernel": select_nodes(64, 64),
    "select_nodes:_select_nodes_kernel int flags": select_nodes(64, 1, "*i32"),
    "select_nodes:_select_nodes_kernel 512 nodes": select_nodes(512, 1024),
    "newest_tokens:_newest_tokens_kernel": newest_tokens(),
    "newest_tokens:_newest_tokens_kernel short slots": newest_tokens("*i32"),
    "perturb_logits:_perturb_logits_kernel": perturb_logits(),
    "perturb_logits:_perturb_logits_kernel bf16": perturb_logits("*bf16"),
    "read_nodes:_read_nodes_kernel": read_nodes(32),
    "read_nodes:_read_nodes_kernel 1024 nodes": read_nodes(1024, "*i32"),
    "read_roots:_read_roots_kernel": read_roots(),
    "read_roots:_read_roots_kernel short slots": read_roots("*i32"),
    "weigh_successors:_weigh_successors_kernel": weigh_successors("*bf16", 16),
    "weigh_successors:_weigh_successors_kernel prompt": weigh_successors("*fp32", 1),
    "blend_successors:_blend_successors_kernel": blend_successors(16, 16),
    "blend_successors:_blend_successors_kernel prompt": blend_successors(1, 16),
    "learn_rates:_learn_rates_kernel": learn_rates(),
    "fit_rates:_fit_rates_kernel": fit_rates(),
    "grow_paths:_grow_paths_kernel": grow_paths("*i32", 64),
    "grow_paths:_grow_paths_kernel alone": grow_paths("*i1", 32),
}
