"""Paged attention in which a request's last keys may be a token tree."""

import math

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.attention_plan import SplitBuffers, TileSizes, tile_sizes

MAX_HEAD_SIZE = 256
WORD_BITS = tl.constexpr(32)  # nodes per int32 mask word
WORD_SHIFT = tl.constexpr(5)  # rounds down where // would round to zero

# Scores are in base 2: exp2 is the hardware's exponential.
LOG2_E = tl.constexpr(math.log2(math.e))
# Finite, so that a row which has seen nothing yet never computes inf - inf.
NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _find_request(query_start_loc_ptr, tile, num_reqs, BLOCK_Q: tl.constexpr):
    """Last request whose first tile is not after ``tile``."""
    low = tl.full((), 0, tl.int32)
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _load_tile(
    cache_ptrs, block, slot, stride_block, stride_slot, in_tile, DTYPE: tl.constexpr
):
    row = block * stride_block + slot * stride_slot
    return tl.load(cache_ptrs + row[:, None], mask=in_tile, other=0.0).to(DTYPE)


@triton.jit
def _scores(query, keys, scale, SOFT_CAP: tl.constexpr):
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if SOFT_CAP > 0:
        # tanh by the exponential that cannot overflow; libdevice's is CUDA only.
        decay = tl.exp(-2.0 / SOFT_CAP * tl.abs(scores))
        tanh = (1.0 - decay) / (1.0 + decay)
        scores = SOFT_CAP * tl.where(scores < 0, -tanh, tanh)
    return scores


