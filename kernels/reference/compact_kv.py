"""Compaction of accepted paths, one layer and one request at a time."""

import torch

from vllm_treespec.kernels.compact_kv import KVLayers


def compact_kv(
    layers: KVLayers,
    slots: torch.Tensor,  # [num_reqs] int, batch row -> request slot
    root_positions: torch.Tensor,  # [num_reqs] int32
    paths: torch.Tensor,  # [num_reqs, max_num_nodes] int32, stale past path_lens
    path_lens: torch.Tensor,  # [num_reqs] int32
) -> None:
    for row, path_len in enumerate(path_lens.tolist()):
        if path_len == 0:
            continue
        root = int(root_positions[row])
        source = root + paths[row, 1 : path_len + 1].long()
        target = root + torch.arange(1, path_len + 1, device=source.device)
        for cache, block_table in zip(layers.caches, layers.block_tables, strict=True):
            blocks = block_table[int(slots[row])].long()
            block_size = cache.shape[2]
            raw = cache.view(torch.uint8)
            # Indexing copies, so a source that is also a target is read first.
            moved = raw[blocks[source // block_size], :, source % block_size]
            raw[blocks[target // block_size], :, target % block_size] = moved
