"""Paged attention in which a request's last keys may be a token tree."""

import math

import torch
import triton
import triton.language as tl

from vllm_treespec.kernels.attention_plan import SplitBuffers, TileSizes, tile_sizes

MAX_HEAD_SIZE = 256
WORD_BITS = tl.constexpr(32)  # nodes per int32 mask word
WORD_SHIFT = tl.constexpr(5)  # rounds down where // would round to zero
LANES = tl.constexpr(256)  # requests looked at together
# Of a tile that its program left to others: pieces, 0 if there is none, the first
# query's token, rows, the first query head.
CUT_WORDS = tl.constexpr(4)
MERGED_ROWS, MERGED_PIECES = 4, 8  # of one program that merges

# Scores are in base 2: exp2 is the hardware's exponential.
LOG2_E = tl.constexpr(math.log2(math.e))
# Finite, so that a row which has seen nothing yet never computes inf - inf.
NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _work(
    query_start_loc_ptr,
    seq_lens_ptr,
    reqs,
    num_reqs,
    SLIDING_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CUT: tl.constexpr,
):
    """Tiles of rows that each request has, and about how many tiles of keys one of them
    sees: work is cut between these. 1 where it is not cut."""
    is_req = reqs < num_reqs
    query_start = tl.load(query_start_loc_ptr + reqs, mask=is_req, other=0)
    query_end = tl.load(query_start_loc_ptr + reqs + 1, mask=is_req, other=0)
    query_len = query_end - query_start
    row_tiles = (query_len + BLOCK_Q - 1) // BLOCK_Q
    key_tiles = row_tiles * 0 + 1
    if IS_CUT:
        num_keys = tl.load(seq_lens_ptr + reqs, mask=is_req, other=0)
        if SLIDING_WINDOW > 0:
            in_window = SLIDING_WINDOW + tl.minimum(query_len, BLOCK_Q)
            num_keys = tl.minimum(num_keys, in_window)
        key_tiles = tl.maximum((num_keys + BLOCK_N - 1) // BLOCK_N, 1)
    return row_tiles, key_tiles


@triton.jit
def _share(
    query_start_loc_ptr,
    seq_lens_ptr,
    num_reqs,
    num_kv_heads,
    min_share,
    SLIDING_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CUT: tl.constexpr,
):
    """This program's part of all requests' work, in units of a tile of rows times one of
    keys: its first unit, the most that a program gets, all units there are, the request of
    the first, and the units before that request."""
    lane = tl.arange(0, LANES)
    total = tl.full((), 0, tl.int32)
    for first_req in range(0, num_reqs, LANES):
        row_tiles, key_tiles = _work(
            query_start_loc_ptr,
            seq_lens_ptr,
            first_req + lane,
            num_reqs,
            SLIDING_WINDOW,
            BLOCK_Q,
            BLOCK_N,
            IS_CUT,
        )
        total += tl.sum(row_tiles * key_tiles, axis=0) * num_kv_heads
    num_programs = tl.num_programs(0)
    share = tl.maximum((total + num_programs - 1) // num_programs, min_share)
    unit = tl.program_id(0) * share

    req = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int32)
    passed = tl.full((), 0, tl.int32)
    for first_req in range(0, num_reqs, LANES):
        row_tiles, key_tiles = _work(
            query_start_loc_ptr,
            seq_lens_ptr,
            first_req + lane,
            num_reqs,
            SLIDING_WINDOW,
            BLOCK_Q,
            BLOCK_N,
            IS_CUT,
        )
        units = row_tiles * key_tiles * num_kv_heads
        behind = passed + tl.cumsum(units, axis=0)
        is_before = (behind <= unit) & (first_req + lane < num_reqs)
        req += tl.sum(is_before.to(tl.int32), axis=0)
        before = tl.maximum(before, tl.max(tl.where(is_before, behind, 0), axis=0))
        passed += tl.sum(units, axis=0)
    return unit, share, total, req, before


@triton.jit
def _blocks(block_table_ptr, key, is_wanted, BLOCK_SIZE: tl.constexpr):
    return tl.load(block_table_ptr + key // BLOCK_SIZE, mask=is_wanted, other=0)


@triton.jit
def _load_tile(
    cache_ptrs, block, slot, stride_block, stride_slot, in_tile, DTYPE: tl.constexpr
):
    row = block.to(tl.int64) * stride_block + slot * stride_slot
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
def _add_sink(sinks_ptr, head, peak, total, live):
    """A sink is a key without a value. Returns what the numerator is to shrink by, too."""
    sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
    new_peak = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - new_peak)
    return new_peak, total * shrink + tl.exp2(sink - new_peak), shrink


# More than 20 arguments only by strides: query, caches and output are all views.
@triton.jit(do_not_specialize=["num_reqs", "num_kv_heads", "min_share"])
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
    sinks_ptr,  # None: the layer has none
    key_scale_ptr,  # None: the caches are not quantized
    value_scale_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_table_ptr,
    block_table_stride,
    num_nodes_ptr,
    depths_ptr,
    depths_stride,
    masks_ptr,
    masks_stride_req,
    masks_stride_node,
    weighted_ptr,  # None: no tile of rows is cut
    peaks_ptr,
    totals_ptr,
    cuts_ptr,
    num_reqs,
    num_kv_heads,
    min_share,
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
    program = tl.program_id(0)
    unit, share, num_units, req, before = _share(
        query_start_loc_ptr,
        seq_lens_ptr,
        num_reqs,
        num_kv_heads,
        min_share,
        SLIDING_WINDOW,
        BLOCK_Q,
        BLOCK_N,
        weighted_ptr is not None,
    )
    end = tl.minimum(unit + share, num_units)
    # The tile that this program begins and others go on with, if any.
    num_pieces = tl.full((), 0, tl.int32)
    cut_token = tl.full((), 0, tl.int32)
    cut_rows = tl.full((), 0, tl.int32)
    cut_head = tl.full((), 0, tl.int32)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr)
    value_scale = 1.0
    if value_scale_ptr is not None:
        value_scale = tl.load(value_scale_ptr)
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    in_head = dim < HEAD_SIZE

    while unit < end:
        row_tiles, key_tiles = _work(
            query_start_loc_ptr,
            seq_lens_ptr,
            req,
            num_reqs,
            SLIDING_WINDOW,
            BLOCK_Q,
            BLOCK_N,
            weighted_ptr is not None,
        )
        while unit >= before + row_tiles * key_tiles * num_kv_heads:
            before += row_tiles * key_tiles * num_kv_heads
            req += 1
            row_tiles, key_tiles = _work(
                query_start_loc_ptr,
                seq_lens_ptr,
                req,
                num_reqs,
                SLIDING_WINDOW,
                BLOCK_Q,
                BLOCK_N,
                weighted_ptr is not None,
            )
        tile_start = before + (unit - before) // key_tiles * key_tiles
        part_start = unit - tile_start
        part_end = tl.minimum(end - tile_start, key_tiles)
        tile = (tile_start - before) // key_tiles
        kv_head = (tile // row_tiles).to(tl.int64)
        # Late tiles of a prompt see more keys than early ones: both in turn.
        tile = tile % row_tiles
        tile = tl.where(tile % 2 == 0, tile // 2, row_tiles - 1 - tile // 2)
        query_start = tl.load(query_start_loc_ptr + req)
        query_len = tl.load(query_start_loc_ptr + req + 1) - query_start
        first_query = tile * BLOCK_Q
        seq_len = tl.load(seq_lens_ptr + req)
        num_nodes = tl.load(num_nodes_ptr + req)
        num_context = seq_len - query_len
        root = seq_len - num_nodes  # KV slot index of the tree's root

        # Rows of a tile are the group's heads of query 0, then those of query 1, ...
        slot = num_context + first_query + row // GROUP
        live = (row < BLOCK_Q * GROUP) & (slot < seq_len)
        head = kv_head * GROUP + row % GROUP
        token = (query_start + first_query + row // GROUP).to(tl.int64)
        in_query = live[:, None] & in_head[None, :]
        query_offset = token * query_stride_token + head * query_stride_head
        query = tl.load(
            query_ptr + query_offset[:, None] + dim[None, :], mask=in_query, other=0.0
        )

        # The root is an ordinary causal row, so a tree of one node needs no mask.
        in_tree = live & (slot > root)
        row_req = tl.cast(req, tl.int64)
        depths_row_ptr = depths_ptr + row_req * depths_stride
        masks_row_ptr = masks_ptr + row_req * masks_stride_req
        masks_row_ptr += (slot - root).to(tl.int64) * masks_stride_node
        table_row_ptr = block_table_ptr + row_req * block_table_stride
        key_ptrs = key_ptr + kv_head * key_stride_head + dim[None, :]
        value_ptrs = value_ptr + kv_head * value_stride_head + dim[None, :]

        # Parents precede children, so no row of the tile sees past the last row's slot.
        last = tl.minimum(num_context + first_query + BLOCK_Q, seq_len)
        # Every row sees all keys before the first row and before the root.
        unmasked = tl.minimum(num_context + first_query + 1, root)
        first = tl.full((), 0, tl.int32)
        if SLIDING_WINDOW > 0:
            depth = tl.load(depths_row_ptr + slot - root, mask=in_tree, other=0)
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
            # This program's part of the steps, the masked ones last.
            num_unmasked = (unmasked_end - unmasked_start) // BLOCK_N
            num_masked = (
                tl.maximum(last - word_start, 0) + WORD_BITS - 1
            ) >> WORD_SHIFT
            num_steps = (num_unmasked + num_masked).to(tl.int64)
            step = (num_steps * part_start // key_tiles).to(tl.int32)
            step_end = (num_steps * part_end // key_tiles).to(tl.int32)
            unmasked_end = unmasked_start + tl.minimum(step_end, num_unmasked) * BLOCK_N
            unmasked_start += step * BLOCK_N
            word_end = word_start + (step_end - num_unmasked) * WORD_BITS
            word_start += tl.maximum(step - num_unmasked, 0) * WORD_BITS

        peak = tl.full([BLOCK_M], NO_SCORE, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M, HEAD_SIZE_PADDED], tl.float32)

        # The blocks of the next tile are known while this one is at work: else a stage
        # of the pipeline goes to looking them up, and keys are not there in time.
        key = unmasked_start + tl.arange(0, BLOCK_N)
        next_block = _blocks(
            table_row_ptr, key, (key >= first) & (key < unmasked_end), BLOCK_SIZE
        )
        for start in range(unmasked_start, unmasked_end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            loaded = key >= first
            block, next_key = next_block, key + BLOCK_N
            next_block = _blocks(
                table_row_ptr,
                next_key,
                (next_key >= first) & (next_key < unmasked_end),
                BLOCK_SIZE,
            )
            in_tile = loaded[:, None] & in_head[None, :]
            keys = _load_tile(
                key_ptrs,
                block,
                key % BLOCK_SIZE,
                key_stride_block,
                key_stride_slot,
                in_tile,
                query.dtype,
            )
            values = _load_tile(
                value_ptrs,
                block,
                key % BLOCK_SIZE,
                value_stride_block,
                value_stride_slot,
                in_tile,
                query.dtype,
            )
            scores = _scores(query, keys, scale, SOFT_CAP)
            if SLIDING_WINDOW > 0:
                near = position[:, None] - key[None, :] < SLIDING_WINDOW
                scores = tl.where(near, scores, float("-inf"))
            peak, total, weighted = _online_softmax(
                scores, values, peak, total, weighted
            )

        bit = tl.arange(0, WORD_BITS)
        key = word_start + bit
        next_block = _blocks(
            table_row_ptr,
            key,
            (key >= masked_start) & (key < tl.minimum(last, word_end)),
            BLOCK_SIZE,
        )
        for start in range(word_start, word_end, WORD_BITS):
            key = start + bit
            loaded = (key >= masked_start) & (key < last)
            block, next_key = next_block, key + WORD_BITS
            next_block = _blocks(
                table_row_ptr,
                next_key,
                (next_key >= masked_start) & (next_key < tl.minimum(last, word_end)),
                BLOCK_SIZE,
            )
            in_tile = loaded[:, None] & in_head[None, :]
            keys = _load_tile(
                key_ptrs,
                block,
                key % BLOCK_SIZE,
                key_stride_block,
                key_stride_slot,
                in_tile,
                query.dtype,
            )
            values = _load_tile(
                value_ptrs,
                block,
                key % BLOCK_SIZE,
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
                    depths_row_ptr + key - root, mask=loaded & (key > root), other=0
                )
                key_position = tl.where(key > root, root + key_depth, key)
                near = position[:, None] - key_position[None, :] < SLIDING_WINDOW
                visible &= near
            scores = tl.where(visible, scores, float("-inf"))
            peak, total, weighted = _online_softmax(
                scores, values, peak, total, weighted
            )

        weighted *= value_scale
        is_whole = (part_start == 0) & (part_end == key_tiles)
        if is_whole:
            if sinks_ptr is not None:
                peak, total, shrink = _add_sink(sinks_ptr, head, peak, total, live)
                weighted *= shrink[:, None]
            # A row that saw nothing gives zeros.
            output = weighted / tl.where(total > 0, total, 1.0)[:, None]
            output_offset = token * output_stride_token + head * output_stride_head
            tl.store(
                output_ptr + output_offset[:, None] + dim[None, :],
                output.to(output_ptr.dtype.element_ty),
                mask=in_query,
            )
        elif weighted_ptr is not None:
            begins = part_start == 0
            partial = (2 * program + begins.to(tl.int32)) * BLOCK_M + row
            tl.store(peaks_ptr + partial, peak, mask=live)
            tl.store(totals_ptr + partial, total, mask=live)
            tl.store(
                weighted_ptr + partial[:, None] * HEAD_SIZE_PADDED + dim[None, :],
                weighted,
                mask=(live & (total > 0))[:, None],
            )
            if begins:
                num_pieces = (tile_start + key_tiles - 1) // share - program + 1
                cut_token = query_start + first_query
                cut_rows = tl.minimum(query_len - first_query, BLOCK_Q) * GROUP
                cut_head = (kv_head * GROUP).to(tl.int32)
        unit = tile_start + part_end

    if weighted_ptr is not None:
        cuts_ptr += program * CUT_WORDS
        tl.store(cuts_ptr, num_pieces)
        tl.store(cuts_ptr + 1, cut_token)
        tl.store(cuts_ptr + 2, cut_rows)
        tl.store(cuts_ptr + 3, cut_head)


@triton.jit
def _merge_pieces_kernel(
    weighted_ptr,
    peaks_ptr,
    totals_ptr,
    cuts_ptr,
    output_ptr,
    output_stride_token,
    output_stride_head,
    sinks_ptr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_SIZE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    program = tl.program_id(0)
    cuts_ptr += program * CUT_WORDS
    num_pieces = tl.load(cuts_ptr)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < tl.load(cuts_ptr + 2)
    dim = tl.arange(0, HEAD_SIZE_PADDED)
    peak = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS, HEAD_SIZE_PADDED], tl.float32)
    for first_piece in range(0, num_pieces, BLOCK_PIECES):
        piece = first_piece + tl.arange(0, BLOCK_PIECES)
        # Of its two results a program's second begins a tile, its first goes on with one.
        partial = 2 * (program + piece) + (piece == 0).to(tl.int32)
        partial = partial[:, None] * BLOCK_M + row[None, :]
        is_piece = (piece < num_pieces)[:, None] & live[None, :]
        peaks = tl.load(peaks_ptr + partial, mask=is_piece, other=NO_SCORE)
        totals = tl.load(totals_ptr + partial, mask=is_piece, other=0.0)
        parts = tl.load(
            weighted_ptr + partial[:, :, None] * HEAD_SIZE_PADDED + dim[None, None, :],
            # A piece without keys wrote no numerator.
            mask=(totals > 0)[:, :, None] & (dim < HEAD_SIZE)[None, None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        shrinks = tl.exp2(peaks - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(totals * shrinks, axis=0)
        weighted = weighted * shrink[:, None] + tl.sum(
            parts * shrinks[:, :, None], axis=0
        )
        peak = new_peak
    head = tl.load(cuts_ptr + 3) + row % GROUP
    if sinks_ptr is not None:
        peak, total, shrink = _add_sink(sinks_ptr, head, peak, total, live)
        weighted *= shrink[:, None]
    # A row that saw nothing gives zeros.
    output = weighted / tl.where(total > 0, total, 1.0)[:, None]
    token = (tl.load(cuts_ptr + 1) + row // GROUP).to(tl.int64)
    output_offset = token * output_stride_token + head * output_stride_head
    is_cut = live & (num_pieces > 0)
    tl.store(
        output_ptr + output_offset[:, None] + dim[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=is_cut[:, None] & (dim < HEAD_SIZE)[None, :],
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

    Quantized caches hold keys and values divided by their scales.

    With the buffers of ``split`` the work of all requests is divided evenly among as many
    programs as the device runs at once, on the device, however long each request is; what
    is cut is merged afterwards. Without them a program has all keys of a tile of rows.
    """
    _check_shapes(query, key_cache, value_cache, output, depths, masks)
    _check_scales(key_cache.dtype, value_cache.dtype, key_scale, value_scale)
    _check_sinks(query, sinks)
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
    partials: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    # Requests have at most one tile more than full ones would make.
    num_programs = (num_tokens // tiles.block_q + num_reqs) * num_kv_heads
    min_share = 1
    if split is not None:
        partials = (split.weighted, split.peaks, split.totals, split.cuts)
        num_programs = split.num_programs(tiles)
        min_share = max(split.min_keys // tiles.block_n, 1)
    _tree_attention_kernel[(num_programs,)](
        query,
        *query.stride()[:2],
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        output,
        *output.stride()[:2],
        sinks,
        key_scale,
        value_scale,
        query_start_loc,
        seq_lens,
        block_table,
        block_table.stride(0),
        num_nodes,
        depths,
        depths.stride(0),
        masks,
        *masks.stride()[:2],
        *partials,
        num_reqs,
        num_kv_heads,
        min_share,
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
    # The last program leaves nothing to others.
    if split is not None and num_programs > 1:
        _merge_pieces_kernel[(num_programs - 1, tiles.block_m // MERGED_ROWS)](
            *partials,
            output,
            *output.stride()[:2],
            sinks,
            GROUP=group,
            HEAD_SIZE=head_size,
            HEAD_SIZE_PADDED=tiles.head_size_padded,
            BLOCK_M=tiles.block_m,
            BLOCK_ROWS=MERGED_ROWS,
            BLOCK_PIECES=MERGED_PIECES,
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


def _check_sinks(query: torch.Tensor, sinks: torch.Tensor | None) -> None:
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(
            f"sinks are {tuple(sinks.shape)}: need one for each of "
            f"{query.shape[1]} query heads"
        )


def _check_numbers(sliding_window: int | None, soft_cap: float | None) -> None:
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window={sliding_window}: must be at least 1, or None for none"
        )
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap}: must be positive, or None for none")
