import numpy as np
import torch

from vllm_treespec.core.attend import causal_tail


def tail_of(num_logits, query_lens, num_keys=None):
    cu_num_logits = np.cumsum([0, *num_logits]).astype(np.int32)
    starts = np.cumsum([0, *query_lens, 0, 0]).astype(np.int32)  # with padding
    keys = np.array(num_keys or [100] * len(query_lens), dtype=np.int32)
    return causal_tail(cu_num_logits, starts, torch.from_numpy(starts.copy()), keys)


def test_prompts_behind_trees_are_the_tail():
    tail = tail_of([4, 3, 1, 0], [4, 3, 20, 7], num_keys=[900, 800, 20, 57])
    assert (tail.reqs, tail.tokens) == (slice(2, 4), slice(7, 34))
    assert tail.query_start_loc.tolist() == [0, 20, 27]
    assert tail.query_start_loc.dtype == torch.int32
    assert (tail.max_query_len, tail.max_num_keys) == (20, 57)
    assert tail.max_query_len_before == 4


def test_prompts_alone_leave_nothing_before_them():
    tail = tail_of([1, 1], [5, 9])
    assert (tail.reqs, tail.tokens) == (slice(0, 2), slice(0, 14))
    assert tail.max_query_len_before == 0


def test_requests_that_decode_without_a_tree_go_along_with_prompts():
    assert tail_of([3, 1, 1], [3, 1, 6]).reqs == slice(1, 3)


def test_a_tree_is_never_in_the_tail_wherever_it_stands():
    assert tail_of([1, 1, 3], [8, 6, 3]) is None
    assert tail_of([1, 3, 1], [8, 3, 6]).reqs == slice(2, 3)


def test_batches_that_only_decode_have_no_tail():
    assert tail_of([4, 4], [4, 4]) is None
    assert tail_of([4, 1], [4, 1]) is None
