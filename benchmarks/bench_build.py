"""python benchmarks/bench_build.py"""

import sys
from typing import NamedTuple

import torch

from vllm_treespec.kernels.ancestor_mask import ancestor_mask
from vllm_treespec.kernels.merge_candidates import merge_candidates
from vllm_treespec.kernels.reference.ancestor_mask import (
    ancestor_mask as ancestor_mask_reference,
)
from vllm_treespec.kernels.reference.merge_candidates import (
    merge_candidates as merge_candidates_reference,
)
from vllm_treespec.kernels.reference.select_nodes import (
    select_nodes as select_nodes_reference,
)
from vllm_treespec.kernels.reference.walk_tree import walk_tree as walk_tree_reference
from vllm_treespec.kernels.select_nodes import select_nodes
from vllm_treespec.kernels.walk_tree import walk_tree
from vllm_treespec.testing.bench import median_us, print_table
from vllm_treespec.testing.trees import chain_parents, random_parents

NUM_PROPOSERS = 2
VOCAB_SIZE = 4  # few tokens, so that proposers agree and walks go deep

Tensors = tuple[torch.Tensor, ...]


class Row(NamedTuple):
    reqs: int
    drafts: int
    shape: str
    merge_us: float
    select_us: float
    mask_us: float
    walk_us: float


class Step(NamedTuple):
    """What every stage reads and writes; a stage's outputs are the next one's inputs."""

    merge: Tensors
    select: Tensors
    mask: Tensors
    walk: Tensors


def make_step(num_reqs: int, num_drafts: int, shape: str) -> Step:
    num_nodes, num_merged = num_drafts + 1, NUM_PROPOSERS * num_drafts
    slots = torch.randperm(num_reqs).int()
    counts = torch.full((num_reqs,), num_drafts, dtype=torch.int32)
    trees = [
        chain_parents(num_reqs, num_nodes)
        if shape == "chain"
        else random_parents(num_reqs, num_nodes, seed)
        for seed in range(NUM_PROPOSERS)
    ]
    candidates = (
        torch.randint(VOCAB_SIZE, (NUM_PROPOSERS, num_reqs, num_drafts)).int(),
        (torch.stack(trees)[:, :, 1:] - 1).contiguous(),
        -torch.rand(NUM_PROPOSERS, num_reqs, num_drafts),
        counts.repeat(NUM_PROPOSERS, 1),
    )
    token_ids, parents, proposers = torch.zeros(3, num_reqs, num_merged).int()
    merged = (token_ids, parents, torch.zeros(num_reqs, num_merged), proposers)
    sizes, path_lens, num_sampled, num_in_tree = torch.zeros(4, num_reqs).int()
    chain_only = torch.zeros(num_reqs, dtype=torch.bool)
    tree_tokens, tree_parents, tree_proposers, depths, paths = torch.zeros(
        5, num_reqs, num_nodes
    ).int()
    draft_tokens = torch.zeros(num_reqs, num_drafts).long()
    masks = torch.zeros(num_reqs, num_nodes, -(-num_nodes // 32)).int()
    cu_num_logits = torch.arange(0, num_reqs * num_nodes + 1, num_nodes).int()
    target_ids = torch.randint(VOCAB_SIZE, (num_reqs * num_nodes,))
    sampled = torch.zeros(num_reqs, num_nodes).long()

    tree = (tree_tokens, tree_parents, tree_proposers, num_in_tree)
    return on_cuda(
        Step(
            merge=(*candidates, *merged, sizes),
            select=(slots, *merged, sizes, counts, chain_only, *tree, draft_tokens),
            mask=(slots, tree_parents, num_in_tree, depths, masks),
            walk=(
                *(slots, cu_num_logits, target_ids),
                *(tree_tokens, tree_parents, num_in_tree),
                *(sampled, num_sampled, paths, path_lens),
            ),
        )
    )


def on_cuda(step: Step) -> Step:
    """Stages share tensors, and must still share them over there."""
    copies = {id(tensor): tensor.cuda() for stage in step for tensor in stage}
    return Step(*(tuple(copies[id(tensor)] for tensor in stage) for stage in step))


def measure(num_reqs: int, num_drafts: int, shape: str) -> Row:
    step = make_step(num_reqs, num_drafts, shape)
    stages = (
        (merge_candidates, merge_candidates_reference, step.merge),
        (select_nodes, select_nodes_reference, step.select),
        (ancestor_mask, ancestor_mask_reference, step.mask),
        (walk_tree, walk_tree_reference, step.walk),
    )
    for kernel, reference, tensors in stages:
        expected = tuple(tensor.clone() for tensor in tensors)
        kernel(*tensors)
        reference(*expected)
        assert all(map(torch.equal, tensors, expected)), "wrong, not fast"
    times = [median_us(lambda k=k, t=t: k(*t)) for k, _, t in stages]
    return Row(num_reqs, num_drafts, shape, *times)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("build and walk are timed on a CUDA device, and there is none here")
    sizes = [
        (num_reqs, num_drafts, shape)
        for num_reqs in (1, 64, 256)
        for num_drafts, shape in ((16, "random"), (64, "random"), (64, "chain"))
    ]
    sizes += [(8, 512, "random"), (8, 512, "chain")]
    title = f"merge, select, mask and walk, {NUM_PROPOSERS} proposers"
    print_table(title, [measure(*size) for size in sizes])