@triton.jit
def _online_softmax(scores, values, peak, total, weighted):
    """Fold one tile of keys into the running maximum, denominator and numerator."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = weights.to(values.dtype)
    weighted *= shrink[:, None]
    weighted = tl.dot(weights, values, weighted, input_precision="ieee")
    return new_peak, total, weighted


@triton.jit
def _add_sink(sinks_ptr, head, peak, total):
    """A sink is a key without a value. Returns what the numerator is to shrink by, too."""
    sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    new_peak = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - new_peak)
    return new_peak, total * shrink + tl.exp2(sink - new_peak), shrink


@triton.jit
def _log_sum(peak, total):
    """In base e, and minus infinity where nothing was seen."""
    seen = total > 0
    log_sum = peak + tl.log2(tl.where(seen, total, 1.0))
    return tl.where(seen, log_sum / LOG2_E, float("-inf"))


# More than 20 arguments only by strides: query, caches and output are all views.
@triton.jit(do_not_specialize=["num_reqs"])
def _tree_attention_kernel(
    query_ptr,
    query_stride_token,
    query_stride_head,
    key_ptr,
    key_stride_block,
    key_stride_head,
    key_stride_slot,
    value_ptr,
    value_stride_block,
    value_stride_head,
    value_stride_slot,
    output_ptr,
    output_stride_token,
    output_stride_head,
    log_sums_ptr,  # None: not asked for
    log_sums_stride_token,
    log_sums_stride_head,
    sinks_ptr,  # None: the layer has none
    key_scale_ptr,  # None: the caches are not quantized
    value_scale_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    first_keys_ptr,  # None: from the first
    block_table_ptr,
    block_table_stride,
    num_nodes_ptr,
    depths_ptr,
    depths_stride,
    masks_ptr,
    masks_stride_req,
    masks_stride_node,
    weighted_ptr,  # None: the context is not split
    peaks_ptr,
    totals_ptr,
    num_reqs,
    scale,
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # of the KV cache
    SLIDING_WINDOW: tl.constexpr,  # 0: none
    SOFT_CAP: tl.constexpr,  # 0: none; in base 2, as the scores
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A request gets one tile more than it may need: its first tile's number is then
    # known without a prefix sum over tile counts.
    tile = tl.program_id(0)
    req = _find_request(query_start_loc_ptr, tile, num_reqs, BLOCK_Q)
    query_start = tl.load(query_start_loc_ptr + req)
    query_len = tl.load(query_start_loc_ptr + req + 1) - query_start
    first_query = (tile - query_start // BLOCK_Q - req) * BLOCK_Q
    if first_query >= query_len:
        return

    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr)
    kv_head = tl.program_id(1).to(tl.int64)
    req = req.to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + req)
    num_nodes = tl.load(num_nodes_ptr + req)
    num_context = seq_len - query_len
    root = seq_len - num_nodes  # KV slot index of the tree's root

    # Rows of a tile are the group's heads of query 0, then those of query 1, ...
    row = tl.arange(0, BLOCK_M)
    slot = num_context + first_query + row // GROUP
    live = (row < BLOCK_Q * GROUP) & (slot < seq_len)
    head = kv_head * GROUP + row % GROUP
    token = (query_start + first_query + row // GROUP).to(tl.int64)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    in_head = dim < HEAD_SIZE
    in_query = live[:, None] & in_head[None, :]
    query_offset = token * query_stride_token + head * query_stride_head
    query = tl.load(
        query_ptr + query_offset[:, None] + dim[None, :], mask=in_query, other=0.0
    )

    # The root is an ordinary causal row, so a tree of one node needs no mask.
    in_tree = live & (slot > root)
    depths_ptr += req * depths_stride
    masks_row_ptr = masks_ptr + req * masks_stride_req
    masks_row_ptr += (slot - root).to(tl.int64) * masks_stride_node
    block_table_ptr += req * block_table_stride
    key_ptrs = key_ptr + kv_head * key_stride_head + dim[None, :]
    value_ptrs = value_ptr + kv_head * value_stride_head + dim[None, :]

    # Parents precede children, so no row of the tile sees past the last row's slot.
    last = tl.minimum(num_context + first_query + BLOCK_Q, seq_len)
    # Every row sees all keys before the first row and before the root.
    unmasked = tl.minimum(num_context + first_query + 1, root)
    first = 0
    if first_keys_ptr is not None:
        first = tl.load(first_keys_ptr + req)
    if SLIDING_WINDOW > 0:
        depth = tl.load(depths_ptr + slot - root, mask=in_tree, other=0)
        position = tl.where(in_tree, root + depth, slot)
        # A key's position is at most its slot: what lies before `first` is out of
        # every row's window, and its block may already belong to somebody else.
        nearest = tl.min(tl.where(live, position, seq_len), axis=0)
        first = tl.maximum(first, nearest - SLIDING_WINDOW + 1)

    unmasked_start = first // BLOCK_N * BLOCK_N
    unmasked_end = tl.maximum(unmasked // BLOCK_N * BLOCK_N, unmasked_start)
    # The rest in tiles of one mask word per row, aligned to the root. The first may
    # begin among keys already seen.
    masked_start = tl.maximum(first, unmasked_end)
    num_words = (root - masked_start + WORD_BITS - 1) >> WORD_SHIFT
    word_start = root - num_words * WORD_BITS
    word_end = last
    if weighted_ptr is not None:
        # Every segment has an equal share of all tiles, the masked ones last.
        num_unmasked = (unmasked_end - unmasked_start) // BLOCK_N
        num_masked = (tl.maximum(last - word_start, 0) + WORD_BITS - 1) >> WORD_SHIFT
        num_segments = tl.num_programs(2)
        share = (num_unmasked + num_masked + num_segments - 1) // num_segments
        share_start = share * tl.program_id(2)
        share_end = tl.minimum(share_start + share, num_unmasked + num_masked)
        unmasked_end = unmasked_start + tl.minimum(share_end, num_unmasked) * BLOCK_N
        unmasked_start += share_start * BLOCK_N
        word_end = word_start + (share_end - num_unmasked) * WORD_BITS
        word_start += tl.maximum(share_start - num_unmasked, 0) * WORD_BITS

    peak = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, HEAD_SIZE_PADDED], tl.float32)

    for start in range(unmasked_start, unmasked_end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        loaded = key >= first
        block = tl.load(block_table_ptr + key // BLOCK_SIZE, mask=loaded, other=0)
        block, key_slot = block.to(tl.int64), key % BLOCK_SIZE
        in_tile = loaded[:, None] & in_head[None, :]
        keys = _load_tile(
            key_ptrs,
            block,
            key_slot,
            key_stride_block,
            key_stride_slot,
            in_tile,
            query.dtype,
        )
        values = _load_tile(
            value_ptrs,
            block,
            key_slot,
            value_stride_block,
            value_stride_slot,
            in_tile,
            query.dtype,
        )
        scores = _scores(query, keys, scale, SOFT_CAP)
        if first_keys_ptr is not None:
            scores = tl.where(loaded[None, :], scores, float("-inf"))
        if SLIDING_WINDOW > 0:
            near = position[:, None] - key[None, :] < SLIDING_WINDOW
            scores = tl.where(near, scores, float("-inf"))
        peak, total, weighted = _online_softmax(scores, values, peak, total, weighted)

    for start in range(word_start, word_end, WORD_BITS):
        bit = tl.arange(0, WORD_BITS)
        key = start + bit
        loaded = (key >= masked_start) & (key < last)
        block = tl.load(block_table_ptr + key // BLOCK_SIZE, mask=loaded, other=0)
        block, key_slot = block.to(tl.int64), key % BLOCK_SIZE
        in_tile = loaded[:, None] & in_head[None, :]
        keys = _load_tile(
            key_ptrs,
            block,
            key_slot,
            key_stride_block,
            key_stride_slot,
            in_tile,
            query.dtype,
        )
        values = _load_tile(
            value_ptrs,
            block,
            key_slot,
            value_stride_block,
            value_stride_slot,
            in_tile,
            query.dtype,
        )
        # No row has a mask word before the root: all of those keys are seen.
        masked_above = tl.where(start < root, seq_len, root)
        words = tl.load(
            masks_row_ptr + ((start - root) >> WORD_SHIFT),
            mask=live & (slot > masked_above),
            other=-1,
        )
        scores = _scores(query, keys, scale, SOFT_CAP)
        # Ancestors precede their descendants: the causal test holds in the tree too.
        visible = loaded[None, :] & (key[None, :] <= slot[:, None])
        visible &= ((words[:, None] >> bit[None, :]) & 1) != 0
        if SLIDING_WINDOW > 0:
            key_depth = tl.load(
                depths_ptr + key - root, mask=loaded & (key > root), other=0
            )
            key_position = tl.where(key > root, root + key_depth, key)
            near = position[:, None] - key_position[None, :] < SLIDING_WINDOW
            visible &= near
        scores = tl.where(visible, scores, float("-inf"))
        peak, total, weighted = _online_softmax(scores, values, peak, total, weighted)

    if value_scale_ptr is not None:
        weighted *= tl.load(value_scale_ptr)
    if weighted_ptr is not None:
        num_heads = tl.num_programs(1) * GROUP
        partial = (token * num_heads + head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(peaks_ptr + partial, peak, mask=live)
        tl.store(totals_ptr + partial, total, mask=live)
        tl.store(
            weighted_ptr + partial[:, None] * HEAD_SIZE_PADDED + dim[None, :],
            weighted,
            mask=in_query & (total > 0)[:, None],
        )
    else:
        if sinks_ptr is not None:
            peak, total, shrink = _add_sink(sinks_ptr, head, peak, total)
            weighted *= shrink[:, None]
        if log_sums_ptr is not None:
            log_sums_offset = token * log_sums_stride_token
            log_sums_offset += head * log_sums_stride_head
            tl.store(log_sums_ptr + log_sums_offset, _log_sum(peak, total), mask=live)
        # A row that saw nothing gives zeros.
        output = weighted / tl.where(total > 0, total, 1.0)[:, None]
        output_offset = token * output_stride_token + head * output_stride_head
        tl.store(
            output_ptr + output_offset[:, None] + dim[None, :],
            output.to(output_ptr.dtype.element_ty),
            mask=in_query,
        )


@triton.jit(do_not_specialize=["num_reqs", "num_segments"])
def _merge_segments_kernel(
    weighted_ptr,
    peaks_ptr,
    totals_ptr,
    output_ptr,
    output_stride_token,
    output_stride_head,
    log_sums_ptr,
    log_sums_stride_token,
    log_sums_stride_head,
    sinks_ptr,
    query_start_loc_ptr,
    num_reqs,
    num_segments,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    SEGMENTS_PADDED: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_reqs):
        return  # padding, whose scratch is stale
    segment = tl.arange(0, SEGMENTS_PADDED)
    in_segments = segment < num_segments
    partial = (token * tl.num_programs(1) + head) * num_segments + segment
    peaks = tl.load(peaks_ptr + partial, mask=in_segments, other=NO_SCORE)
    totals = tl.load(totals_ptr + partial, mask=in_segments, other=0.0)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    in_head = dim < HEAD_SIZE
    weighted = tl.load(
        weighted_ptr + partial[:, None] * HEAD_SIZE_PADDED + dim[None, :],
        # A segment without keys wrote no numerator.
        mask=(totals > 0)[:, None] & in_head[None, :],
        other=0.0,
    )
    peak = tl.max(peaks, axis=0)
    shrink = tl.exp2(peaks - peak)
    total = tl.sum(totals * shrink, axis=0)
    output = tl.sum(weighted * shrink[:, None], axis=0)
    if sinks_ptr is not None:
        peak, total, shrink_all = _add_sink(sinks_ptr, head, peak, total)
        output *= shrink_all
    if log_sums_ptr is not None:
        log_sums_offset = token * log_sums_stride_token + head * log_sums_stride_head
        tl.store(log_sums_ptr + log_sums_offset, _log_sum(peak, total))
    # A row that saw nothing gives zeros.
    output /= tl.where(total > 0, total, 1.0)
    tl.store(
        output_ptr + token * output_stride_token + head * output_stride_head + dim,
        output.to(output_ptr.dtype.element_ty),
        mask=in_head,
    )


def tree_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache: torch.Tensor,  # as key_cache; any strides but the last
    output: torch.Tensor,  # [num_tokens, num_heads, head_size], written in place
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32, later rows are padding
    seq_lens: torch.Tensor,  # [num_reqs] int32, this step's rows included
    block_table: torch.Tensor,  # [num_reqs, max_num_blocks] int32
    num_nodes: torch.Tensor,  # [>= num_reqs] int32, root included; 0, 1: no tree
    depths: torch.Tensor,  # [>= num_reqs, max_num_nodes] int32, root 0
    masks: torch.Tensor,  # [>= num_reqs, max_num_nodes, words] int32, bit j: node j
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None = None,  # [num_heads], logits of keys without values
    key_scale: torch.Tensor | None = None,  # [1] or [] f32; None: not quantized
    value_scale: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,  # [num_tokens, num_heads] f32, written
    first_keys: torch.Tensor
    | None = None,  # [>= num_reqs] int32, earlier ones are unseen
    split: SplitBuffers | None = None,
    tiles: TileSizes | None = None,  # else those of the table
) -> None:
    """Attention of every query row, where a request's last keys may be a tree.

    A request's rows are its last keys. Its last ``num_nodes`` keys are a tree: each sees
    all keys before the root and, within the tree, its ancestors and itself; the rows
    before them are causal. A node's position, which a sliding window measures, is the
    root's plus its depth, though it is stored at the root's slot plus its index.

    Rows may be fewer than nodes: row ``r`` of ``query_len`` is then node
    ``num_nodes - query_len + r``, and the nodes before it are in the cache already. So a
    tree may grow a few nodes at a time, each seeing what it would see in one go.

    Quantized caches hold keys and values divided by their scales. ``log_sums`` gets the
    logarithm of each row's softmax denominator, sink included, by which outputs over
    different keys are merged; ``first_keys`` leaves keys out that are attended elsewhere.

    Where the rows are too few to fill the device, the keys are split among programs as
    far as the buffers of ``split`` go, and merged afterwards.
    """
    _check_shapes(query, key_cache, value_cache, output, depths, masks)
    _check_scales(key_cache.dtype, value_cache.dtype, key_scale, value_scale)
    _check_heads(query, sinks, log_sums)
    _check_numbers(sliding_window, soft_cap)
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_reqs = seq_lens.shape[0]
    if num_tokens == 0 or num_reqs == 0:
        return
    group = num_heads // num_kv_heads
    tiles = tiles or tile_sizes(
        max_query_len, group, head_size, query.dtype, key_cache.dtype, query.device
    )
    num_segments = 1
    partials: tuple[torch.Tensor | None, ...] = (None, None, None)
    if split is not None:
        num_segments = split.num_segments(
            tiles,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            max_query_len=max_query_len,
            max_num_keys=block_table.shape[1] * block_size,
        )
        if num_segments > 1:
            partials = (split.weighted, split.peaks, split.totals)
    log_sums_strides = (0, 0) if log_sums is None else log_sums.stride()
    num_tiles = num_tokens // tiles.block_q + num_reqs
    _tree_attention_kernel[(num_tiles, num_kv_heads, num_segments)](
        query,
        *query.stride()[:2],
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        output,
        *output.stride()[:2],
        log_sums,
        *log_sums_strides,
        sinks,
        key_scale,
        value_scale,
        query_start_loc,
        seq_lens,
        first_keys,
        block_table,
        block_table.stride(0),
        num_nodes,
        depths,
        depths.stride(0),
        masks,
        *masks.stride()[:2],
        *partials,
        num_reqs,
        scale * LOG2_E.value,
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_SIZE_PADDED=tiles.head_size_padded,
        BLOCK_SIZE=block_size,
        SLIDING_WINDOW=sliding_window or 0,
        SOFT_CAP=(soft_cap or 0.0) * LOG2_E.value,
        BLOCK_Q=tiles.block_q,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_segments > 1:
        _merge_segments_kernel[(num_tokens, num_heads)](
            *partials,
            output,
            *output.stride()[:2],
            log_sums,
            *log_sums_strides,
            sinks,
            query_start_loc,
            num_reqs,
            num_segments,
            HEAD_SIZE=head_size,
            HEAD_SIZE_PADDED=tiles.head_size_padded,
            SEGMENTS_PADDED=triton.next_power_of_2(num_segments),
        )


def _check_shapes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
) -> None:
    _, num_heads, head_size = query.shape
    num_kv_heads = key_cache.shape[1]
    if output.shape != query.shape:
        raise ValueError(
            f"output is {tuple(output.shape)}, the query {tuple(query.shape)}: "
            "allocate the output like the query"
        )
    if value_cache.shape != key_cache.shape or key_cache.shape[3] != head_size:
        raise ValueError(
            f"caches are {tuple(key_cache.shape)} and {tuple(value_cache.shape)}: "
            f"both must have rows of the query's head size, {head_size}"
        )
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(
            f"head_size={head_size}: must be in [1, {MAX_HEAD_SIZE}]; "
            "a wider head needs tiles split along it"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads do not divide into groups of {num_kv_heads} "
            "KV heads: pass a multiple"
        )
    if (
        masks.shape[1] != depths.shape[1]
        or masks.shape[2] * WORD_BITS.value < masks.shape[1]
    ):
        raise ValueError(
            f"masks are {tuple(masks.shape)} for depths of {tuple(depths.shape)}: "
            "need a bit for every node, 32 in a word"
        )
    for name, tensor in {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "output": output,
        "depths": depths,
        "masks": masks,
    }.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has last stride {tensor.stride(-1)}, must be 1: "
                "pass it contiguous along the last dimension"
            )


def _check_scales(
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> None:
    if key_dtype != value_dtype or not key_dtype.is_floating_point:
        raise ValueError(
            f"caches are {key_dtype} and {value_dtype}: both must have one dtype, "
            "a floating one; view quantized bytes as what they are"
        )
    scales = (key_scale, value_scale)
    if key_dtype.itemsize == 1 and any(scale is None for scale in scales):
        raise ValueError(f"caches are {key_dtype}: pass key_scale and value_scale")
    if any(scale is not None and scale.numel() != 1 for scale in scales):
        raise ValueError("key_scale and value_scale must have one element each")


def _check_heads(
    query: torch.Tensor, sinks: torch.Tensor | None, log_sums: torch.Tensor | None
) -> None:
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(
            f"sinks are {tuple(sinks.shape)}: need one for each of "
            f"{query.shape[1]} query heads"
        )
    if log_sums is not None and log_sums.shape != query.shape[:2]:
        raise ValueError(
            f"log_sums are {tuple(log_sums.shape)}, need {tuple(query.shape[:2])}"
        )


def _check_numbers(sliding_window: int | None, soft_cap: float | None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window={sliding_window}: must be at least 1, or None for none"
        )
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}: must be positive, or None for none")
